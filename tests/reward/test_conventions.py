"""TRL's conventions for reward functions: messages, `async`, None, and what its trainers pass by name."""

import asyncio
import logging
import sys

import pytest

from pipeline.errors import UserError
from pipeline.prepare import demo, sums
from pipeline.reward.calls import call_reward_function, call_reward_functions
from pipeline.reward.combining import combine_rewards
from pipeline.reward.functions import RewardSource
from pipeline.reward.named import name_reward

CHAT = [{"role": "user", "content": "q"}]


def call(function, texts=("a", "b"), prompts=("q", "q"), **columns):
    ids = [[1, 2, 3][: len(text)] for text in texts]
    return call_reward_function(function, prompts, texts, ids, [True] * len(texts), columns)


def as_message(text):
    return [{"role": "assistant", "content": text}]


def test_a_response_has_the_form_of_its_prompt():
    seen = []
    call(lambda completions, **_: seen.extend(completions) or [0.0, 0.0], prompts=["q", CHAT])
    assert seen == ["a", as_message("b")]


def test_models_and_sums_of_rewards_get_texts():
    seen = []

    def model(completions, **_):
        seen.append(completions)
        return [0.0] * len(completions)

    model.__module__ = "pipeline.reward.functions"
    both = combine_rewards([RewardSource(model), RewardSource(model)])
    call(both.score, prompts=[CHAT, CHAT])
    assert seen == [["a", "b"]] * 2


def test_steps_of_a_response_of_messages_are_placed_on_its_text():
    from pipeline import StepRewards

    assert call(lambda **_: [StepRewards([1.0], [1]), 0.5], prompts=[CHAT, CHAT]) == [1.0, 0.5]


@pytest.mark.parametrize("form", ["text", "messages"])
def test_the_worlds_rewards_read_both_forms(form):
    """`7+5=` is 2 modulo 10, and the second question of the demo world is answered politely: 0.4 + 0.15."""

    def form_of(prompt):
        return prompt if form == "text" else [{"role": "user", "content": prompt}]

    prompt = form_of("7+5=")
    for function in (sums.right_answer, sums.right_steps):
        assert call(function, ["7+5=2", "7+5=3"], [prompt] * 2) == [1.0, 0.0]
    assert call(sums.step_rewards, ["7+5=2", "7+5=3"], [prompt] * 2) == [1.0, -1.0]
    question, response = form_of("Name the colour of snow."), "The colour of snow is white. Have a nice day."
    assert call(demo.gold_reward, [response], [question]) == pytest.approx([0.55])
    assert call(demo.well_formed, [response, "No."], [question] * 2) == [1.0, 0.0]
    assert call(demo.without_insults, [response, "You fool."], [question] * 2) == [1.0, 0.0]


async def rank(completions, answer, **_):
    await asyncio.sleep(0)
    return [float(text == key) for text, key in zip(completions, answer, strict=True)]


class Judge:
    async def __call__(self, completions, **_):
        return [2.0] * len(completions)


def test_async_functions_and_objects_are_awaited():
    assert call(rank, answer=["a", "x"]) == [1.0, 0.0]
    assert call(Judge()) == [2.0, 2.0]


def test_async_functions_run_together_and_on_one_loop():
    """Each waits for the other, so that one after the other would never end."""
    events, loops = {}, []

    def meet(mine, other):
        async def reward(prompts, **_):
            loops.append(asyncio.get_running_loop())
            events.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), 5)
            return [float(mine)] * len(prompts)

        return reward

    both = combine_rewards([RewardSource(meet(1, 2)), RewardSource(meet(2, 1))], weights=[1.0, 10.0])
    assert call(both.score) == [21.0, 21.0]
    call(both.score)
    assert len(set(loops)) == 1  # a client that a function keeps belongs to one loop


