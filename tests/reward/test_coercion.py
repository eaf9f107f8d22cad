"""A program names a reward by a text, as a config does."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.reward.coercion import sum_rewards
from pipeline.reward.model import RewardModel
from tests.reward.stand_in import ANSWERS, PROMPTS

CPU = torch.device("cpu")
BATCH = {"prompts": ["q"], "completions": ["abc"], "completion_ids": [[1, 2]], "ended": [True]}


def letters(completions, **_):
    return [len(text) for text in completions]


def broken(completions, **_):
    raise RuntimeError("no")


def test_a_module_and_function_is_that_function(tiny_tokenizer):
    alone = sum_rewards(f"{__name__}:letters", None, None, tiny_tokenizer, CPU)
    assert alone.score(**BATCH) == [3]
    both = sum_rewards([f"{__name__}:letters", letters], [2.0, 0.5], None, tiny_tokenizer, CPU)
    assert both.score(**BATCH) == [7.5]


def test_a_url_is_the_model_of_a_server(serve, decoder, tiny_tokenizer):
    server = serve("vllm", decoder)
    source = sum_rewards(server.url, None, None, tiny_tokenizer, CPU)
    assert source.score(prompts=PROMPTS, completions=ANSWERS) == pytest.approx(
        RewardModel.load(decoder).score(PROMPTS, ANSWERS), abs=1e-5
    )
    assert (source.mean, source.std, source.model) == (0.5, 1.0, None)  # alpha 0.5 of mean 1 and deviation 2


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (f"{__name__}:nothing", rf"^reward \({__name__}:nothing\): .* has no attribute 'nothing'"),
        ([letters, "no_such_module:f"], r"^reward\[1\] \(no_such_module:f\): "),
        ("http://", "^ppo: reward: .*source"),
        ("HTTP://127.0.0.1:1/a?b=c", "^ppo: reward: .*source"),
    ],
)
def test_a_text_that_names_none_gets_the_errors_of_a_config(reward, message, tiny_tokenizer):
    with pytest.raises(UserError, match=message):
        sum_rewards(reward, None, None, tiny_tokenizer, CPU)


def test_an_error_of_the_function_names_it(tiny_tokenizer):
    named = sum_rewards([letters, f"{__name__}:broken"], None, None, tiny_tokenizer, CPU)
    with pytest.raises(UserError, match=rf"^reward\[1\] \({__name__}:broken\): the reward failed with"):
        named.score(**BATCH)


def test_a_server_that_is_down_is_named(tiny_tokenizer, serve, decoder):
    server = serve("vllm", decoder)
    server.says = {}
    with pytest.raises(UserError, match=rf"^reward \({server.url}\): "):
        sum_rewards(server.url, None, None, tiny_tokenizer, CPU)
