"""Sources: folders, saved datasets and the hub, and what cannot be read at all by its message."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipeline.config import Source
from pipeline.data.readers import read_source
from pipeline.data.sources import source_files
from pipeline.errors import UserError
from tests.data.reading import jsonl, read, records


def test_a_split_of_a_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q"}')
    with pytest.raises(
        UserError,
        match=r"a\.jsonl: split='test' is only read from a hub dataset, a save_to_disk folder or a folder",
    ):
        read("prompts", tmp_path / "a.jsonl", split="test")


def test_a_folder_is_read_in_order_and_limited(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}1"}, {"prompt": f"{name}2"}])
    (tmp_path / "LICENSE").write_text("MIT", encoding="utf-8")
    (tmp_path / ".hidden.json").write_text("{}", encoding="utf-8")
    items = read("prompts", tmp_path, limit=3)
    assert [(Path(item.rows[0].source).name, item.record["prompt"]) for item in items] == [
        ("a.jsonl", "a1"),
        ("a.jsonl", "a2"),
        ("b.jsonl", "b1"),
    ]


CLASSES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["fine", "rude"])}
)


def test_a_saved_dataset_gives_class_names(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=CLASSES)
    datasets.DatasetDict(train=data.select([0]), test=data).save_to_disk(tmp_path / "dict")
    found = records("labels", tmp_path / "dict", split="test")
    assert [(record["completion"], record["label"]) for record in found] == [
        ("a", "rude"),
        ("b", "fine"),
        ("c", -1),
    ]
    data.save_to_disk(tmp_path / "one")
    assert len(records("labels", tmp_path / "one")) == 3
    assert source_files(Source(format="labels", path=str(tmp_path / "one"))) == [tmp_path / "one"]
    with pytest.raises(
        UserError, match=r"dict: no split 'dev', found train, test; set 'split' of the source"
    ):
        read("labels", tmp_path / "dict", split="dev")


def test_media_of_a_dataset_are_not_decoded(tmp_path: Path) -> None:
    row = {"prompt": "Q", "image": {"bytes": b"no image", "path": None}, "more": {"a": [1, "x"]}}
    types = {"prompt": datasets.Value("string"), "image": datasets.Image(), "more": datasets.Json()}
    columns = {name: [value] for name, value in row.items()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).save_to_disk(tmp_path / "saved")
    (item,) = read("prompts", tmp_path / "saved", ignore=["image"])
    assert item.fault is None
    assert item.rows[0].data == row


def test_a_hub_dataset_is_asked_for_its_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"prompt": ["Q", "R"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items = read_source(
        Source(format="prompts", hub="org/name", subset="en", split="test", revision="abc", limit=1)
    )
    assert asked == [(("org/name", "en"), {"split": "test", "revision": "abc"})]
    assert [(item.record, item.rows[0].source, item.rows[0].line) for item in items] == [
        ({"prompt": "Q"}, "org/name", 1)
    ]


def test_a_hub_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/nmae' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError,
        match=r"^org/nmae: not readable as a dataset: Dataset 'org/nmae' doesn't exist on the Hub; check hub",
    ):
        read_source(Source(format="prompts", hub="org/nmae"))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("no.csv", None, {}, r"no\.csv: no such file or folder"),
        ("a.doc", "prompt\nQ\n", {}, r"a\.doc: expected \.csv, .*\.parquet, a folder .* found a\.doc"),
        ("a.json", '[{"prompt": ]', {}, r"a\.json: not valid JSON after row 0: the array does not end"),
        ("a.parquet", "PAR0", {}, r"a\.parquet: not readable as Parquet"),
        (
            "a.csv",
            "promt,b\nQ,R\n",
            {},
            "needs a column 'prompt', found promt, b; use columns: {prompt: promt}",
        ),
        ("a.csv", "a,b\nQ,R\n", {}, "needs a column 'prompt', found a, b; use columns: {prompt: THEIRS}"),
        (
            "a.json",
            '{\n "data": [{"prompt": "Q"}]}',
            {},
            r"a\.json: expected an array of objects, or an object per line; found an object over several",
        ),
        (
            "a.csv",
            "question\nQ\n",
            {"prompt": "qestion"},
            r"columns maps 'prompt' to 'qestion', found question; did you mean 'question'\?",
        ),
    ],
)
def test_unreadable_sources(
    tmp_path: Path, name: str, content: str | None, options: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read("prompts", tmp_path / name, columns=options)
    assert "\n" not in str(caught.value)


def test_a_mapping_to_an_unknown_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nQ,a\n", encoding="utf-8")
    message = r"columns maps 'promt', expected one of prompt, completion, .*; did you mean 'prompt'\?"
    with pytest.raises(UserError, match=message):
        read("demonstrations", tmp_path / "a.csv", columns={"promt": "prompt"})


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        read("prompts", tmp_path)


def test_a_dataset_that_is_cut_is_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"prompt": ["Q" * 1000] * 500}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"saved: not readable as a dataset: .*; save it again"):
        read("prompts", tmp_path / "saved")
