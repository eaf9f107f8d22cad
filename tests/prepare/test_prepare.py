"""The stage: what is published, derived and printed."""

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, load_from_disk

from pipeline.data.files import READERS
from pipeline.errors import UserError
from pipeline.prepare import demo, derived
from tests.prepare.publishing import (
    Q,
    kinds,
    manifest,
    pairs,
    prepare,
    quarantined,
    rows_of,
    write,
)


def test_comparisons_are_published_split_and_derived_from(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    published = prepare(
        tmp_path,
        {"format": "comparisons", "path": write(tmp_path / "a.jsonl", rows)},
        splits={"validation": 0.1, "test": 0.2},
    )
    assert kinds(published) == ["comparisons", "demonstrations", "prompts"]
    data = load_from_disk(str(published / "comparisons"))
    assert isinstance(data, DatasetDict)
    assert {split: len(part) for split, part in data.items()} == {"train": 14, "validation": 2, "test": 4}
    assert data["train"].column_names == ["prompt", "chosen", "rejected"]
    assert sorted(row["prompt"] for row in rows_of(published, "comparisons")) == sorted(
        row["prompt"] for row in rows
    )
    found = manifest(published)
    assert found["kind"] == "records"
    assert found["rows"] == {
        "read": 20,
        "kept": 20,
        "merged": 0,
        "quarantined": {},
        "by_source": {str(tmp_path / "a.jsonl"): {"read": 20, "kept": 20, "merged": 0, "quarantined": {}}},
        "derived": {"demonstrations": 20, "prompts": 20},
    }
    assert found["metrics"]["comparisons.test"] == found["metrics"]["prompts.test"] == 4
    assert quarantined(published) == []


def test_rankings_give_comparisons_and_demonstrations(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "responses": ["b", "a", "c"], "ranks": [2, 1, 2]}]
    published = prepare(tmp_path, {"format": "rankings", "path": write(tmp_path / "a.jsonl", rows)})
    assert rows_of(published, "rankings") == rows
    assert rows_of(published, "comparisons") == [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": "a", "rejected": "c"},
    ]
    assert rows_of(published, "demonstrations") == [{"prompt": "Q", "completion": "a"}]
    assert manifest(published)["rows"]["derived"] == {"comparisons": 2, "demonstrations": 1, "prompts": 1}


def test_conversations_that_part_early_are_pairs_of_conversations(tmp_path: Path) -> None:
    def conversation(first: str, last: str) -> list[dict[str, str]]:
        texts = zip(("user", "assistant") * 2, ("Q", first, "So?", last), strict=True)
        return [{"role": role, "content": text} for role, text in texts]

    chosen, rejected = conversation("Hm.", "good"), conversation("Eh.", "bad")
    path = write(tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": rejected}])
    published = prepare(tmp_path, {"format": "dialogues", "path": path})
    assert rows_of(published, "comparisons") == [
        {"prompt": Q, "chosen": chosen[1:], "rejected": rejected[1:]}
    ]
    assert rows_of(published, "demonstrations") == [{"prompt": Q, "completion": chosen[1:2]}]
    assert rows_of(published, "prompts") == [{"prompt": Q}]


def test_what_a_source_gives_is_not_derived(tmp_path: Path) -> None:
    pairs = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "a", "rejected": "b"}])
    other = write(tmp_path / "b.jsonl", [{"prompt": "P", "completion": "c"}])
    published = prepare(
        tmp_path,
        {"format": "comparisons", "path": pairs},
        {"format": "demonstrations", "path": other},
        {"format": "prompts", "path": other},
    )
    assert rows_of(published, "demonstrations") == [{"prompt": "P", "completion": "c"}]
    assert rows_of(published, "prompts") == [{"prompt": "P", "completion": "c"}]


def test_strings_become_messages_where_any_text_of_the_kind_is(tmp_path: Path) -> None:
    rows = [{"prompt": "P", "chosen": "a", "rejected": "b"}, {"prompt": Q, "chosen": "a", "rejected": "b"}]
    ranked = [{"prompt": Q, "responses": ["a", "b"], "ranks": [1, 2]}]
    published = prepare(
        tmp_path,
        {"format": "comparisons", "path": write(tmp_path / "a.jsonl", rows)},
        {"format": "rankings", "path": write(tmp_path / "b.jsonl", ranked)},
        {"format": "labels", "path": write(tmp_path / "c.jsonl", [{"text": "t", "label": 0}])},
    )
    answer = {"role": "assistant", "content": "a"}
    for row in rows_of(published, "comparisons"):
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert row["chosen"] == [answer]
    assert rows_of(published, "rankings")[0]["responses"] == [
        [answer],
        [{"role": "assistant", "content": "b"}],
    ]
    assert rows_of(published, "labels") == [{"prompt": "", "completion": "t", "label": 0}]