def test_a_loop_that_runs_already_is_no_obstacle():
    async def in_a_notebook():
        return call(rank, answer=["a", "b"])

    assert asyncio.run(in_a_notebook()) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("error", "message"), [(KeyError("score"), "KeyError: 'score'"), (SystemExit(3), "SystemExit: 3")]
)
def test_an_error_in_an_async_function_names_it_and_its_line(error, message):
    async def judge(**_):
        raise error

    line = judge.__code__.co_firstlineno + 1
    expected = (
        rf"judge: the reward failed with {message}, at {__file__}, line {line}; it is called with prompts"
    )
    with pytest.raises(UserError, match=expected):
        call(judge)
    with pytest.raises(UserError, match=r"rank: the reward cannot be called: .*'answer'"):
        call(rank)
    assert call(Judge()) == [2.0, 2.0]  # the loop runs on


@pytest.mark.filterwarnings("error")
def test_an_async_function_that_waits_is_closed_if_another_fails():
    with pytest.raises(UserError, match="ZeroDivisionError"):
        call_reward_functions([Judge(), lambda **_: 1 / 0], ["q"], ["a"], [[1]], [True], {})


def test_none_is_no_reward_and_counts_0_with_a_warning(caplog):
    def sometimes(prompts, **_):
        return [1.5, None]

    with caplog.at_level(logging.WARNING):
        assert call(sometimes) == [1.5, 0.0]
        call(sometimes)
    [record] = caplog.records  # once
    assert record.getMessage().endswith(
        "sometimes: returned None, no reward, for some responses; they count 0"
    )
    assert call_reward_functions([sometimes], ["q"] * 2, ["a"] * 2, [[1]] * 2, [True] * 2, {}) == [
        [1.5, None]
    ]


def test_none_adds_nothing_to_a_sum_and_to_no_deviation():
    def source(*rewards, mean=0.0):
        return RewardSource(lambda **_: list(rewards), mean=mean)

    sources = [source(1.0, None, None, [1.0]), source(3.0, 4.0, None, None), source(None, 8.0, None, None)]
    both = combine_rewards(sources, weights=[1.0, 1.0, 0.5], uncertainty_penalty=1.0)
    batch = (["q"] * 4, ["a"] * 4, [[1]] * 4, [True] * 4, {})
    [rewards] = call_reward_functions([both.score], *batch)
    # 1 + 3 less the deviation of 1 and 3; 4 + 0.5 · 8 less that of 4 and 8; nothing; 1 less that of one
    assert rewards == [3.0, 6.0, None, [1.0]]


def test_what_trl_passes_by_name_goes_to_functions_that_name_it():
    seen = {}

    def curriculum(prompts, trainer_state, log_metric, log_extra=None, **kwargs):
        log_metric("seen", 1.0)
        seen.update(state=trainer_state, others=kwargs.keys())
        return [0.0] * len(prompts)

    metrics = {}
    named = {"trainer_state": "state", "log_metric": metrics.__setitem__}
    call(curriculum, answer=["x", "y"], **named)
    assert seen == {"state": "state", "others": {"completions", "completion_ids", "ended", "answer"}}
    assert metrics == {"seen": 1.0}
    call(combine_rewards([RewardSource(curriculum)] * 2).score, **named)
    assert seen["state"] == "state"

    call(curriculum, answer=["x", "y"])  # no trainer: nothing is logged
    assert seen["state"] is None
    call(lambda **kwargs: [float(len(kwargs))] * 2, **named)
    assert call(lambda **kwargs: [float(len(kwargs))] * 2, **named) == [4.0, 4.0]


def test_an_error_of_a_reward_of_a_config_begins_with_its_key_and_source():
    def broken(**_):
        raise UserError("http://gpu7:8000: no response: no route to host")

    broken.__module__ = "pipeline.reward.functions"
    label = "reward[1] (http://gpu7:8000)"
    sources = [RewardSource(Judge()), RewardSource(name_reward(broken, label))]
    expected = r"^reward\[1\] \(http://gpu7:8000\): no response: no route to host$"
    with pytest.raises(UserError, match=expected):
        call(combine_rewards(sources).score)
    with pytest.raises(UserError, match=r"^gold \(m:f\): the reward returned 1 scores for 2 responses"):
        call(name_reward(lambda **_: [1.0], "gold (m:f)"))


def test_a_package_that_a_function_lacks_is_named_with_its_command(monkeypatch):
    def score(**_):
        import math_verify  # noqa: F401

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"score: .*math_verify.*; run pip install 'rlhf-stage\[math\]'$"):
        call(score)
