"""Rewards inside the response: how a response is cut, and what the report shows of each part."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.report import write_report
from pipeline.evaluate.strips import (
    EVEN_PARTS,
    MAX_PARTS,
    MAX_STRIPS,
    MAX_TEXT,
    Part,
    cut_parts,
    draw_strips,
    last_evaluation,
)

NAN = float("nan")
TOKENS = ["7+", "5=", "2", " 2-", "3=", "9", ""]
STEPS = {
    "step": 8,
    "prompt": "7+5-3=",
    "reward": 0.5,
    "gold_reward": 1.0,
    "tokens": TOKENS,
    "token_rewards": [0.0, 0.0, 1.0, 0.0, 0.0, -0.5, 0.0],
    "token_values": [0.75, 0.5, 0.25, -0.25, 0.0, 0.0, 0.1],
}


def test_a_response_is_cut_after_each_token_with_a_reward() -> None:
    parts = cut_parts(TOKENS, STEPS["token_rewards"], STEPS["token_values"])
    assert parts == [Part("7+5=2", 1.0, 0.75), Part(" 2-3=9", -0.5, -0.25)]  # values of the first states


def test_a_text_after_the_last_reward_is_a_part_and_a_rewarded_end_token_too() -> None:
    assert cut_parts(["a", "b", "c", "d"], [1.0, 2.0, 0.0, 0.0]) == [
        Part("a", 1.0, None),
        Part("b", 2.0, None),
        Part("cd", 0.0, None),
    ]
    assert cut_parts(["a", "b", ""], [1.0, 0.0, 3.0])[-1] == Part("b", 3.0, None)
    assert cut_parts(["a", "b", ""], [1.0, 1.0, 3.0])[-1] == Part("", 3.0, None)


def test_a_response_with_a_reward_at_its_end_is_cut_at_words() -> None:
    tokens = [f"{' ' if i else ''}{word}" for i, word in enumerate(["one"] * 30)]
    parts = cut_parts([*tokens, ""], [0.0] * 30 + [2.5], list(range(31)))
    assert [part.text for part in parts] == ["one one one"] + [" one one one"] * 9
    assert [part.value for part in parts] == list(range(0, 30, 3))
    assert [part.reward for part in parts] == [0.0] * 9 + [2.5]
    whole = cut_parts(list("7+5=2 2-3=9 9+8=7"), [0.0] * 16 + [1.0])
    assert [part.text for part in whole] == ["7+5=2", " 2-3=9", " 9+8=7"]
    assert len(cut_parts(["字"] * 100, [0.0] * 99 + [1.0])) == 4  # no blanks: three times as long


def test_a_number_that_is_missing_or_not_finite_is_none() -> None:
    assert cut_parts(["a", "b", "c"], [None, NAN, 1.0], [NAN, None, 1e308]) == [
        Part("a", None, None),
        Part("b", None, None),
        Part("c", 1.0, 1e308),
    ]
    assert cut_parts(["a"], [1.0], [1.0, 2.0]) == [Part("a", 1.0, None)]  # values of other tokens


@given(
    st.lists(st.tuples(st.text(max_size=3), st.sampled_from([0.0, 0.0, 1.0, -2.0])), min_size=1, max_size=200)
)
def test_parts_join_to_the_response_and_keep_its_reward(rows: list[tuple[str, float]]) -> None:
    tokens, rewards = (list(column) for column in zip(*rows, strict=True))
    parts = cut_parts(tokens, rewards)
    assert "".join(part.text for part in parts) == "".join(tokens)
    assert sum(part.reward or 0 for part in parts) == sum(rewards)
    inside = sum(reward != 0 for reward in rewards) > 1
    assert len(parts) <= (MAX_PARTS if inside else EVEN_PARTS + 1)


def test_the_last_evaluation_is_shown_and_rows_of_other_algorithms_are_not() -> None:
    plain = {"step": 9, "prompt": "a", "answer": "b", "reward": 1.0}
    uneven = STEPS | {"token_rewards": [1.0]}
    rows = [STEPS | {"step": 4}, STEPS, uneven, *[STEPS | {"prompt": str(i)} for i in range(20)], plain]
    assert [row["prompt"] for row in last_evaluation(rows)] == ["7+5-3=", *map(str, range(MAX_STRIPS - 1))]
    assert {row["step"] for row in last_evaluation(rows)} == {8}
    assert last_evaluation([plain, uneven]) == []
    assert draw_strips([]) == {}


def test_rewards_and_values_have_one_scale_over_all_responses() -> None:
    other = STEPS | {"token_rewards": [0.0] * 6 + [-2.0], "token_values": [-0.25] * 7}
    drawn = draw_strips([STEPS, other])
    assert (drawn["most"], drawn["value_range"], drawn["zero"]) == (2.0, (-0.25, 0.75), 25.0)
    first, second = drawn["responses"][0]["parts"]
    assert (first["sign"], first["share"], first["bottom"], first["height"]) == ("plus", 0.5, 25.0, 75.0)
    assert (second["sign"], second["share"], second["bottom"], second["height"]) == ("minus", 0.25, 0.0, 25.0)
    assert [part["sign"] for part in drawn["responses"][1]["parts"]] == ["none", "minus"]


def render(folder: Path, rows: list[dict[str, Any]]) -> str:
    write_report(folder / "report.html", {"strips": rows})
    return (folder / "report.html").read_text(encoding="utf-8")


def cells(page: str) -> list[str]:
    """The text of each part as a screen reader reads it, with its title."""
    found = re.findall(r'<li title="([^"]*)">(.*?)</li>', page, re.DOTALL)
    texts = [(title, re.sub(r"<[^>]*>", " ", body)) for title, body in found]
    return [unescape(f"{title}| {' '.join(text.split())}") for title, text in texts]


def test_each_part_has_its_numbers_as_text(tmp_path: Path) -> None:
    page = render(tmp_path, [STEPS])
    assert cells(page) == [
        "part 1: reward +1, value 0.75| 7+5=2 reward +1 value 0.75",
        "part 2: reward -0.5, value -0.25| 2-3=9 reward -0.5 value -0.25",
    ]
    assert 'class="part plus" style="--share: 1.0"' in page
    assert 'class="part minus" style="--share: 0.5"' in page
    assert "at step 8." in page
    assert "reward <b>+0.5</b> · gold <b>+1</b>" in page


def test_without_values_the_critic_is_left_out(tmp_path: Path) -> None:
    row = {name: value for name, value in STEPS.items() if name not in ("token_values", "gold_reward")}
    page = render(tmp_path, [row | {"token_rewards": [None] + [0.0] * 5 + [1.0]}])
    assert cells(page) == [
        "part 1: reward –| 7+ reward –",
        "part 2: reward +1| 5=2 2-3=9 reward +1",
    ]
    assert "critic" not in page.split("</style>")[1]
    assert "gold" not in page.split("</style>")[1]


HOSTILE = '<script>alert("x")</script><b>'


@pytest.mark.parametrize("prompt", [HOSTILE, [{"role": "user", "content": HOSTILE}], None])
def test_text_is_escaped_and_its_direction_is_its_own(tmp_path: Path, prompt: Any) -> None:
    tokens = [HOSTILE, "مرحبا", "\ud83c"]
    page = render(tmp_path, [STEPS | {"prompt": prompt, "tokens": tokens, "token_rewards": [1.0, NAN, 2.0]}])
    assert "alert(&#34;x&#34;)" in page
    assert "<script>" not in page
    assert page.count('dir="auto"') == 3  # the title, the prompt and the response
    assert "مرحبا" in page


def test_long_responses_are_bounded(tmp_path: Path) -> None:
    long = STEPS | {"prompt": "p" * 50_000, "token_values": None}
    one = long | {"tokens": ["x" * 50_000], "token_rewards": [1.0]}
    dense = long | {"tokens": [" word"] * 10_000, "token_rewards": [0.125] * 10_000}
    page = render(tmp_path, [one, dense] * 40)
    assert len(page) < 100_000
    parts = draw_strips([one, dense])["responses"]
    assert len(parts[0]["parts"][0]["text"]) == MAX_TEXT + len(" … ")
    assert len(parts[1]["parts"]) == MAX_PARTS
    assert sum(part["reward"] for part in parts[1]["parts"]) == 1250
