"""Dialogues in the forms of HH-RLHF and of messages, by hand and by a round trip, in linear time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.dialogues import TURN, parse_dialogue, parse_turns
from pipeline.data.schema import RowError
from tests.data.reading import assistant, user


def test_hh_dialogue() -> None:
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"
    assert parse_dialogue(head + " Good.\nVery.", head + " Bad.") == {
        "prompt": [user("Hi"), assistant("Hello."), user("And?")],
        "chosen": [assistant("Good.\nVery.")],
        "rejected": [assistant("Bad.")],
    }


def test_hh_dialogues_that_part_early_have_more_than_one_answer() -> None:
    parted = parse_dialogue(
        "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant: b", "\n\nHuman: Q\n\nAssistant: c"
    )
    assert parted["prompt"] == [user("Q")]
    assert parted["chosen"] == [assistant("a"), user("R"), assistant("b")]
    assert parted["rejected"] == [assistant("c")]


def test_several_turns_of_one_speaker_become_one() -> None:
    assert parse_turns("\n\nHuman: a\n\nHuman: b\n\nAssistant: c") == [user("a\n\nb"), assistant("c")]


def test_message_lists_share_their_prompt() -> None:
    shared = [user("Q"), assistant("a"), user("R")]
    assert parse_dialogue([*shared, assistant("b")], [*shared, assistant("c")]) == {
        "prompt": shared,
        "chosen": [assistant("b")],
        "rejected": [assistant("c")],
    }
    same = parse_dialogue([*shared, assistant("b")], [*shared, assistant("b")])
    assert (same["prompt"], same["chosen"], same["rejected"]) == (shared, [assistant("b")], [assistant("b")])


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("no speakers", "no speakers", "not-a-dialogue"),
        ("\n\nHuman: Q", "\n\nHuman: Q", "not-a-dialogue"),
        ("Title\n\nHuman: Q\n\nAssistant: a", "Title\n\nHuman: Q\n\nAssistant: b", "not-a-dialogue"),
        (None, "\n\nHuman: Q\n\nAssistant: a", "not-text"),
        ([user("Q")], "\n\nHuman: Q\n\nAssistant: a", "not-text"),
        ([user("Q")], [user("Q")], "not-a-dialogue"),
        ([], [user("Q"), assistant("a")], "not-a-dialogue"),
        ([user("Q"), assistant("a")], [user("R"), assistant("a")], "not-a-dialogue"),
        ([user("Q"), {"role": "narrator", "content": "a"}], [user("Q"), assistant("a")], "not-text"),
        ([user("Q"), assistant("a") | {"tool_calls": [1]}], [user("Q"), assistant("b")], "tool-calls"),
    ],
)
def test_what_is_no_dialogue(chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_dialogue(chosen, rejected)
    assert caught.value.reason == reason


def test_line_ends_of_windows_part_turns() -> None:
    crlf = "\r\n\r\nHuman: Q\r\nmore\r\n\r\nAssistant: "
    assert parse_dialogue(crlf + "a", crlf + "b") == {
        "prompt": [user("Q\r\nmore")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
    }
    mixed = parse_dialogue("\n\nHuman: Q\n\nAssistant: a", "\r\n\r\nHuman: Q\r\n\r\nAssistant: b")
    assert (mixed["prompt"], mixed["chosen"]) == ([user("Q")], [assistant("a")])


def test_messages_are_compared_by_role_and_content() -> None:
    chosen = [user("Q") | {"id": "c"}, assistant("a") | {"weight": 1}, user("R"), assistant("b") | {"id": 1}]
    rejected = [{"from": "human", "value": "Q"}, assistant("a") | {"name": None}, user("R"), assistant("c")]
    found = parse_dialogue(chosen, rejected)
    assert (found["prompt"], found["chosen"], found["rejected"]) == (chosen[:3], chosen[3:], rejected[3:])
    swapped = parse_dialogue([user("Q"), assistant("Q")], [user("Q"), assistant("a")])
    assert (swapped["prompt"], swapped["chosen"]) == ([user("Q")], [assistant("Q")])


def test_dialogues_that_part_early_share_what_is_before_the_first_other_answer() -> None:
    head, tails = [user("Q")], [[assistant(text), user("R"), assistant("b")] for text in "ac"]
    found = parse_dialogue(head + tails[0], head + tails[1])
    assert (found["prompt"], found["chosen"], found["rejected"]) == (head, *tails)
    shorter = parse_dialogue(head + tails[0], head + tails[0][:1])
    assert (shorter["chosen"], shorter["rejected"]) == (tails[0], tails[0][:1])
    by_user = parse_dialogue([*head, *tails[0]], [*head, assistant("a"), user("S"), assistant("b")])
    assert by_user["rejected"] == [assistant("a"), user("S"), assistant("b")]  # both begin with an answer


SAID = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and not TURN.search(text))
)


@given(st.lists(SAID, min_size=1).filter(lambda turns: len(turns) % 2 == 1), SAID, SAID)
def test_dialogue_round_trip(history: list[str], chosen: str, rejected: str) -> None:
    messages = [user(text) if n % 2 == 0 else assistant(text) for n, text in enumerate(history)]
    names = {"user": "Human", "assistant": "Assistant"}
    text = (
        "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)
        + "\n\nAssistant: "
    )
    expected = {"prompt": messages, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    assert parse_dialogue(text + chosen, text + rejected) == expected
    assert parse_dialogue([*messages, assistant(chosen)], [*messages, assistant(rejected)]) == expected


def test_a_dialogue_of_very_many_turns_is_read_in_linear_time():
    """If each turn compared the text before it once more, this would take minutes."""
    shared = "\n\nHuman: a\n\nAssistant: b" * 50_000
    parsed = parse_dialogue(f"{shared}\n\nHuman: c\n\nAssistant: d", f"{shared}\n\nHuman: c\n\nAssistant: e")
    assert len(parsed["prompt"]) == 100_001
    assert (parsed["chosen"], parsed["rejected"]) == (
        [{"role": "assistant", "content": "d"}],
        [{"role": "assistant", "content": "e"}],
    )


@pytest.mark.parametrize("filler", [" ", "\n", "\n\n", "Human", "\n\nHuman", "\t\n"])
def test_a_text_that_almost_begins_a_turn_is_searched_once(filler):
    with pytest.raises(RowError, match="before the first"):
        parse_turns(filler * 200_000 + "x")
