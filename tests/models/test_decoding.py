"""What a batch computes follows its real tokens, and its samples do not depend on who shares it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList

from pipeline.models import decoding, generation
from pipeline.models.decoding import Limits, Sampling, decode
from pipeline.models.generation import MinimumLength, generate, uniforms
from pipeline.models.probes import describe_sampling
from tests.models.test_probes import Words, make

STEPS = 8
HYBRID = {"num_key_value_heads": 2, "num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
POLICIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "jamba": {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba": {"state_size": 8},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
}


def make_policy(name: str) -> Any:
    """A policy in float64, so that the shape of a batch does not show in its samples."""
    if name != "lora":
        return make(name, **POLICIES[name]).double()
    policy = get_peft_model(make("gpt2"), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy.double().eval()


@contextmanager
def count_rows(policy: Any) -> Iterator[list[int]]:
    """Yield a list that receives the number of rows of each forward."""
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    rows: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield rows
    hook.remove()


def sample(policy: Any, prompts: list[list[int]], ends: list[int], **options: Any) -> Any:
    """Sample responses of these numbers of tokens, if none ends earlier: a number of 0 is the end token."""
    numbers = uniforms(0, 0, range(len(prompts)), STEPS).clamp_min(0.02)
    for row, end in enumerate(ends):
        numbers[row, end - 1 :] = 0.0
    return generate(policy, Words(), prompts, numbers, **options)  # type: ignore[arg-type]


class _Scripted(LogitsProcessor):
    """Generate token 7, and the end token 0 as the last of `left` tokens."""

    def __init__(self, left: list[int]):
        self.left = left

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        for row, left in enumerate(self.left):
            forced[row, 0 if left == 1 else 7] = 0.0
        self.left = [left - 1 for left in self.left]
        return forced


def decode_lengths(lengths: list[int], batch_size: int, way: Sampling) -> tuple[list[int], list[list[int]]]:
    """Return the rows of each forward of GPT-2, and the responses, of which each has its number of tokens."""
    policy = make("gpt2")

    def processors(rows: list[int], steps: list[int]) -> LogitsProcessorList:
        left = [lengths[row] - step for row, step in zip(rows, steps, strict=True)]
        return LogitsProcessorList([_Scripted(left)])

    prompts, limits = [[40]] * len(lengths), Limits(max(lengths), [0])
    with count_rows(policy) as rows:
        responses = decode(
            policy, prompts, processors, limits, pad_token_id=1, batch_size=batch_size, way=way
        )
    return rows, responses


@pytest.mark.parametrize(
    ("lengths", "batch_size", "rows"),
    [
        ([1, 2, 3, 4], 4, [4, 3, 2, 1]),  # 10 tokens
        ([5, 5, 5, 5], 4, [4, 4, 4, 4, 4]),
        # Two of eight rows are a quarter, and so are two of six.
        ([1, 2, 2, 4, 4, 5, 5, 5], 8, [8, 8, 5, 5, 3]),
        # A row that joins is alone at its first token: rows 2 and 3 replace 0, and row 1 has ended.
        ([1, 3, 2, 1], 2, [2, 1, 2, 1, 1]),
    ],
)
def test_rows_that_have_ended_are_not_computed(lengths: list[int], batch_size: int, rows: list[int]) -> None:
    computed, responses = decode_lengths(lengths, batch_size, Sampling())
    assert computed == rows
    assert responses == [[7] * (length - 1) + [0] for length in lengths]


def test_a_batch_whose_rows_cannot_leave_runs_to_its_last_end() -> None:
    computed, responses = decode_lengths([1, 3, 2, 1], 2, Sampling(compact=False))
    assert computed == [2, 2, 2, 2, 2]
    assert list(map(len, responses)) == [1, 3, 2, 1]


@pytest.mark.parametrize("name", [*POLICIES, "lora"])
def test_rows_that_leave_and_join_change_no_sample(name: str) -> None:
    """The oracle is the same sampler with whole batches of one size, and its tests are naive loops."""
    policy = make_policy(name)
    way = describe_sampling(policy)
    assert way.compact == (name != "mamba")
    row = st.tuples(st.integers(1, 9), st.integers(1, STEPS + 1))

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        st.lists(row, min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 4), st.sampled_from([0, 5])
    )
    def check(shape: list[tuple[int, int]], batch_size: int, minimum: int, top_k: int) -> None:
        prompts = [[40 + 3 * i + j for j in range(length)] for i, (length, _) in enumerate(shape)]
        ends = [end for _, end in shape]
        options = {"min_response_tokens": minimum, "top_k": top_k, "temperature": 0.9}
        with count_rows(policy) as rows:
            compact = sample(policy, prompts, ends, batch_size=batch_size, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generation, "describe_sampling", lambda *_: way._replace(compact=False))
            whole = sample(policy, prompts, ends, batch_size=9, **options)
        tokens = compact.token_lists()
        assert tokens == whole.token_lists()
        assert max(rows) <= batch_size
        assert all(len(ids) >= minimum for ids in tokens)
        if way.compact:
            assert sum(rows) <= 4 / 3 * sum(map(len, tokens))

    check()


def test_prompts_of_one_length_share_a_group() -> None:
    lengths = [3, 1, 3, 2, 3]
    assert decoding._groups(lengths, padding=False) == [[1], [3], [0, 2, 4]]
    assert decoding._groups(lengths, padding=True) == [[1, 3, 0, 2, 4]]


def test_each_row_has_its_own_shortest_length() -> None:
    """Tokens 0 and 2 end a response; ids above the vocabulary do nothing."""
    processor = MinimumLength([0, 2, 9], torch.tensor([1, 0, 2]))
    scores = torch.zeros(3, 4)
    ids = torch.zeros(3, 1).long()
    barred = [processor(ids, scores)[:, [0, 2]].isinf().all(1).tolist() for _ in range(3)]
    assert barred == [[True, False, True], [False, False, True], [False, False, False]]
    assert not processor(ids, scores)[:, [1, 3]].isinf().any()
