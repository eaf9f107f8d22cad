"""Votes on one pair or response become one record, by hand-worked shares."""

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import RawRow
from pipeline.data.validation import validate_records

PROMPT = {"prompt": "Q"}
FOR, AGAINST = PROMPT | {"chosen": "a", "rejected": "b"}, PROMPT | {"chosen": "b", "rejected": "a"}
TIE = FOR | {"preference": 0.5}


def merge(kind: str, *records: Any, ties: Any = "drop") -> tuple[list[dict[str, Any]], list[str | None]]:
    """Return the records that are kept, and the reason of each row, None if it is kept."""
    items = [
        ParsedRecord(kind, dict(record), [RawRow("a", line, record)])
        for line, record in enumerate(records, 1)
    ]
    validate_records(items, ["no", "yes"], ties)
    reasons = [item.fault.reason if item.fault else None for item in items]
    return [item.record for item in items if not item.fault], reasons


def ratings(*values: Any, **others: Any) -> list[dict[str, Any]]:
    return [PROMPT | {"completion": "a", "rating": value} | others for value in values]


def labels(*values: Any, **others: Any) -> list[dict[str, Any]]:
    return [PROMPT | {"completion": "a", "label": value} | others for value in values]


@pytest.mark.parametrize(
    ("votes", "ties", "chosen", "preference", "count"),
    [
        ([FOR, FOR], "drop", "a", 1.0, 2),
        ([FOR, AGAINST, FOR], "drop", "a", 2 / 3, 3),
        ([AGAINST, FOR, FOR], "drop", "a", 2 / 3, 3),  # the first vote is of the minority
        ([FOR, TIE], "keep", "a", 3 / 4, 2),
        ([FOR, FOR, AGAINST | {"votes": 4}], "drop", "b", 4 / 6, 6),
        ([FOR | {"preference": 0.75, "votes": 4}, AGAINST], "drop", "a", 3 / 5, 5),
        ([FOR | {"preference": 0.25, "votes": 4}], "drop", "b", 3 / 4, 4),  # `rejected` has more votes
        ([FOR, AGAINST], "keep", "a", 1 / 2, 2),
        ([TIE | {"votes": 1}], "keep", "a", 1 / 2, 1),
    ],
)
def test_the_preference_is_the_share_of_the_votes_for_the_winner(votes, ties, chosen, preference, count):
    (record,), reasons = merge("comparisons", *votes, ties=ties)
    assert (record["chosen"], record["rejected"]) == (("a", "b") if chosen == "a" else ("b", "a"))
    assert record["preference"] == pytest.approx(preference)
    assert record["votes"] == count
    assert reasons == [None, *["merged"] * (len(votes) - 1)]


def test_ties_are_quarantined_unless_they_are_kept():
    assert merge("comparisons", FOR, AGAINST) == ([], ["tie", "tie"])
    assert merge("comparisons", TIE) == ([], ["tie"])
    assert merge("comparisons", TIE, FOR) == ([FOR], ["tie", None])  # a vote without a winner is no vote


def test_only_the_margins_of_those_who_voted_for_the_winner_count():
    votes = [FOR | {"margin": 1.0}, AGAINST | {"margin": 9.0}, FOR | {"margin": 4.0, "votes": 2}, FOR]
    (record,), _ = merge("comparisons", *votes)
    assert record["margin"] == 3.0  # (1 + 2 · 4) / 3
    assert record["preference"] == 4 / 5
    (record,), _ = merge("comparisons", AGAINST | {"margin": 9.0}, FOR, FOR)
    assert "margin" not in record


def test_one_vote_alone_is_left_as_it_is():
    assert merge("comparisons", FOR, FOR | {"prompt": "R"})[0] == [FOR, FOR | {"prompt": "R"}]
    (label,), _ = merge("labels", *labels("yes"))
    assert label == PROMPT | {"completion": "a", "label": 1}


