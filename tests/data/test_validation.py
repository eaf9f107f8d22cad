"""Every reason by an example, what is coerced, and that nothing is dropped in silence."""

import math
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.labels import class_names
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import KINDS as KINDS_OF_RECORDS
from pipeline.data.schema import RawRow
from pipeline.data.validation import ordered_pairs, record_identity, validate_records
from pipeline.errors import UserError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}


def items(kind: str, *records: Any) -> list[ParsedRecord]:
    return [
        ParsedRecord(kind, record, [RawRow("file", line, record)]) for line, record in enumerate(records, 1)
    ]


def reasons(kind: str, *records: Any, classes: tuple[str, ...] = ("no", "yes")) -> list[str | None]:
    found = items(kind, *records)
    validate_records(found, list(classes))
    return [item.fault.reason if item.fault else None for item in found]


def cleaned(kind: str, record: Any, classes: tuple[str, ...] = ("no", "yes")) -> Any:
    (item,) = items(kind, record)
    validate_records([item], list(classes))
    assert item.fault is None
    return item.record


def pair(**changes: Any) -> dict[str, Any]:
    return {"prompt": "Q", "chosen": "a", "rejected": "b"} | changes


def steps(**changes: Any) -> dict[str, Any]:
    return {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]} | changes


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("prompts", {"prompt": None}, "not-text"),
        ("prompts", {}, "not-text"),
        ("prompts", {"prompt": 3}, "not-text"),
        ("prompts", {"prompt": ["Q"]}, "not-text"),
        ("prompts", {"prompt": [{"role": "narrator", "content": "Q"}]}, "not-text"),
        ("prompts", {"prompt": [{"role": "user", "content": None}]}, "not-text"),
        ("prompts", {"prompt": [{"role": [], "content": "Q"}]}, "not-text"),
        ("prompts", {"prompt": ""}, "empty-text"),
        ("prompts", {"prompt": " \n"}, "empty-text"),
        ("prompts", {"prompt": "\u200b\ufeff \x00"}, "empty-text"),
        ("prompts", {"prompt": [USER | {"content": "\u2060"}]}, "empty-text"),
        ("prompts", {"prompt": [{"role": "system", "content": ""}]}, "empty-text"),
        ("prompts", {"prompt": "[{'role': 'user', 'content': 'Q'"}, "unreadable-list"),
        ("prompts", {"prompt": [USER | {"images": ["x.png"]}]}, "not-only-text"),
        ("prompts", {"prompt": [USER, ANSWER | {"tool_calls": [1]}]}, "tool-calls"),
        ("demonstrations", {"prompt": "Q", "completion": [ANSWER | {"weight": 0}]}, "not-a-target"),
        ("demonstrations", {"prompt": "Q", "completion": [ANSWER | {"loss": 0.5}]}, "unread-weight"),
        ("demonstrations", {"prompt": "Q", "completion": [ANSWER, USER, ANSWER]}, "not-one-answer"),
        ("comparisons", pair(chosen=[USER, ANSWER]), "not-one-answer"),
        ("comparisons", pair(chosen=[ANSWER, USER]), "not-one-answer"),
        ("comparisons", pair(chosen=[ANSWER, ANSWER]), "not-one-answer"),
        ("comparisons", pair(rejected="a\u200b"), "identical-answers"),
        ("comparisons", pair(chosen="caf\u00e9", rejected="cafe\u0301"), "identical-answers"),
        ("comparisons", pair(chosen="a\r\nb", rejected="a\nb "), "identical-answers"),
        ("comparisons", pair(source="\udce9"), "not-unicode"),
        ("rankings", {"prompt": "Q", "responses": ["a", "a\u00ad"], "ranks": [1, 2]}, "identical-answers"),
        ("prompts", {"prompt": []}, "empty-text"),
        ("prompts", {"prompt": [{"role": "user", "content": " "}]}, "empty-text"),
        ("prompts", {"prompt": "caf\udce9"}, "not-unicode"),
        ("demonstrations", {"prompt": "Q", "completion": [USER, ANSWER]}, "not-one-answer"),
        ("demonstrations", {"prompt": "", "completion": "a"}, "empty-text"),
        ("comparisons", pair(rejected="a"), "identical-answers"),
        ("comparisons", pair(rejected=[ANSWER]), "identical-answers"),
        ("comparisons", pair(margin=math.nan), "not-finite"),
        ("comparisons", pair(margin="-inf"), "not-finite"),
        ("comparisons", pair(margin="big"), "not-a-number"),
        ("comparisons", pair(margin=True), "not-a-number"),
        ("ratings", {"prompt": "Q", "completion": "a", "rating": None}, "not-a-number"),
        ("ratings", {"prompt": "Q", "completion": "a", "rating": math.inf}, "not-finite"),
        ("ratings", {"prompt": "Q", "completion": "a", "rating": 10**400}, "not-a-number"),
        ("ratings", {"prompt": "Q", "completion": "a", "rating": 3.5e38}, "not-finite"),
        ("comparisons", pair(margin=-1e39), "not-finite"),
        ("rankings", {"prompt": "Q", "responses": "ab", "ranks": [1, 2]}, "not-text"),
        ("rankings", {"prompt": "Q", "responses": ["a", None], "ranks": [1, 2]}, "not-text"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": 1}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [0, 1]}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 1.5]}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [1e30, 1]}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, math.nan]}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, "second"]}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [2, True]}, "not-a-rank"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2, 3]}, "rank-count"),
        ("rankings", {"prompt": "Q", "responses": ["a"], "ranks": [1]}, "too-few-answers"),
        ("rankings", {"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 1]}, "all-tied"),
        ("rankings", {"prompt": "Q", "responses": ["a", "a", "b"], "ranks": [1, 2, 2]}, "identical-answers"),
        ("labels", {"prompt": "Q", "completion": "a", "label": "maybe"}, "unknown-label"),
        ("labels", {"prompt": "Q", "completion": "a", "label": 2}, "unknown-label"),
        ("labels", {"prompt": "Q", "completion": "a", "label": -1}, "unknown-label"),
        ("labels", {"prompt": "Q", "completion": "a", "label": 0.5}, "unknown-label"),
        ("labels", {"prompt": "Q", "completion": "a", "label": None}, "unknown-label"),
        ("labels", {"prompt": "Q", "completion": "a", "label": ["no"]}, "unknown-label"),
        ("labels", {"prompt": 5, "completion": "a", "label": "no"}, "not-text"),
        ("steps", steps(labels=None), "label-count"),
        ("steps", steps(labels=[]), "label-count"),
        ("steps", steps(labels=[True]), "label-count"),
        ("steps", steps(labels=[1, 0, 1]), "label-count"),
        ("steps", steps(labels=[1, -1]), "unknown-label"),
        ("steps", steps(labels=[1, 0.5]), "unknown-label"),
        ("steps", steps(labels=[1, None]), "unknown-label"),
        ("steps", steps(labels=["right", "maybe"]), "unknown-label"),
        ("steps", steps(completions=["a", " \n"]), "empty-text"),
        ("steps", steps(completions=["a", "b\udc80"]), "not-unicode"),
        ("steps", steps(completions=["a", [ANSWER]]), "not-text"),
        ("steps", steps(completions=[], labels=[]), "no-steps"),
        ("steps", steps(completions="ab"), "no-steps"),
        ("steps", steps(prompt=""), "empty-text"),
        ("prompts", {"prompt": "Q", "answer": "\udc80"}, "not-unicode"),
        ("prompts", {"prompt": "Q", "meta": {"tags": ["a", "\udc80"]}}, "not-unicode"),
        ("prompts", {"prompt": "Q", "meta": {"\udc80": 1}}, "not-unicode"),
    ],
)
def test_reasons(kind: str, record: Any, reason: str) -> None:
    assert reasons(kind, record) == [reason]


def test_the_detail_names_the_field() -> None:
    (item,) = items("comparisons", pair(rejected=""))
    validate_records([item], [])
    assert item.fault
    assert item.fault.detail == "rejected: is empty or blank"


def test_records_come_out_in_their_columns_and_types() -> None:
    assert cleaned("comparisons", pair(margin="1.5", source="web", extra=1)) == pair(margin=1.5, source="web")
    assert cleaned("comparisons", pair(margin="", source=" ")) == pair()
    ranking = cleaned("rankings", {"prompt": "Q", "responses": ["a", "b", "c"], "ranks": ["1", 2.0, 2]})
    assert ranking["ranks"] == [1, 2, 2]
    assert all(type(rank) is int for rank in ranking["ranks"])
    message = {"role": "user", "content": "Q", "name": "someone"}
    assert cleaned("prompts", {"prompt": [message]}) == {"prompt": [USER]}
    assert cleaned("labels", {"prompt": None, "completion": "a", "label": 1}) == {
        "prompt": "",
        "completion": "a",
        "label": 1,
    }


@pytest.mark.parametrize(
    "labels", [[True, False], [1, 0.0], ["+", "-"], ["1", "0"], [" Right", "WRONG"], ["True", "no"]]
)
def test_labels_of_steps_are_right_or_wrong(labels: list[Any]) -> None:
    record = cleaned("steps", steps(labels=labels, prompt=[USER]))
    assert record == steps(prompt=[USER])
    assert all(type(label) is bool for label in record["labels"])
    assert KINDS_OF_RECORDS["steps"].target(record) == [1, 0]
    assert KINDS_OF_RECORDS["steps"].responses(record) == ["a", "b"]


def test_the_detail_names_the_step() -> None:
    rows = items("steps", steps(completions=["a", ""]), steps(labels=[True]))
    validate_records(rows, [])
    assert [item.fault and item.fault.detail for item in rows] == [
        "completions: step 2 is empty or blank",
        "2 steps, 1 labels; expected one label for each step",
    ]


def test_steps_contradict_each_other_as_whole_responses() -> None:
    rows = [steps(), steps(labels=[True, True]), steps(labels=[1, 0])]
    assert reasons("steps", *rows) == ["contradiction"] * 3
    # A step may be right in one response and wrong in another one, even after the same steps.
    longer = steps(completions=["a", "b", "c"], labels=[True, True, True])
    assert reasons("steps", steps(), longer, steps()) == [None, None, "duplicate"]


def test_a_prompt_keeps_its_other_columns_as_they_are() -> None:
    record = {
        "prompt": "Q",
        "answer": 7,
        "label": " ",
        "tags": [1, None],
        "meta": {"a": {}},
        "responses": None,
    }
    assert cleaned("prompts", record) == record
    assert cleaned("demonstrations", record | {"completion": "a"}) == {"prompt": "Q", "completion": "a"}


def test_two_answers_of_one_prompt_contradict_each_other() -> None:
    both = [{"prompt": "Q", "answer": "7"}, {"prompt": "Q", "answer": "8"}, {"prompt": "R", "answer": "8"}]
    assert reasons("prompts", *both) == ["contradiction", "contradiction", None]
    assert reasons("prompts", both[0], {"prompt": "Q"}) == [None, "duplicate"]
    assert reasons("prompts", {"prompt": "Q"}, both[0]) == [
        "duplicate",
        None,
    ]  # the one with the answer stays
    assert reasons("prompts", both[0], {"prompt": "Q", "answer": " "}) == [None, "duplicate"]
    lists = [{"prompt": "Q", "answer": answer} for answer in (["7"], ["7"], ["8"])]
    assert reasons("prompts", *lists[:2]) == [None, "duplicate"]
    assert reasons("prompts", *lists) == ["contradiction"] * 3


def test_a_whole_number_and_its_float_are_one_value() -> None:
    answers = [{"prompt": "Q", "answer": answer} for answer in (7, 7.0, [7], [7.0])]
    assert reasons("prompts", *answers[:2]) == reasons("prompts", *answers[2:]) == [None, "duplicate"]
    assert reasons("prompts", *answers) == ["contradiction"] * 4
    columns = [{"prompt": "Q", "meta": {"n": number}} for number in (1, 1.0, 1.5)]
    assert reasons("prompts", *columns) == [None, "duplicate", None]
    assert reasons("ratings", *({"prompt": "Q", "completion": "a", "rating": n} for n in (1, 1.0))) == [
        None,
        "merged",
    ]
    labels = [{"prompt": "Q", "completion": "a", "label": label} for label in (1, 1.0)]
    assert reasons("labels", *labels) == [None, "merged"]
    verdicts = [{"prompt": "Q", "completions": ["a"], "labels": [label]} for label in (1, 1.0)]
    assert reasons("steps", *verdicts) == [None, "duplicate"]


def test_prompts_that_differ_in_another_column_are_all_kept() -> None:
    rows = [{"prompt": "Q", "style": style, "meta": {"a": 1, "b": 2}} for style in ("terse", "long", "terse")]
    rows[2]["meta"] = {"b": 2, "a": 1}
    assert reasons("prompts", *rows) == [None, None, "duplicate"]
    assert reasons("prompts", {"prompt": "Q", "style": None}, {"prompt": "Q"}) == [None, "duplicate"]
    answers = [{"prompt": "Q", "style": "terse", "answer": 7}, {"prompt": "Q", "style": "long", "answer": 8}]
    assert reasons("prompts", *answers) == ["contradiction"] * 2  # the policy sees the prompt alone


def test_contradictory_rankings_disagree_on_a_pair() -> None:
    def ranking(responses: str, *ranks: int) -> dict[str, Any]:
        return {"prompt": "Q", "responses": list(responses), "ranks": list(ranks)}

    assert reasons("rankings", ranking("abc", 1, 2, 3), ranking("bxa", 1, 2, 3)) == ["contradiction"] * 2
    assert reasons("rankings", ranking("abc", 1, 2, 3), ranking("cba", 3, 2, 1)) == [None, "duplicate"]
    assert reasons("rankings", ranking("abc", 1, 2, 3), ranking("abx", 1, 1, 2)) == [None, None]


def test_kinds_do_not_contradict_each_other() -> None:
    both = [
        *items("ratings", {"prompt": "Q", "completion": "a", "rating": 1}),
        *items("labels", {"prompt": "Q", "completion": "a", "label": 0}),
    ]
    validate_records(both, ["no", "yes"])
    assert [item.fault for item in both] == [None, None]


def test_ordered_pairs() -> None:
    assert list(ordered_pairs({"responses": ["a", "b", "c"], "ranks": [2, 1, 2]})) == [("b", "a"), ("b", "c")]


def test_other_spellings_of_messages_come_out_as_role_and_content() -> None:
    shared = {"prompt": [{"from": "human", "value": "Q"}], "completion": {"from": "gpt", "value": "a"}}
    assert cleaned("demonstrations", shared) == {"prompt": [USER], "completion": [ANSWER]}
    assert cleaned("prompts", {"prompt": [{"role": "system", "content": " "}, USER]}) == {"prompt": [USER]}
    context = [USER, ANSWER | {"weight": 0}, USER]
    assert cleaned("prompts", {"prompt": context}) == {"prompt": [USER, ANSWER, USER]}
    assert cleaned("answers", {"prompt": "Q", "response": [ANSWER | {"weight": 0}]})["response"] == [ANSWER]


def test_the_rest_of_a_conversation_is_compared_as_a_whole() -> None:
    rest = [ANSWER | {"id": 1}, USER, ANSWER]
    found = cleaned("comparisons", pair(chosen=rest))
    assert found["chosen"] == [ANSWER, USER, ANSWER]
    assert reasons("comparisons", pair(chosen=rest, rejected=rest)) == ["identical-answers"]
    assert cleaned("rankings", {"prompt": "Q", "responses": [rest, "b"], "ranks": [1, 2]})["responses"] == [
        [ANSWER, USER, ANSWER],
        "b",
    ]


@pytest.mark.parametrize("field", ["prompt", "completion", "rating"])
@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], "9" * 5000, b"Q"], ids=["int", "list", "digits", "bytes"]
)
def test_values_that_python_cannot_print_have_a_reason(field: str, value: Any) -> None:
    record = {"prompt": "Q", "completion": "a", "rating": 1} | {field: value}
    is_text = isinstance(value, str) and field != "rating"
    reason = "not-a-number" if field == "rating" else "not-text"
    assert reasons("ratings", record) == [
        None if is_text else "not-finite" if isinstance(value, str) else reason
    ]


