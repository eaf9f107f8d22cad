"""PRM800K's and Math-Shepherd's rows by hand-made examples, round trips, and what is wrong with a row."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.schema import RowError
from pipeline.data.steps import STEP_TAG, expand_trajectory, parse_tagged_steps

# Math-Shepherd


def tag(steps: list[str], signs: str, question: str = "How many?") -> tuple[str, str]:
    """Return the input and the label of a row."""
    text = question + " " + "\n".join(f"{step} {{}}" for step in steps)
    return text.format(*[STEP_TAG] * len(steps)), text.format(*signs)


def test_a_tagged_solution_gives_its_question_steps_and_labels() -> None:
    text, labelled = tag(["Step 1: 2+3=5", "Step 2: 5-1=3. The answer is: 3"], "+-", "What is 2+3-1?")
    assert parse_tagged_steps(text, labelled) == {
        "prompt": "What is 2+3-1?",
        "completions": ["Step 1: 2+3=5", "Step 2: 5-1=3. The answer is: 3"],
        "labels": ["+", "-"],
    }


def test_without_step_1_the_first_step_follows_the_question_mark() -> None:
    record = parse_tagged_steps(*tag(["It is 4.", "Is it? Yes."], "-+", "Why? What is 2+2?"))
    assert record["prompt"] == "Why? What is 2+2?"
    assert record["completions"] == ["It is 4.", "Is it? Yes."]


def test_a_tag_inside_the_question_goes_with_its_label() -> None:
    text = f"Ann has 2 {STEP_TAG} and Bob 3. step 1: 2+3=5 {STEP_TAG}"
    assert parse_tagged_steps(text, "Ann has 2 - and Bob 3. step 1: 2+3=5 +") == {
        "prompt": "Ann has 2   and Bob 3.",
        "completions": ["step 1: 2+3=5"],
        "labels": ["+"],
    }


def test_text_after_the_last_tag_is_a_step_without_a_label() -> None:
    record = parse_tagged_steps(f"Q? Step 1: a {STEP_TAG} b", "Q? Step 1: a + b")
    assert (record["completions"], record["labels"]) == (["Step 1: a", "b"], ["+"])


@pytest.mark.parametrize(
    ("text", "labelled", "fault"),
    [
        ("Q? Step 1: a", "Q? Step 1: a", "no-steps: input: the tag 'ки', which ends a step, never occurs"),
        ("Do it. ки", "Do it. +", "no-steps: input: neither 'Step 1:' nor a question mark"),
        ("Q? Step 1: a ки b ки", "Q? Step 1: a + b", "tag-mismatch: .* in place of tag 2 of 2"),
        ("Q? Step 1: a ки b ки", "Q? Step 1: a + b ки", "tag-mismatch: .* in place of tag 2 of 2"),
        ("Q? Step 1: a ки", "Q? Step 1: a + b +", "tag-mismatch: .* after the last of 1 tags"),
        ("Q? Step 1: a ки", "P? Step 1: a +", "tag-mismatch: .* in place of tag 1 of 1"),
        ("Q? Step 1: a ки", "Q? Step 1: a 1", "tag-mismatch: .* in place of tag 1 of 1"),
        ("Q? Step 1: a ки", 1, "not-text: label: expected text, found int"),
        (None, "Q? Step 1: a +", "not-text: input: expected text, found NoneType"),
    ],
)
def test_a_wrong_tagged_solution_has_a_reason(text: Any, labelled: Any, fault: str) -> None:
    with pytest.raises(RowError, match=fault):
        parse_tagged_steps(text, labelled)


STEP_TEXTS = st.text("a+-1 \n", min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.tuples(STEP_TEXTS, st.sampled_from("+-")), min_size=1, max_size=5))
def test_tagged_steps_round_trip(steps: list[tuple[str, str]]) -> None:
    texts, signs = [f"Step 1: {steps[0][0]}", *(text for text, _ in steps[1:])], [sign for _, sign in steps]
    assert parse_tagged_steps(*tag(texts, "".join(signs))) == {
        "prompt": "How many?",
        "completions": [text.strip() for text in texts],
        "labels": signs,
    }


PIECES = st.lists(st.sampled_from([STEP_TAG, "Step 1:", "?", "+", "-", "a", " "])).map("".join)


@given(PIECES, PIECES, st.booleans())
def test_any_two_texts_give_steps_or_a_reason(text: str, other: str, fits: bool) -> None:
    try:
        record = parse_tagged_steps(text, text.replace(STEP_TAG, "+") if fits else other)
    except RowError:
        return
    assert len(record["completions"]) - len(record["labels"]) in (0, 1)
    words = [record["prompt"], *record["completions"]]
    assert "".join("".join(words).split()) == "".join(text.replace(STEP_TAG, "").split())


# PRM800K


def completion(text: str, rating: Any, flagged: Any = None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*completions: Any, chosen: Any = None, human: Any = None) -> dict[str, Any]:
    return {"completions": [*completions], "chosen_completion": chosen, "human_completion": human}


def expand(*steps: Any, **label: Any) -> list[Any]:
    """Return (steps, labels) of each record, and the reason of what is left out."""
    question = {"problem": "Q", "ground_truth_answer": "7", "ground_truth_solution": "…"}
    parts = expand_trajectory(question, {"steps": list(steps), "total_time": 1, **label})
    for part in parts:
        assert isinstance(part, RowError) or (part["prompt"], part["answer"]) == ("Q", "7")
    return [
        str(part) if isinstance(part, RowError) else ("".join(part["completions"]), part["labels"])
        for part in parts
    ]


def test_each_alternative_ends_a_response_that_begins_with_the_chosen_steps() -> None:
    assert expand(
        step(completion("a", 1), completion("b", -1), chosen=0),
        step(completion("c", -1), completion("d", 0), completion("e", 1), chosen=1),
        step(completion("f", 1), chosen=0),
        finish_reason="solution",
    ) == [
        ("b", [False]),
        ("ac", [True, False]),
        ("ae", [True, True]),
        ("adf", [True, True, True]),  # a rating of 0 is right
    ]


def test_a_path_that_another_record_contains_is_no_record() -> None:
    error = step(completion("b", -1), completion("c", 1))
    assert expand(step(completion("a", 1), chosen=0), error, finish_reason="found_error") == [
        ("ab", [True, False]),
        ("ac", [True, True]),
    ]
    nothing = {"completions": None, "chosen_completion": None, "human_completion": None}
    assert expand(step(completion("a", 1), chosen=0), nothing) == [("a", [True])]


@pytest.mark.parametrize("human", ["b", {"text": "b", "rating": None, "source": "human"}])
def test_a_step_that_a_labeller_wrote_is_right(human: Any) -> None:
    assert expand(step(completion("a", -1), human=human), step(completion("c", 1), chosen=0)) == [
        ("a", [False]),
        ("bc", [True, True]),
    ]


def test_what_has_no_rating_is_left_out_and_ends_the_path() -> None:
    assert expand(
        step(completion("a", 1), completion("b", None), completion("c", 1, flagged=True), chosen=0),
        step(completion("d", None), completion("e", -1), chosen=0),
        step(completion("f", 1), chosen=0),
    ) == [
        "no-rating: step 1, completion 1: its rating is null",
        "flagged: step 1, completion 2: the labeller could not rate it",
        ("ae", [True, False]),
        "no-rating: step 2, completion 0: its rating is null",
    ]


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ({"steps": []}, "no-steps: label: no step has a completion"),
        ({"steps": None}, "no-steps: label: no step has a completion"),
        ({"steps": "a"}, "no-steps: label: expected a list of steps, found str"),
        ({"steps": ["a"]}, "no-steps: step 1: expected an object, found str"),
        ({"steps": [step("a")]}, "no-steps: step 1, completion 0: expected an object, found str"),
        ({"steps": [step(completion("a", 2), chosen=0)]}, "unknown-label: .* -1, 0 or 1; found 2"),
        ({"steps": [step(completion("a", "+"), chosen=0)]}, "unknown-label: .* found '\\+'"),
        ({"steps": [step(completion("a", 1), chosen=1)]}, "chosen_completion is 1 of 1 completions"),
        ({"steps": [step(completion("a", 1), chosen=[])]}, r"chosen_completion is \[\] of 1 completions"),
        ({"steps": [], "finish_reason": "bad_problem"}, "bad-problem: .* reported the problem as broken"),
        ("good", "no-steps: question and label: expected an object each"),
    ],
)
def test_a_wrong_trajectory_has_a_reason(label: Any, fault: str) -> None:
    with pytest.raises(RowError, match=fault):
        expand_trajectory({"problem": "Q"}, label)


RATED = st.tuples(st.sampled_from("abc"), st.sampled_from([-1, 0, 1]))
TREES = st.lists(
    st.lists(RATED, min_size=1, max_size=3).flatmap(
        lambda rated: st.tuples(st.just(rated), st.none() | st.integers(0, len(rated) - 1))
    ),
    min_size=1,
    max_size=5,
)


@given(TREES)
def test_every_rated_completion_on_the_path_ends_one_response_or_goes_on(tree: Any) -> None:
    found = expand(
        *(
            step(*(completion(*rated) for rated in alternatives), chosen=chosen)
            for alternatives, chosen in tree
        )
    )
    path: list[tuple[str, int]] = []
    leaves = []
    for alternatives, chosen in tree:
        leaves += [[*path, rated] for place, rated in enumerate(alternatives) if place != chosen]
        if chosen is None:
            break
        path = [*path, alternatives[chosen]]
    else:
        leaves.append(path)
    expected = [("".join(text for text, _ in leaf), [rating > -1 for _, rating in leaf]) for leaf in leaves]
    assert found == expected
