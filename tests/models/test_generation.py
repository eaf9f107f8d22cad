"""Samples follow the policy's own distribution and do not depend on the batch."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Scratch
from pipeline.errors import UserError
from pipeline.models.chat import EOS, PAD
from pipeline.models.ends import declare_ends, declared_ends, end_token_ids
from pipeline.models.generation import (
    InverseCDF,
    generate,
    permutation,
    sample_responses,
    uniforms,
    unknown_ids,
)
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.models.prompts import fit_prompts, prepare_prompts, truncation_side
from pipeline.models.scratch import new_policy
from tests.models.manners import make_tokenizer, save_llama

STEPS, TEMPERATURE = 10, 0.8
LENGTHS = (5, 1, 9, 3, 5, 2)
SIZE = Scratch(layers=2, width=32, heads=4, vocabulary=260, positions=32)


def make(name: str) -> tuple[Any, Any]:
    """A random model whose next token depends on all it has read, and a tokenizer whose EOS is token 0: a
    uniform number of 0 samples it.
    """
    torch.manual_seed(0)
    model, tokenizer = new_policy(["the cat sat"], SIZE, "\n")
    tokenizer.pad_token, tokenizer.eos_token = EOS, PAD
    assert tokenizer.eos_token_id == 0 != tokenizer.pad_token_id
    if name == "llama":
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return make(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(2, 258, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def uniform_rows() -> Tensor:
    uniform = uniforms(0, 0, range(len(LENGTHS)), STEPS).clamp_min(0.05)
    uniform[0, 3] = uniform[1, 0] = uniform[2, STEPS - 1] = 0.0  # where these three end, if not before
    return uniform


@torch.no_grad()
def naive_answer(model: Any, prompt: list[int], uniform: Tensor) -> list[int]:
    """One row, no padding, no cache: the token at which the running sum of probabilities passes the uniform
    number, up to EOS 0.
    """
    answer: list[int] = []
    for u in uniform.tolist():
        probabilities = (
            (model(torch.tensor([prompt + answer])).logits[0, -1].double() / TEMPERATURE).softmax(-1).tolist()
        )
        answer.append(next(i for i, total in enumerate(itertools.accumulate(probabilities)) if total > u))
        if answer[-1] == 0:
            break
    return answer


# Uniforms


@pytest.mark.parametrize("logits", [[0.2, 0.5, 0.3], [0.4, 1.0, 0.6]])
def test_inverse_cdf_has_the_distributions_own_thresholds(logits: list[float]) -> None:
    """Of p = (0.2, 0.5, 0.3): each token owns an interval as long as its probability, so uniform numbers
    sample it that often.
    """
    uniform = [0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-24]
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    column = torch.tensor([*uniform, *grid])[:, None]
    out = InverseCDF(column)(
        torch.zeros(len(column), 1).long(), torch.tensor(logits).log().expand(len(column), 3)
    )
    assert (out == 0).sum(1).eq(1).all()
    assert out.isinf().sum(1).eq(2).all()
    tokens = out.argmax(1)
    assert tokens[:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert tokens[6:].bincount().tolist() == [200, 500, 300]


def test_inverse_cdf_heeds_steps_and_impossible_tokens() -> None:
    scores = torch.tensor([[0.3, 0.7, 0.0, 0.0]]).log()
    sampler = InverseCDF(torch.tensor([[0.299, 0.301, 1 - 2**-24]]))
    assert [int(sampler(torch.zeros(1, 1).long(), scores).argmax()) for _ in range(3)] == [0, 1, 1]
    blocked = torch.tensor([[-torch.inf, 0.0]])
    assert int(InverseCDF(torch.zeros(1, 1))(torch.zeros(1, 1).long(), blocked).argmax()) == 1


def test_uniforms_depend_on_their_row_alone() -> None:
    state = torch.get_rng_state()
    together = uniforms(3, 7, range(5), 40)
    assert torch.equal(uniforms(3, 7, [4, 2], 40), together[[4, 2]])
    assert torch.equal(torch.get_rng_state(), state)
    assert together.shape == (5, 40)
    assert together.ge(0).all()
    assert together.lt(1).all()
    others = [uniforms(4, 7, range(5), 40), uniforms(3, 8, range(5), 40), together.roll(1, 0)]
    assert not any((together == other).all(1).any() for other in others)


def test_permutations_depend_on_their_key_alone() -> None:
    found = permutation(50, 0, "prompts", 1)
    torch.manual_seed(123)
    assert permutation(50, 0, "prompts", 1) == found != list(range(50))
    assert sorted(found) == list(range(50))
    assert (
        len(
            {
                tuple(permutation(50, *key))
                for key in ((0, "prompts", 1), (0, "prompts", 2), (1, "prompts", 1), (0, "other", 1))
            }
        )
        == 4
    )


# Generation


def test_answers_are_the_naive_ones_in_any_batch(
    pair: Any, prompts: list[list[int]], uniform_rows: Tensor
) -> None:
    model, tokenizer = pair
    batched = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE)
    naive = [
        naive_answer(model, prompt, uniform) for prompt, uniform in zip(prompts, uniform_rows, strict=True)
    ]
    assert batched.token_lists() == naive
    alone = [
        generate(model, tokenizer, [prompt], uniform_rows[i : i + 1], TEMPERATURE)
        for i, prompt in enumerate(prompts)
    ]
    assert [answers.token_lists()[0] for answers in alone] == naive
    assert [answers.texts[0] for answers in alone] == batched.texts

    assert batched.ended == [answer[-1] == 0 for answer in naive]
    assert {True, False} == set(batched.ended)
    assert all(0 not in answer[:-1] for answer in naive)
    assert naive[1] == [0]
    assert batched.texts == [
        tokenizer.decode([token for token in answer if token], skip_special_tokens=True) for answer in naive
    ]
    width = max(map(len, naive))
    for found, rows, side in ((batched.query_mask, prompts, 0), (batched.response_mask, naive, 1)):
        ones = [[1] * len(row) for row in rows]
        assert found.tolist() == [
            one + [0] * (width - len(one)) if side else [0] * (max(LENGTHS) - len(one)) + one for one in ones
        ]
    assert batched.response_ids[batched.response_mask == 0].eq(tokenizer.pad_token_id).all()
    assert batched.query_ids[batched.query_mask == 0].eq(tokenizer.pad_token_id).all()


def test_the_policys_mode_is_put_back(pair: Any, prompts: list[list[int]], uniform_rows: Tensor) -> None:
    model, tokenizer = pair
    for training in (True, False):
        model.train(training)
        generate(model, tokenizer, prompts, uniform_rows[:, :1], TEMPERATURE)
        assert model.training is training


@pytest.mark.parametrize(
    "published",
    [{"repetition_penalty": 3.0}, {"min_new_tokens": 8}, {"suppress_tokens": list(range(2, 200))}],
)
def test_a_checkpoints_generation_config_does_not_bend_the_distribution(
    prompts: Any, uniform_rows: Tensor, published: dict[str, Any]
) -> None:
    """Samples must follow the distribution of `response_logprobs`; Qwen2, for one, is published with a
    repetition penalty.
    """
    model, tokenizer = make("gpt2")
    expected = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE).token_lists()
    model.generation_config.update(**published)
    assert generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE).token_lists() == expected


def test_limits_bound_what_is_sampled(prompts: Any, uniform_rows: Tensor) -> None:
    model, tokenizer = make("gpt2")
    free = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE)
    most_likely = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE, top_k=1)
    with torch.no_grad():
        for prompt, answer in zip(prompts, most_likely.token_lists(), strict=True):
            for step, token in enumerate(answer):
                assert int(model(torch.tensor([prompt + answer[:step]])).logits[0, -1].argmax()) == token
    assert (
        generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE, top_p=1e-6).token_lists()
        == most_likely.token_lists()
    )
    long = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE, min_response_tokens=STEPS)
    assert {len(ids) for ids in free.token_lists()} > {len(ids) for ids in long.token_lists()} == {STEPS}


def test_a_stop_token_ends_an_answer(prompts: Any, uniform_rows: Tensor) -> None:
    model, tokenizer = make("gpt2")
    free = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE).token_lists()
    stop = free[3][2]
    cut = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE, stop_token=tokenizer.decode([stop]))
    expected = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in free]
    assert cut.token_lists() == expected
    assert cut.ended == [ids[-1] in (0, stop) for ids in expected]
    assert len(cut.texts[3]) == len(tokenizer.decode(expected[3][:-1]))
    with pytest.raises(
        UserError, match=r"stop_token='the cat' is \d+ tokens of this tokenizer; expected one"
    ):
        generate(model, tokenizer, prompts, uniform_rows, stop_token="the cat")


@pytest.mark.parametrize(
    ("family", "declared", "expected"),
    [
        ("qwen", None, ["<|im_end|>"]),
        ("qwen-base", None, ["<|endoftext|>", "<|im_end|>"]),  # the template closes turns with another token
        ("phi3", ["<|endoftext|>", "<|end|>"], ["<|endoftext|>", "<|end|>"]),
        ("gemma", ["<eos>", "<end_of_turn>", "."], ["<eos>", "<end_of_turn>", "."]),
        ("llama2", None, ["</s>"]),
    ],
)
def test_every_end_token_counts(tmp_path: Path, family: str, declared: Any, expected: list[str]) -> None:
    ids = make_tokenizer(family).convert_tokens_to_ids(declared or [])
    source = str(save_llama(tmp_path, family, **({"eos_token_id": ids} if declared else {})))
    tokenizer = load_tokenizer(source)
    policy = load_policy(source, tokenizer)
    ends = end_token_ids(policy, tokenizer, stop_token="Q")
    assert tokenizer.convert_ids_to_tokens(ends) == [*expected, "Q"]

    declare_ends(policy, ends)
    policy.save_pretrained(tmp_path / "again")
    assert declared_ends(str(tmp_path / "again")) == ends
    policy.lm_head = torch.nn.Linear(32, len(tokenizer))
    policy.lm_head.weight.data[:] = 0.0
    for end in (*ends, 9):  # the policy always chooses this token
        policy.lm_head.bias.data = torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)) * 1e4
        found = generate(policy, tokenizer, [[5, 6]], torch.full((1, 4), 0.5), ends=[9])
        assert (found.token_lists(), found.ended, found.texts) == ([[end]], [True], [""])


def test_prompts_over_the_limit_are_counted_cut_or_dropped(tmp_path: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer(str(save_llama(tmp_path, "llama2")))
    rows = Dataset.from_list([{"prompt": "ab"}, {"prompt": "abcdefgh"}])
    assert fit_prompts(tokenizer, rows, 20, "drop", "prompts") is rows
    assert capsys.readouterr().out == ""
    assert fit_prompts(tokenizer, rows, 6, "truncate_left", "prompts") is rows
    assert fit_prompts(tokenizer, rows, 6, "drop", "prompts")["prompt"][:] == ["ab"]
    assert capsys.readouterr().out.splitlines() == [
        "  prompts: over 6 tokens (overlong: truncate_left): 1 of 2",
        "  prompts: over 6 tokens (overlong: drop): 1 of 2",
    ]
    with pytest.raises(UserError, match="prompts: none has at most 2 tokens; raise max_prompt_tokens"):
        fit_prompts(tokenizer, rows, 2, "drop", "prompts")
    cut = [
        prepare_prompts(tokenizer, ["abcdefgh"], 6, truncation_side(overlong))[0]
        for overlong in ("truncate_left", "truncate_right")
    ]
    assert [tokenizer.decode(ids) for ids in cut] == ["<s>efgh\n", "<s>abcde"]


def test_small_batches_sample_what_large_ones_do(
    pair: Any, prompts: list[list[int]], uniform_rows: Tensor
) -> None:
    model, tokenizer = pair
    whole = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE)
    apart = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE, batch_size=2)
    assert apart.token_lists() == whole.token_lists()
    assert torch.equal(apart.query_mask, whole.query_mask)


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled(prompts: Any, uniform_rows: Tensor) -> None:
    """The rows of some published models are padded to a multiple of 64."""
    model, tokenizer = make("gpt2")
    expected = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE).token_lists()
    model.resize_token_embeddings(len(tokenizer) + 30)
    assert unknown_ids(model, tokenizer) == list(range(len(tokenizer), len(tokenizer) + 30))
    padded = generate(model, tokenizer, prompts, uniform_rows, TEMPERATURE).token_lists()
    assert max(map(max, padded)) < len(tokenizer)
    assert padded == expected


def test_a_prompt_and_its_response_must_fit_the_positions(prompts: Any, uniform_rows: Tensor) -> None:
    model, tokenizer = make("gpt2")
    long = [list(range(2, 25))]  # 23 tokens; the model has 32 positions
    generate(model, tokenizer, long, uniform_rows[:1, :9])
    with pytest.raises(UserError, match="reads at most 32 tokens, but a prompt with its response has 33"):
        generate(model, tokenizer, long, uniform_rows[:1, :10])


@pytest.mark.parametrize(
    ("ids", "numbers", "message"),
    [
        (None, torch.rand(1, 4), "prompts: expected a list of prompts, each a list of token ids"),
        ([], torch.rand(0, 4), "prompts: expected a list of prompts"),
        ("ab", torch.rand(2, 4), "prompts: expected a list of prompts"),
        ([[5], []], torch.rand(2, 4), "prompts: .* none of them empty"),
        ([[5]], torch.rand(2, 4), r"uniforms: expected a tensor of \(1, response tokens\)"),
        ([[5]], None, "uniforms: expected a tensor"),
    ],
)
def test_what_cannot_be_generated_from_is_named(ids, numbers, message, pair):
    with pytest.raises(UserError, match=message):
        generate(*pair, ids, numbers)


def test_no_prompts_have_no_responses_and_a_text_is_no_list(pair):
    options = {"seed": 0, "temperature": 1.0, "response_tokens": 4, "max_prompt_tokens": 8, "batch_size": 2}
    assert list(sample_responses(*pair, [], [], **options)) == []
    for prompts, rows, message in (
        ("ab", [0, 1], "prompts: expected a list of texts"),
        ([None], [0], r"prompts\[0\]: expected a string"),
        (["a"], [], "rows: 0 numbers for 1 prompts"),
    ):
        with pytest.raises(UserError, match=message):
            next(sample_responses(*pair, prompts, rows, **options))
