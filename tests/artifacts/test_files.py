"""A file is read once to be hashed, and again when it changed."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.artifacts import files
from pipeline.artifacts.files import finite_or_none, hash_file, hash_files, write_json
from pipeline.errors import UserError


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(autouse=True)
def remembered(monkeypatch) -> None:
    """Small files, just written, are remembered too."""
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "SETTLED", 0)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files read to be hashed, in order."""
    names: list[str] = []
    original = hash_file

    def note(file: Path) -> str:
        names.append(file.name)
        return original(file)

    monkeypatch.setattr(files, "hash_file", note)
    return names


def test_hash_files_names_and_values(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.bin").write_text("b")
    (folder / "sub" / "a.bin").write_text("a")
    assert hash_files(folder) == {"b.bin": sha256("b"), "sub/a.bin": sha256("a")}
    assert hash_files(folder / "b.bin") == {"b.bin": sha256("b")}
    assert hash_files(folder) == {"b.bin": sha256("b"), "sub/a.bin": sha256("a")}


def test_unchanged_file_is_not_read_again_and_a_touched_one_is(tmp_path, read):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_text("a")
    (folder / "b.bin").write_text("b")
    hash_files(folder)
    assert read == ["a.bin", "b.bin"]
    hash_files(folder)
    assert read == ["a.bin", "b.bin"]
    (folder / "b.bin").write_text("c")
    os.utime(folder / "b.bin", ns=(0, 0))  # another mtime, whatever the clock's resolution
    assert hash_files(folder) == {"a.bin": sha256("a"), "b.bin": sha256("c")}
    assert read == ["a.bin", "b.bin", "b.bin"]
    assert os.listdir(tmp_path) == ["model"]  # the cache lies elsewhere


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a.bin": []}', "[" * 100_000, '{"a.bin": [[1, 2, 3, 4, -5], "beef"]}']
)
def test_broken_cache_is_read_past(tmp_path, monkeypatch, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").write_text("a")
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    hash_files(tmp_path / "model")
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_text(content)
    assert hash_files(tmp_path / "model") == {"a.bin": sha256("a")}


def test_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, read):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").write_text("a")
    (tmp_path / "cache").write_text(
        "a file where the folder should be"
    )  # stands for a read-only folder, which root could write
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    assert [hash_files(tmp_path / "model") for _ in range(2)] == [{"a.bin": sha256("a")}] * 2
    assert read == ["a.bin", "a.bin"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_has_no_numbers_that_are_not_finite(value, tmp_path):
    with pytest.raises(UserError, match=r"m\.json: a number to write is not finite"):
        write_json(tmp_path / "m.json", {"metrics": {"loss": [value]}})
    assert not (tmp_path / "m.json").exists()
    assert finite_or_none({"a": [1.5, value, "x"], "b": value}) == {"a": [1.5, None, "x"], "b": None}
