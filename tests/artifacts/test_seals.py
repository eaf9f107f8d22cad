"""A sealed folder: whatever is missing, added, cut or changed is found."""

import json
from pathlib import Path

import pytest

from pipeline.artifacts.seals import (
    find_damage,
    list_checkpoints,
    read_seal,
    replace_folder,
    restore_folder,
    seal_folder,
    sealed_steps,
)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-10"
    (folder / "sub").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"optimizer")
    (folder / "sub" / "part.bin").write_bytes(b"part")
    (tmp_path / "begun.json").write_text("{}")
    best = tmp_path / "best"
    best.mkdir()
    (best / "model").write_text("best of 5")
    seal_folder(best, 5)
    seal_folder(folder, 10, [tmp_path / "begun.json", best / "checkpoint.json"])
    return folder


def test_a_seal_names_each_file_and_what_lies_beside(sealed: Path) -> None:
    seal = read_seal(sealed)
    assert seal["step"] == 10
    assert sorted(seal["files"]) == ["optimizer.pt", "sub/part.bin"]
    assert seal["files"]["sub/part.bin"][0] == 4
    assert sorted(seal["beside"]) == ["begun.json", "best/checkpoint.json"]
    assert find_damage(sealed) is None
    (sealed / ".nfs0001").write_text("hidden files are not content")
    assert find_damage(sealed) is None


DAMAGES = {
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "sub/new is an addition: sub/new was added": lambda folder: (folder / "sub/new").write_text("x"),
    "optimizer.pt has 4 bytes, not 9": lambda folder: (folder / "optimizer.pt").write_bytes(b"opti"),
    "sub/part.bin was altered": lambda folder: (folder / "sub/part.bin").write_bytes(b"PART"),
    "it was not completely written": lambda folder: (folder / "checkpoint.json").unlink(),
    "checkpoint.json was altered": lambda folder: (folder / "checkpoint.json").write_text('{"step": 10'),
    "begun.json beside it is missing or was altered": lambda folder: (folder.parent / "begun.json").unlink(),
    "best beside it is missing or was altered": lambda folder: (folder.parent / "best/model").unlink(),
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_damage_is_named(expected: str, sealed: Path) -> None:
    DAMAGES[expected](sealed)
    assert find_damage(sealed) == expected.rpartition(": ")[2]


@pytest.mark.parametrize("entry", [None, [], [1], ["1", "a"], [True, "a"], {"size": 1}])
def test_a_seal_of_another_form_is_none(entry: object, sealed: Path) -> None:
    seal = json.loads((sealed / "checkpoint.json").read_text())
    seal["files"]["optimizer.pt"] = entry
    (sealed / "checkpoint.json").write_text(json.dumps(seal))
    assert read_seal(sealed) == {}
    assert sealed_steps(sealed.parent) == []


def test_an_evaluation_after_the_checkpoint_may_have_replaced_the_best(sealed: Path) -> None:
    for step, damage in ((12, None), (7, "best beside it is missing or was altered")):
        new = sealed.parent / ".best.new"
        new.mkdir()
        (new / "model").write_text(f"best of {step}")
        seal_folder(new, step)
        replace_folder(new, sealed.parent / "best")
        assert find_damage(sealed) == damage


def test_a_folder_that_lost_its_name_in_a_crash_gets_it_back(sealed: Path) -> None:
    best = sealed.parent / "best"
    best.rename(sealed.parent / ".best.old")
    assert find_damage(sealed) is None
    assert (best / "model").read_text() == "best of 5"
    (sealed.parent / ".best.old").mkdir()
    restore_folder(best)  # the new one is already there
    assert (best / "model").read_text() == "best of 5"


def test_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "other-3"):
        (tmp_path / name).mkdir()
    assert list(list_checkpoints(tmp_path)) == [9, 20, 100]


def test_what_cannot_be_read_is_an_error_and_not_damage(sealed: Path, monkeypatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        find_damage(sealed)
