"""Splits of the stage: by prompt over all kinds, and by the names of files and datasets."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from tests.prepare.publishing import manifest, pairs, prepare, prompts_by_split, quarantined, write


def test_a_prompt_is_in_the_same_split_in_every_kind(tmp_path: Path) -> None:
    prompts = [f"Q{n}" for n in range(30)]
    chats = [
        {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}],
            "label": True,
        }
        for prompt in prompts
    ]
    pairs = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts]
    published = prepare(
        tmp_path,
        {"format": "labels", "path": write(tmp_path / "a.jsonl", chats)},
        {"format": "comparisons", "path": write(tmp_path / "b.jsonl", pairs)},
    )
    labels, comparisons, distinct = (
        load_from_disk(str(published / kind)) for kind in ("labels", "comparisons", "prompts")
    )
    for split in ("train", "validation", "test"):
        expected = {row["prompt"] for row in comparisons[split]}
        assert {row["prompt"][0]["content"] for row in labels[split]} == expected
        assert {row["prompt"][0]["content"] for row in distinct[split]} == expected
        assert len(distinct[split]) == len(expected)


def test_names_of_files_decide_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "train.jsonl", pairs("A", "B", "C", "D"))
    write(folder / "test.jsonl", pairs("T", "U"))
    source = {"format": "comparisons", "path": str(folder)}
    published = prepare(tmp_path, source, splits={"validation": 0, "test": 0.5})
    expected = {"train": ["A", "B", "C", "D"], "validation": [], "test": ["T", "U"]}
    for kind in ("comparisons", "demonstrations", "prompts"):
        assert prompts_by_split(published, kind) == expected
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"  {folder}: split by the names of its files: test is test.jsonl; "
        "'splits' holds validation out of the others"
    )
    found = prompts_by_split(
        prepare(tmp_path, source, splits={"validation": 0.25, "test": 0.5}, force=True), "comparisons"
    )
    assert (len(found["validation"]), found["test"]) == (1, ["T", "U"])
    write(folder / "dev.jsonl", pairs("V"))
    published = prepare(tmp_path, source, splits={"validation": 0.25, "test": 0.5}, force=True)
    assert prompts_by_split(published, "comparisons") == expected | {"validation": ["V"]}


def test_a_prompt_of_two_files_stays_held_out(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "train.jsonl", [*pairs("A", "T"), {"prompt": "T", "chosen": "b", "rejected": "a"}])
    write(folder / "test.jsonl", [*pairs("T"), {"prompt": "A", "chosen": "", "rejected": "a"}])
    other = {"format": "prompts", "path": write(tmp_path / "more.jsonl", [{"prompt": "T"}, {"prompt": "Z"}])}
    published = prepare(tmp_path, {"format": "comparisons", "path": str(folder)}, other)
    assert prompts_by_split(published, "comparisons") == {"train": ["A"], "validation": [], "test": ["T"]}
    assert "T" in prompts_by_split(published, "prompts")["test"]
    assert [(entry["line"], entry["reason"]) for entry in quarantined(published)] == [
        (2, "empty-text"),
        (2, "held-out"),
        (3, "held-out"),
    ]
    assert quarantined(published)[1]["detail"] == "its prompt is in a file that is held out for test"
    counts = manifest(published)["rows"]
    assert (counts["read"], counts["kept"]) == (7, 4)


def test_rows_of_a_ranking_are_not_merged_over_splits(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    for name, prompt in (("train", "Q"), ("test", "Q"), ("train-2", "R")):
        ranked = [{"prompt": prompt, "response": text, "rank": rank} for rank, text in ((1, "a"), (2, "b"))]
        write(folder / f"{name}.jsonl", ranked)
    published = prepare(tmp_path, {"format": "rankings", "path": str(folder)}, splits={"validation": 0})
    assert prompts_by_split(published, "rankings") == {"train": ["R"], "validation": [], "test": ["Q"]}
    assert manifest(published)["rows"]["quarantined"] == {"held-out": 2}


def test_the_splits_of_a_saved_dataset_that_are_not_read_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Dataset.from_dict({"prompt": ["Q", "R"]})
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "saved")
    prepare(tmp_path, {"format": "prompts", "path": str(tmp_path / "saved")})
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"  {tmp_path}/saved: read split train; not read: test; 'split' of a source picks one"
    )