def test_messages_and_their_text_are_votes_on_one_pair():
    as_messages = {"chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    (record,), reasons = merge("comparisons", FOR, PROMPT | as_messages)
    assert (record["votes"], reasons) == (2, [None, "merged"])


def test_repeated_labels_become_a_soft_label():
    (record,), reasons = merge("labels", *labels("no", "yes", 1))
    assert record["label"] == 1
    assert record["label_shares"] == pytest.approx([1 / 3, 2 / 3])
    assert (record["votes"], reasons) == (3, [None, "merged", "merged"])
    assert merge("labels", *labels("no", "yes")) == ([], ["tie", "tie"])
    (tied,), _ = merge("labels", *labels("yes", "no"), ties="keep")
    assert (tied["label"], tied["label_shares"]) == (1, [0.5, 0.5])  # the first row's class
    (again,), _ = merge("labels", record, *labels("no", votes=3))  # 1 + 3 of 6
    assert (again["label"], again["label_shares"]) == (0, pytest.approx([4 / 6, 2 / 6]))


def test_repeated_ratings_become_their_mean():
    (record,), reasons = merge("ratings", *ratings(1, "2.5"), *ratings(4, votes=2))
    assert record == PROMPT | {"completion": "a", "rating": 11.5 / 4, "votes": 4}
    assert reasons == [None, "merged", "merged"]


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("comparisons", FOR | {"preference": 1.5}, "not-a-share"),
        ("comparisons", FOR | {"preference": "many"}, "not-a-number"),
        ("comparisons", FOR | {"votes": 0}, "not-a-count"),
        ("comparisons", FOR | {"votes": 1.5}, "not-a-count"),
        ("comparisons", FOR | {"votes": 9e18}, "not-a-count"),
        ("ratings", ratings(1, votes=2**31)[0], "not-a-count"),
        ("labels", labels("yes", label_shares=[0.5, 0.6])[0], "not-a-share"),
        ("labels", labels("yes", label_shares=[1.0])[0], "not-a-share"),
        ("labels", labels("yes", label_shares=[-1.0, 2.0])[0], "not-a-share"),
    ],
)
def test_wrong_shares_and_counts_are_refused(kind, row, reason):
    assert merge(kind, row) == ([], [reason])


def test_the_largest_counts_and_ratings_are_merged():
    (record,), _ = merge("ratings", *ratings(3.4e38, -3.4e38, 3.4e38, votes=2**31 - 1))
    assert (record["rating"], record["votes"]) == (pytest.approx(3.4e38 / 3), 3 * (2**31 - 1))


def test_a_label_that_its_shares_contradict_is_refused():
    item = ParsedRecord("labels", labels("yes", label_shares=[0.75, 0.25])[0], [RawRow("a", 1, {})])
    validate_records([item], ["no", "yes"])
    assert str(item.fault) == (
        "invalid-label: label is 'yes', but label_shares has 0.75 for 'no' and 0.25 for 'yes'; "
        "correct one of the two"
    )
    for label in ("no", "yes"):  # a tie contradicts neither
        assert merge("labels", *labels(label, label_shares=[0.5, 0.5]))[1] == [None]


def test_the_record_stays_in_the_split_that_is_held_out():
    anywhere, held_out = RawRow("a", 1, FOR), RawRow("test", 1, FOR, splits=("test",))
    items = [ParsedRecord("comparisons", dict(FOR), [row]) for row in (anywhere, held_out)]
    validate_records(items, [])
    assert [item.fault is None for item in items] == [False, True]


ANSWERS = st.sampled_from("abc")


@given(st.lists(st.tuples(st.sampled_from("QR"), ANSWERS, ANSWERS), max_size=12))
def test_each_pair_is_kept_once_with_the_share_of_its_majority(rows: list[tuple[str, str, str]]) -> None:
    kept, _ = merge(
        "comparisons",
        *({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows),
    )
    votes = Counter(row for row in rows if row[1] != row[2])
    expected = {
        (q, a, b): (Fraction(count, count + votes[q, b, a]), count + votes[q, b, a])
        for (q, a, b), count in votes.items()
        if count > votes[q, b, a]
    }
    assert len(kept) == len(expected)
    for record in kept:
        share, count = expected[record["prompt"], record["chosen"], record["rejected"]]
        assert record.get("preference", 1.0) == pytest.approx(float(share))
        assert record.get("votes", 1) == count
