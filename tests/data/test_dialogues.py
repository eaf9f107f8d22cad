"""Dialogues of any length are read in linear time."""

import pytest

from pipeline.data.dialogues import parse_dialogue, parse_turns
from pipeline.data.schema import RowError


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
