"""Split invariants, over arbitrary groups, fractions and seeds."""

from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.schema import SPLITS
from pipeline.prepare import splits


def assign(groups: Iterable[str], fractions: dict[str, float], seed: int) -> dict[str, str]:
    """Return the split of each prompt, if none is named."""
    names = {splits.split_group({"prompt": name, "completion": name}, seed): name for name in groups}
    assigned = splits.assign_splits(dict.fromkeys(names, SPLITS), fractions)
    return {names[group]: split for group, split in assigned.items()}


GROUPS = st.sets(st.text("abcdef"), max_size=60)
FRACTION = st.floats(0, 0.95)


@given(GROUPS, FRACTION, FRACTION, st.integers(0, 1000))
def test_every_group_has_one_split_and_sizes_are_right(
    groups: set[str], validation: float, test: float, seed: int
) -> None:
    fractions = {"validation": validation, "test": test}
    assigned = assign(groups, fractions, seed)
    assert assigned.keys() == groups
    assert assigned == assign([*sorted(groups), *groups], fractions, seed)
    sizes = Counter(assigned.values())
    assert sizes["train"] >= (1 if groups else 0)
    for split, fraction in fractions.items():
        wanted = round(len(groups) * fraction)
        if fraction == 0:
            assert sizes[split] == 0
        elif validation + test < 0.9:
            assert (
                sizes[split]
                == (max(1, wanted) if len(groups) >= 3 else min(wanted, 1 if len(groups) > 1 else 0))
                or sizes["train"] == 1
            )
        if len(groups) >= 3 and fraction > 0:
            assert sizes[split] >= 1


def test_sizes_are_exact_and_the_seed_changes_who() -> None:
    groups = [f"prompt {n}" for n in range(1000)]
    first, again, other = (assign(groups, {"validation": 0.1, "test": 0.25}, seed) for seed in (1, 1, 2))
    assert Counter(first.values()) == {"train": 650, "validation": 100, "test": 250}
    assert first == again
    assert first != other
    assert Counter(other.values()) == Counter(first.values())


def test_few_groups() -> None:
    assert Counter(assign(["a", "b", "c"], {"validation": 0.1, "test": 0.1}, 0).values()) == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }
    assert Counter(assign(["a", "b"], {"validation": 0.1, "test": 0.1}, 0).values()) == {"train": 2}
    assert assign(["a"], {"validation": 0.9, "test": 0.9}, 0) == {"a": "train"}
    assert assign([], {"validation": 0.1, "test": 0.1}, 0) == {}


def test_the_group_is_the_prompt_or_else_the_completion() -> None:
    message = {"role": "user", "content": "Q"}
    assert (
        splits.split_key({"prompt": "Q", "completion": "a"}) == splits.split_key({"prompt": [message]}) == "Q"
    )
    assert splits.split_key({"prompt": "", "completion": "a"}) == "a"
    assert splits.split_key({"prompt": [message, message]}) != splits.split_key({"prompt": "Q"})


LOOKS = st.sampled_from(["{}", " {}", "{}\r\n", "{}\u200b", "\ufeff{}"])
TEXTS = st.builds(str.format, LOOKS, st.sampled_from(["caf\u00e9", "cafe\u0301", "tea", "milk", "water"]))
SYSTEM = st.sampled_from(
    [[], [{"role": "system", "content": "Be kind."}], [{"role": "system", "content": "No."}]]
)
PROMPTS = TEXTS | st.tuples(SYSTEM, TEXTS).map(lambda pair: [*pair[0], {"role": "user", "content": pair[1]}])


@given(st.lists(PROMPTS, min_size=1, max_size=30), st.integers(0, 9))
def test_a_question_is_in_one_split_however_it_is_asked(prompts, seed: int) -> None:
    records = [{"prompt": prompt} for prompt in prompts]
    questions = {splits.split_key(record) for record in records}
    assert questions <= {"caf\u00e9", "tea", "milk", "water"}
    assert len({splits.split_group(record, seed) for record in records}) == len(questions)
