"""`rlhf init` copies a recipe that runs as it is, and refuses what it cannot write."""

import re
from pathlib import Path

import pytest

from pipeline import config
from pipeline.cli import main


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", config.recipes())
def test_a_copy_says_what_the_recipe_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mine", "--from", name]) == 0
    shipped_files = {stage: config.RECIPES / name / f"{stage}.yaml" for stage in config.STAGES}
    stages = [stage for stage, file in shipped_files.items() if config.find_stage_file(file).exists()]
    assert set(config.STAGES) - set(stages) <= {"reward"}  # answer-key trains none
    files = ", ".join(f"{stage}.yaml" for stage in stages)
    assert capsys.readouterr().out == f"mine: a copy of {name}: {files}\nnext: rlhf run --recipe mine\n"
    for stage in stages:
        copy = config.load(stage, Path("mine", f"{stage}.yaml"))
        shipped = config.load(stage, shipped_files[stage], run="mine")
        assert copy.run == "mine"
        if stage == "prepare":
            for mine, theirs in zip(copy.source, shipped.source, strict=True):
                assert mine.format == theirs.format
                if theirs.path and Path(theirs.path).exists():
                    assert Path(mine.path).read_bytes() == Path(theirs.path).read_bytes()
            assert copy.splits == shipped.splits
        else:
            assert copy.resolved() == shipped.resolved()


def test_comments_data_and_small_versions_are_kept() -> None:
    assert main(["init", "sub/mine", "--from", "toxicity"]) == 0
    shipped = config.RECIPES / "toxicity"
    names = {path.relative_to(shipped).as_posix() for path in shipped.rglob("*") if path.is_file()}
    copied = {
        path.relative_to("sub/mine").as_posix() for path in Path("sub/mine").rglob("*") if path.is_file()
    }
    assert copied == names - {"recipe.yaml"} | {f"{stage}.yaml" for stage in config.STAGES}
    text = Path("sub/mine/tiny/ppo.yaml").read_text()
    assert "# The gold reward is 1 if nobody is insulted." in text
    (schema,) = re.findall(r"\$schema=(\S+)", text)
    assert Path("sub/mine/tiny", schema).resolve() == config.RECIPES / "schemas" / "ppo.json"
    assert main(["run", "sub/mine", "--tiny", "--until", "prepare", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("there",), "init there: exists already; choose another name, or remove it first"),
        (("link",), "init link: exists already"),
        (("demo",), "init demo: is the name of a shipped recipe, which it would hide; choose another"),
        (("a b",), "init a b: 'a b' cannot be the name of a run; expected letters, digits, _, . and -"),
        ((".mine",), "'.mine' cannot be the name of a run"),
        (
            ("mine", "--from", "dmo"),
            "--from dmo: no such recipe; did you mean 'demo'?; there are: answer",
        ),
    ],
)
def test_what_it_cannot_write_is_one_line(
    argv: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("there").mkdir()
    Path("link").symlink_to("nowhere")
    assert main(["init", *argv]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}
    assert not any(Path("there").iterdir())