def test_a_value_that_is_nested_too_deeply_has_a_reason() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    record = {
        "prompt": "Q",
        "completion": "a",
        "rating": deep,
        "label": deep,
        "responses": deep,
        "ranks": deep,
    }
    assert reasons("ratings", record) == ["not-a-number"]
    assert reasons("labels", record) == ["unknown-label"]
    assert reasons("rankings", record) == ["not-text"]
    assert reasons("prompts", {"prompt": deep}) == ["not-text"]
    assert reasons("comparisons", pair(source=deep)) == ["not-text"]


def test_a_thousand_responses_need_no_memory_for_their_pairs() -> None:
    texts = [f"response {n}" for n in range(1000)]
    one = {"prompt": "Q", "responses": texts, "ranks": list(range(1, 1001))}
    tracemalloc.start()
    assert reasons("rankings", one, one | {"prompt": "R"}) == [None, None]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6  # 499,500 pairs of two numbers are 50 MB and more


MESSAGE_KEYS = ["role", "from", "content", "value", "weight", "tool_calls", "type", "text"]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["Q", "a", "b", "1", "", " ", "\udc80", "\u200b", "9" * 5000, b"a"])
    | st.sampled_from(["[{'role': 'user', 'content': 'Q'}]", "[{'from': 'gpt', 'value': 'Q'", "user", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MESSAGE_KEYS), inner, max_size=3)
    ),
    max_leaves=6,
)
KINDS = {
    kind: (*schema.columns, *schema.optional, *(("answer",) if schema.keeps_columns else ()))
    for kind, schema in KINDS_OF_RECORDS.items()
}
RECORDS = st.sampled_from(sorted(KINDS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.fixed_dictionaries(dict.fromkeys(KINDS[kind], JUNK)))
)


@settings(max_examples=50)
@given(st.lists(RECORDS, max_size=12))
def test_junk_is_kept_or_faulty_never_an_error(rows: list[tuple[str, dict[str, Any]]]) -> None:
    found = [
        ParsedRecord(kind, record, [RawRow("file", line, record)])
        for line, (kind, record) in enumerate(rows, 1)
    ]
    try:
        classes = class_names([], [item.record.get("label") for item in found])
    except UserError:  # labels that may be one class or two
        classes = ["no", "yes"]
    validate_records(found, classes)
    kept = [(item.kind, item.record) for item in found if not item.fault]
    assert len({record_identity(kind, record) for kind, record in kept}) == len(kept)
    for kind, record in kept:
        assert set(record) <= set(KINDS[kind])
        assert all(
            value is not None for name, value in record.items() if (kind, name) != ("prompts", "answer")
        )