def test_labels_carry_their_names_and_an_empty_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,toxic\nfine,no\nrude,yes\nodd,maybe\n", encoding="utf-8")
    source = {
        "format": "labels",
        "path": str(tmp_path / "a.csv"),
        "columns": {"label": "toxic"},
        "classes": ["yes", "no"],
    }
    published = prepare(tmp_path, source)
    assert sorted((row["completion"], row["label"]) for row in rows_of(published, "labels")) == [
        ("fine", 1),
        ("rude", 0),
    ]
    assert load_from_disk(str(published / "labels"))["test"].features["label"] == ClassLabel(
        names=["yes", "no"]
    )
    assert kinds(published) == ["labels"]


def test_a_missing_margin_is_missing_when_the_records_are_read_again(tmp_path: Path) -> None:
    rows = [
        {"prompt": "P", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": "Q", "chosen": "a", "rejected": "b", "source": "web"},
    ]
    published = prepare(tmp_path, {"format": "comparisons", "path": write(tmp_path / "a.jsonl", rows)})
    found = {row["prompt"]: (row["margin"], row["source"]) for row in rows_of(published, "comparisons")}
    assert found == {"P": (2.0, None), "Q": (None, "web")}

    saved = str(published / "comparisons")
    votes = write(tmp_path / "b.jsonl", [row | {"margin": 4} for row in rows])
    sources = [{"format": "comparisons", "path": path} for path in (saved, votes)]
    merged = prepare(tmp_path / "again", *sources)
    assert {row["prompt"]: row["margin"] for row in rows_of(merged, "comparisons")} == {"P": 3.0, "Q": 4.0}


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"format": "prompts", "path": write(tmp_path / "a.jsonl", [{"prompt": "Q"}])}
    first = manifest(prepare(tmp_path, source))
    capsys.readouterr()
    assert manifest(prepare(tmp_path, source)) == first
    assert "unchanged" in capsys.readouterr().out
    write(tmp_path / "a.jsonl", [{"prompt": "R"}])
    published = prepare(tmp_path, source)
    assert rows_of(published, "prompts") == [{"prompt": "R"}]
    assert manifest(published)["identity"] != first["identity"]


def test_the_same_seed_gives_the_same_bytes_and_another_other_splits(tmp_path: Path) -> None:
    source = {
        "format": "prompts",
        "path": write(tmp_path / "a.jsonl", [{"prompt": f"Q{n}"} for n in range(50)]),
    }
    first, again, other = (
        manifest(prepare(tmp_path / name, source, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    data = {name: digest for name, digest in first["files"].items() if name != "config.yaml"}
    assert data == {name: digest for name, digest in again["files"].items() if name != "config.yaml"}
    assert first["identity"] == again["identity"] != other["identity"]


def test_nothing_to_keep_names_the_reasons_and_leaves_what_was_there(tmp_path: Path) -> None:
    source = {"format": "prompts", "path": write(tmp_path / "a.jsonl", [{"prompt": "Q"}])}
    published = prepare(tmp_path, source)
    write(tmp_path / "a.jsonl", [{"prompt": ""}, {"prompt": 3}, {"prompt": " "}])
    with pytest.raises(
        UserError,
        match=(
            r"of 3 rows none can be kept \(empty-text 2, not-text 1\); .*a\.jsonl:1: prompt: is "
            r"empty or blank; check"
        ),
    ):
        prepare(tmp_path, source)
    assert rows_of(published, "prompts") == [{"prompt": "Q"}]
    write(tmp_path / "a.jsonl", [])
    with pytest.raises(UserError, match=r"a\.jsonl: holds no rows; check path"):
        prepare(tmp_path, source)
    rows = [{"prompt": f"R{n}"} for n in range(5)]
    with pytest.raises(
        UserError, match=r"a\.jsonl: holds no rows; check path"
    ):  # beside a source that does hold some
        prepare(
            tmp_path, {"format": "prompts", "path": write(tmp_path / "b.jsonl", rows)}, source, force=True
        )
    write(tmp_path / "a.jsonl", rows[:2])  # a source that says nothing new is no mistake
    published = prepare(
        tmp_path, {"format": "prompts", "path": str(tmp_path / "b.jsonl")}, source, force=True
    )
    assert manifest(published)["rows"]["quarantined"] == {"duplicate": 2}


def test_it_says_what_was_kept_and_what_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.parquet.gz", "c.txt"):
        write(tmp_path / "data" / name, [{"prompt": "Q"}, {"prompt": ""}, {"prompt": 3}])
    for _ in range(2):  # made, and reused
        prepare(tmp_path, {"format": "prompts", "path": str(tmp_path / "data")})
        assert capsys.readouterr().out.splitlines()[-2:] == [
            f"  1 of 3 rows kept; quarantined: empty-text 1, not-text 1; see "
            f"{tmp_path}/runs/test/prepare/quarantine.jsonl",
            f"  {tmp_path}/data: skipped a.parquet.gz, c.txt; expected {', '.join(READERS)}",
        ]
    prepare(
        tmp_path, {"format": "prompts", "path": str(tmp_path / "data" / "b.jsonl"), "limit": 1}, force=True
    )
    assert capsys.readouterr().out == "  1 of 1 rows kept\n"


def test_it_says_what_was_not_read_and_which_labels_are_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"Q{n}", "completion": "a", "label": label, "id": n}
        for n, label in enumerate([True, 1, 0])
    ]
    published = prepare(tmp_path, {"format": "labels", "path": write(tmp_path / "a.jsonl", rows)})
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"  {tmp_path}/a.jsonl: columns that are not read: id",
        "  labels: one class in several spellings: true is '1' 1, 'true' 1",
        "  3 of 3 rows kept",
    ]
    found = {row["prompt"]: row["label"] for row in rows_of(published, "labels")}
    assert found == {"Q0": 1, "Q1": 1, "Q2": 0}


