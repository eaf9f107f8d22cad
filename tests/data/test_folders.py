"""The files of a folder, and the splits that their names say."""

from pathlib import Path

import pytest

from pipeline.data.folders import find_files
from pipeline.data.schema import SPLITS
from pipeline.errors import UserError


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("my_test.csv", "test"),
        ("Eval.csv.zst", "test"),
        ("pairs.dev.tsv", "validation"),
        ("validation2.json", "validation"),
        ("valid/part 1.jsonl", "validation"),
        ("latest.csv", None),
        ("contest-data.jsonl", None),
        ("retrain.json", None),
    ],
)
def test_words_of_a_name_say_its_split(tmp_path: Path, name: str, split: str | None) -> None:
    assert find_files(make(tmp_path, name)).files == {tmp_path / name: split}


def test_a_held_out_file_is_one_split_and_the_others_give_what_has_no_file(tmp_path: Path) -> None:
    group = find_files(make(tmp_path, "more.csv", "test.csv", "train.csv"))
    assert {file.name: group.splits_of(file) for file in group.files} == {
        "more.csv": ("train", "validation"),
        "train.csv": ("train", "validation"),
        "test.csv": ("test",),
    }
    assert [file.name for file in group.files] == ["more.csv", "train.csv", "test.csv"]
    assert group.describe(None) == [
        "split by the names of its files: test is test.csv; 'splits' holds validation out of the others"
    ]
    group = find_files(make(tmp_path, "dev/a.json", "dev/b.json"))
    assert group.splits_of(tmp_path / "train.csv") == ("train",)
    assert group.describe(None) == [
        "split by the names of its files: validation is 2 files, test is test.csv"
    ]


def test_files_to_train_on_alone_are_split_as_ever(tmp_path: Path) -> None:
    group = find_files(make(tmp_path, "train-0.csv", "train-1.csv"))
    assert [group.splits_of(file) for file in group.files] == [SPLITS, SPLITS]
    assert group.describe(None) == []


def test_side_files_are_no_rows_unless_they_are_named(tmp_path: Path) -> None:
    sides = ["README.md", "a.quarantine.jsonl", "config.json", "dataset_infos.json", "other/b.csv"]
    group = find_files(make(tmp_path, *sides, "a.csv", ".hidden.csv"))
    assert list(group.files) == [tmp_path / "a.csv"]
    assert group.skipped == ["README.md", "a.quarantine.jsonl", "config.json", "dataset_infos.json", "other"]
    assert list(find_files(tmp_path / "config.json").files) == [tmp_path / "config.json"]


def test_a_folder_data_is_read_if_nothing_is_beside_it(tmp_path: Path) -> None:
    group = find_files(make(tmp_path, "README.md", "data/test-0.csv", "data/notes.md"))
    assert (group.files, group.skipped) == (
        {tmp_path / "data/test-0.csv": "test"},
        ["README.md", "data/notes.md"],
    )
    group = find_files(make(tmp_path, "rows.csv"))
    assert (list(group.files), group.skipped) == ([tmp_path / "rows.csv"], ["README.md", "data"])


def test_a_split_picks_its_files(tmp_path: Path) -> None:
    make(tmp_path, "test.csv", "train.csv", "rows.csv")
    assert list(find_files(tmp_path, "test").files) == [tmp_path / "test.csv"]
    assert find_files(tmp_path, "test").describe("test") == ["read the files of split test alone"]
    with pytest.raises(UserError, match="no file is named 'validation', found train, test; check 'split'"):
        find_files(tmp_path, "validation")
    with pytest.raises(UserError, match=r"train_test\.csv: its name says train and test; rename it"):
        find_files(make(tmp_path, "train_test.csv"))
