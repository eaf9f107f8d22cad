"""The world of sums: what is right, what each reward gives on any text, and what the data hold."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline import StepRewards
from pipeline.config import PrepareStage, Source
from pipeline.errors import UserError
from pipeline.prepare import sums
from pipeline.prepare.stage import run

PROMPT = "7+5-3*8="  # 2, 9, 2
RIGHT = "7+5=2 2-3=9 9*8=2"
CHAINS = st.builds(
    lambda digit, operations: digit + "".join(operations) + "=",
    st.sampled_from("0123456789"),
    st.lists(
        st.builds("".join, st.tuples(st.sampled_from("+-*"), st.sampled_from("0123456789"))), min_size=1
    ),
)
NEAR_STEPS = st.lists(st.text("0123456789+-*= ٣", max_size=12)).map(" ".join) | st.text()


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    """The records of a world, by kind."""
    by_kind: dict[str, list[dict]] = {}
    for kind, record in sums.rows(Source(format="sums"), seed=3):
        by_kind.setdefault(kind, []).append(record)
    return by_kind


def test_a_prompt_is_worked_out_from_left_to_right_modulo_ten() -> None:
    assert sums.answer(PROMPT) == "2"
    assert sums.answer("0-1=") == "9"
    assert sums.answer("1+2*3=") == "9"  # not 7


@given(CHAINS)
def test_the_answer_is_that_of_python(prompt: str) -> None:
    value = prompt[0]
    for start in range(1, len(prompt) - 1, 2):
        value = str(eval(value + prompt[start : start + 2]) % 10)
    assert sums.answer(prompt) == value


@pytest.mark.parametrize(
    ("response", "labels", "share", "is_right"),
    [
        (RIGHT, [True, True, True], 1.0, 1.0),
        ("7+5=3 3-3=0 0*8=0", [False, True, True], 2 / 3, 0.0),  # carries on a wrong result rightly
        ("7+5=3 2-3=9 9*8=2", [False, False, True], 1 / 3, 1.0),  # does not carry it on, and is lucky
        ("7+5=2 2-4=8 8*8=4", [True, False, True], 2 / 3, 0.0),  # misreads an operand
        ("7+5=2 2+3=5 5*8=0", [True, False, True], 2 / 3, 0.0),  # misreads an operator
        ("7+5=2 9*8=2", [True, False], 1 / 3, 0.0),  # skips
        ("7+5=2 7+5=2 2-3=9 9*8=2", [True, False, False, False], 1 / 4, 0.0),  # copies
        (RIGHT + " 2+0=2", [True, True, True, False], 3 / 4, 0.0),  # goes on
        ("7+5= 2-3=9 9*8=2", [False, False, True], 1 / 3, 1.0),  # carries nothing
        ("7+5=2  2-3=9 9*8=2 ", [True, True, True], 1.0, 1.0),  # spaces alone separate
        ("7+5=2\n2-3=9\n9*8=2", [False], 0.0, 0.0),
        ("7+5=2,2-3=9,9*8=2", [False], 0.0, 0.0),
        ("٧+5=2 2-3=9 9*8=٢", [False, True, False], 1 / 3, 0.0),  # other digits
        ("", [], 0.0, 0.0),
        ("   ", [], 0.0, 0.0),
        ("2", [False], 0.0, 0.0),
    ],
)
def test_steps_and_the_final_answer(response: str, labels: list[bool], share: float, is_right: float) -> None:
    assert sums.label_steps(PROMPT, sums.split_steps(response)) == labels
    assert sums.right_steps([PROMPT], [response]) == [share]
    assert sums.right_answer([PROMPT], [response]) == [is_right]


def test_step_rewards_are_at_the_ends_of_the_steps() -> None:
    responses = [RIGHT, "7+5=3  3-3=0", RIGHT + " 2+0=2", " "]
    assert sums.step_rewards([PROMPT] * 4, responses) == [
        StepRewards([1.0, 1.0, 1.0], [5, 11, 17]),
        StepRewards([-1.0, 0.0], [5, 12]),  # the missing step costs 1 on the last one
        StepRewards([1.0, 1.0, 1.0, -1.0], [5, 11, 17, 23]),
        -3.0,
    ]


@given(CHAINS, NEAR_STEPS)
def test_every_text_has_a_reward(prompt: str, response: str) -> None:
    needed = len(prompt) // 2 - 1
    steps = response.split(" ")
    [share], [is_right] = (reward([prompt], [response]) for reward in (sums.right_steps, sums.right_answer))
    assert 0 <= share <= 1
    assert is_right in (0.0, 1.0)
    assert share < 1 or is_right  # if every step is right, so is the answer

    [entry] = sums.step_rewards([prompt], [response])
    rewards, ends = entry if isinstance(entry, StepRewards) else ([entry], [])
    assert -max(needed, len(steps)) <= sum(rewards) <= needed
    assert [response[:end].split(" ")[-1] for end in ends] == [step for step in steps if step]


@given(CHAINS, st.text("0123456789+-*= ", min_size=1).filter(lambda text: text.strip(" ")))
def test_steps_that_a_prompt_does_not_need_never_pay(prompt: str, more: str) -> None:
    digit, operations = sums.parse_prompt(prompt)
    whole = []
    for operation in operations:
        whole.append(f"{digit}{operation}={sums.compute(digit, operation)}")
        digit = whole[-1][-1]
    longer = [" ".join([*whole, more])]
    assert sums.right_answer([prompt], longer) == [0.0]
    assert sums.right_steps([prompt], longer)[0] < 1
    assert sum(sums.step_rewards([prompt], longer)[0].rewards) < len(whole)


def test_a_huge_text_has_a_reward() -> None:
    text = RIGHT + " 2+0=2" * 200_000
    assert sums.right_answer([PROMPT], [text]) == [0.0]
    assert sums.right_steps([PROMPT], [text]) == [3 / 200_003]
    assert sum(sums.step_rewards([PROMPT], [text])[0].rewards) == 3 - 200_000


def test_messages_are_read_as_texts_are() -> None:
    prompt = [{"role": "user", "content": PROMPT}]
    completion = [{"role": "assistant", "content": RIGHT}]
    assert sums.right_answer([prompt], [completion]) == [1.0]


@pytest.mark.parametrize("prompt", ["", "7=", "7+5", "7+5=\n", "7/5=", "17+5=", "٧+5=", "Where is it?"])
def test_the_rewards_know_no_other_prompt(prompt: str) -> None:
    for reward in (sums.right_answer, sums.right_steps, sums.step_rewards):
        with pytest.raises(UserError, match=r"is no chain of sums such as '7\+5-3='"):
            reward([prompt], [RIGHT])


def test_the_writer_errs_and_the_labellers_flip_at_known_rates(records: dict[str, list[dict]]) -> None:
    counts = {kind: len(records_of_kind) for kind, records_of_kind in records.items()}
    assert counts == {"demonstrations": 6000, "comparisons": 3000, "steps": 6000, "prompts": 3000}
    assert len({record["prompt"] for record in records["prompts"]}) == 3000
    assert all(record["answer"] == sums.answer(record["prompt"]) for record in records["prompts"])

    mistakes = sums.sample_mistakes(random.Random(3))
    assert len(mistakes) == 8
    results: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    off_by: Counter[int] = Counter()
    for record in records["demonstrations"]:
        for step in record["completion"].split(" "):
            fact, result = step.split("=")
            if result == sums.compute(fact[0], fact[1:]):
                kind = "right"
            else:
                kind = "mistaken" if result == mistakes.get(fact) else "slip"
            results[fact in mistakes][kind] += 1
            off_by[(int(result) - int(sums.compute(fact[0], fact[1:]))) % 10] += 1
    assert results[True].total() + results[False].total() == 48_000
    assert results[False]["slip"] / results[False].total() == pytest.approx(0.3, abs=0.01)
    assert results[True]["mistaken"] / results[True].total() == pytest.approx(0.7, abs=0.03)
    assert results[True]["slip"] == 0
    assert off_by.keys() == {0, 1, 9}
    assert off_by[1] / off_by[9] == pytest.approx(1.0, abs=0.1)

    flipped = Counter(
        label != truth
        for record in records["steps"]
        for label, truth in zip(
            record["labels"], sums.label_steps(record["prompt"], record["completions"]), strict=True
        )
    )
    assert flipped[True] / flipped.total() == pytest.approx(sums.LABEL_FLIP_RATE, abs=0.01)
    assert {len(record["completions"]) for record in records["steps"]} == {7, 8, 9}


def test_a_labeller_prefers_right_steps_most_of_the_time(records: dict[str, list[dict]]) -> None:
    orders: Counter[tuple[bool, ...]] = Counter()
    for record in records["comparisons"]:
        shares = sums.right_steps([record["prompt"]] * 2, [record["chosen"], record["rejected"]])
        orders[tuple(share == 1 for share in shares)] += 1
    assert orders.keys() == {(True, False), (False, True)}
    assert orders[(False, True)] / orders.total() == pytest.approx(sums.LABEL_FLIP_RATE, abs=0.015)


def test_no_expression_is_in_two_splits(tmp_path: Path) -> None:
    source = [{"format": "sums", "limit": 300}]  # 50 prompts
    published = run(PrepareStage(run="test", runs=str(tmp_path), source=source))
    prompts = load_from_disk(str(published / "prompts"))
    assert {split: len(part) for split, part in prompts.items()} == {"train": 40, "validation": 5, "test": 5}
    assert prompts.column_names["test"] == ["prompt", "answer"]
    for kind in ("demonstrations", "comparisons", "steps", "prompts"):
        data = load_from_disk(str(published / kind))
        for split, part in data.items():
            assert set(part["prompt"]) <= set(prompts[split]["prompt"])


def test_prompts_are_distinct_and_of_one_length() -> None:
    for operations in (2, 8):
        prompts = sums.sample_prompts(random.Random(0), 500, operations)
        assert len(set(prompts)) == 500
        assert {len(prompt) for prompt in prompts} == {2 + 2 * operations}


def test_the_answer_key_compares_what_a_response_ends_in_with_its_record() -> None:
    responses = ["7+5=2", "7+5=3", "2", "7+5=2 ", ""]
    rewards = sums.answer_key(["7+5="] * 5, responses, answer=["2"] * 5)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0]
    messages = [[{"role": "assistant", "content": "7+5=2"}]]
    assert sums.answer_key([[{"role": "user", "content": "7+5="}]], messages, answer=["2"]) == [1.0]


def test_the_source_says_how_long_the_chains_are() -> None:
    records = sums.rows(Source(format="sums", operations=2), seed=0)
    assert {len(record["prompt"]) for _, record in itertools.islice(records, 100)} == {6}
    assert "operations" not in Source(format="sums").model_dump()  # as artifacts have it that are older
    with pytest.raises(ValidationError, match="'operations' is not read with format 'demo'"):
        Source(format="demo", operations=2)