def test_a_source_that_the_run_would_replace_is_refused(tmp_path: Path) -> None:
    published = prepare(
        tmp_path, {"format": "prompts", "path": write(tmp_path / "a.jsonl", [{"prompt": "Q"}])}
    )
    with pytest.raises(
        UserError, match=r"quarantine\.jsonl: is inside .*/test/prepare, which this run replaces"
    ):
        prepare(tmp_path, {"format": "prompts", "path": str(published / "quarantine.jsonl")})


def test_the_pairs_of_many_ranked_responses_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(derived, "MAX_PAIRS", 40)
    responses = [f"r{n}" for n in range(20)]
    rows = [{"prompt": "Q", "responses": responses, "ranks": list(range(1, 21))}]
    published = prepare(tmp_path, {"format": "rankings", "path": write(tmp_path / "a.jsonl", rows)})
    line = "  of 1 rankings an even selection of pairs is kept, at most 40 of each"
    assert capsys.readouterr().out.splitlines()[0] == line
    found = rows_of(published, "comparisons")
    assert len(found) == 38  # each fifth of 190
    assert all(int(row["chosen"][1:]) < int(row["rejected"][1:]) for row in found)
    assert len({row["chosen"] for row in found}) > 10


def test_a_kind_with_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    rows = pairs(*(f"Q{n}" for n in range(40)))
    source = {"format": "comparisons", "path": write(tmp_path / "a.jsonl", rows)}
    (held_out, *_) = load_from_disk(str(prepare(tmp_path, source) / "prompts"))["test"]["prompt"]
    with pytest.raises(UserError, match="all 1 prompts are held out, none is left to train on"):
        prepare(
            tmp_path,
            source,
            {"format": "prompts", "path": write(tmp_path / "b.jsonl", [{"prompt": held_out}])},
            force=True,
        )


def test_a_missing_file_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.jsonl: no such file or folder"):
        prepare(tmp_path, {"format": "prompts", "path": str(tmp_path / "no.jsonl")})
    assert not (tmp_path / "runs").exists()


def test_the_demo_world_goes_through_the_same_checks(tmp_path: Path) -> None:
    published = prepare(tmp_path, {"format": "demo"}, splits={"validation": 0.1, "test": 0.2})
    counts = manifest(published)["rows"]
    assert kinds(published) == ["comparisons", "demonstrations", "labels", "prompts", "rankings", "ratings"]
    assert counts["kept"] + counts["merged"] + sum(counts["quarantined"].values()) == counts["read"]
    assert {"empty-text", "identical-answers", "not-a-rank", "not-finite", "not-text"} <= counts[
        "quarantined"
    ].keys()
    held_out = {row["prompt"] for row in load_from_disk(str(published / "comparisons"))["test"]}
    for kind in kinds(published):
        data = load_from_disk(str(published / kind))
        assert {row["prompt"] for row in data["test"]} <= held_out
        assert not held_out & {row["prompt"] for row in data["train"]}


def test_a_hub_dataset_is_read_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_at = []

    def load_dataset(*_: Any, revision: str | None, **__: Any) -> Dataset:
        read_at.append(revision)
        return Dataset.from_dict({"prompt": ["Q", "R"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for revision in ("c0ffee", "c0ffee", "decaf"):
        monkeypatch.setattr("pipeline.artifacts.hub.resolve_commit", lambda *_, commit=revision: commit)
        moved = revision == "decaf"  # what was made from the commit before is not replaced in silence
        published = prepare(tmp_path, {"format": "prompts", "hub": "org/name"}, force=moved)
        assert manifest(published)["inputs"]["org/name"]["revision"] == revision
    assert read_at == ["c0ffee", "decaf"]


def test_the_demo_rewards_know_no_other_question() -> None:
    with pytest.raises(UserError, match="'Where is it\\?': is no question of the demo world"):
        demo.gold_reward(["Where is it?"], ["Here."])
