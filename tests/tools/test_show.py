"""`rlhf show` prints an artifact, the state of a run, and how two differ; it finds what was altered."""

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline import config
from pipeline.artifacts import files
from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import read_manifest, work_folder
from pipeline.artifacts.seals import seal_folder
from pipeline.cli import main
from pipeline.formatting.numbers import format_age, format_size


def test_sections_and_values(tiny_records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(tiny_records)
    assert main(["show", str(tiny_records), "--verify"]) == 0
    first, inputs, rows, metrics, versions = capsys.readouterr().out.rstrip().split("\n\n")
    (name,) = manifest["inputs"]
    assert first.splitlines() == [
        str(tiny_records),
        "  kind        records",
        "  stage       prepare",
        "  seed        0",
        f"  created_at  {manifest['created_at']}",
        f"  identity    {manifest['identity']}",
        f"  files       {len(manifest['files'])}, all read again, none altered",
    ]
    assert inputs == f"inputs\n  {name}  {name}  {manifest['inputs'][name]['identity']}"
    assert rows.splitlines()[1].split() == ["read", "135"]
    assert metrics.splitlines()[1].split() == [
        "comparisons.train",
        str(manifest["metrics"]["comparisons.train"]),
    ]
    assert versions.splitlines()[1].split() == ["python", manifest["versions"]["python"]]


def test_verify_finds_what_size_and_time_hide(
    tiny_records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "SETTLED", 0)
    # Stands for a file system that does not keep the time of change.
    monkeypatch.setattr(files, "_stamp", lambda file: (file.stat().st_size, file.stat().st_mtime_ns, 0, 0, 0))
    folder = shutil.copytree(tiny_records, tmp_path / "prepare")
    assert main(["show", str(folder)]) == 0
    file = folder / "config.yaml"
    stat = file.stat()
    file.write_bytes(b"#" + file.read_bytes()[1:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["show", str(folder)]) == 0
    assert main(["show", str(folder), "--verify"]) == 2
    assert f"{folder}: config.yaml was altered" in capsys.readouterr().err


def test_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "none")]) == 2
    assert (
        f"{tmp_path}/none: does not exist; expected a run, such as runs/demo, or" in capsys.readouterr().err
    )


def test_what_is_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: contains nothing that a stage wrote; expected a run, such as runs/demo, "
        f"or a folder that a stage wrote, "
        "such as runs/demo/reward\n"
    )


def made(folder: Path, stage: str, metrics: dict, *inputs: str, text: str = "made", **settings) -> Path:
    """A stage of the run `folder`, from other stages of it, made without a model."""
    values = (
        {"run": folder.name, "runs": str(folder.parent)}
        | ({"model": "scratch"} if stage in ("sft", "reward") else {})
        | settings
    )
    loaded = config.STAGES[stage](**values)
    opened = {
        name: require_artifact(folder / name, read_manifest(folder / name)["kind"], "again")
        for name in inputs
    }

    def make(output: Path, work: Path) -> dict:
        (output / "model.safetensors").write_text(text)
        return {"metrics": metrics}

    return build_artifact(
        loaded, kind="reward" if stage == "reward" else "policy", inputs=opened, make=make, log=lambda _: None
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made(tmp_path / "a", "sft", {"eval_loss": 0.25})
    made(tmp_path / "a", "reward", {"comparisons": {"accuracy": 0.75, "margin": 1.5}}, "sft")
    return tmp_path / "a"


def table_of(shown: str) -> dict[str, list[str]]:
    """By stage the cells of the first table, which two blanks keep apart."""
    lines = shown.split("\n\n")[1].splitlines()[1:]
    return {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines)
    }


def identity(folder: Path) -> str:
    return read_manifest(folder)["identity"][:8]


def test_a_run_is_told_stage_by_stage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run), "--verify"]) == 0
    shown = capsys.readouterr().out
    found, sizes = (
        table_of(shown),
        {stage: sum(file.stat().st_size for file in (run / stage).iterdir()) for stage in ("sft", "reward")},
    )
    assert found["prepare"] == ["skipped", "0 B"]  # what follows was made without it
    assert found["ppo"] == ["not made", "0 B"]
    for stage, figures in (("sft", "loss 0.25"), ("reward", "accuracy 0.75")):
        assert found[stage][0] == "done"
        assert found[stage][-3:] == [format_size(sizes[stage]), identity(run / stage), figures]
    assert shown.startswith(f"{run}: {format_size(sum(sizes.values()))}\n")
    assert shown.split("\n\n")[2].splitlines()[2] == f"reward  sft {identity(run / 'sft')}"


def test_what_is_altered_or_made_from_another_input_than_there_is_now(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    was = identity(run / "sft")
    made(run, "sft", {}, text="made anew", seed=1, force=True)
    moved = run.rename(run.with_name("moved"))  # its manifests name inputs by where they were
    assert main(["show", str(moved)]) == 0
    shown = capsys.readouterr().out
    assert [table_of(shown)[stage][0] for stage in ("sft", "reward")] == ["done", "out of date"]
    assert shown.rstrip().splitlines()[-1] == f"reward: sft was {was}, and {moved}/sft has changed since"
    (moved / "sft" / "model.safetensors").write_text("touched")
    assert main(["show", str(moved)]) == 0
    shown = capsys.readouterr().out
    assert table_of(shown)["sft"][0] == "altered"
    assert "sft: model.safetensors was altered: its SHA-256 is" in shown


def test_an_interrupted_stage_shows_the_step_it_resumes_from(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("reward", "ppo"):  # one that was published before, and one that was not
        for step in (20, 30, 40):  # nothing resumes from the last step
            checkpoint = work_folder(run / stage) / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 40}))
            if step != 30:  # it was being saved when the run was killed
                seal_folder(checkpoint, step)
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert table_of(shown)["ppo"][::2] == ["interrupted, resumes from step 20", "444 B"]
    assert table_of(shown)["reward"][0] == "done"
    assert shown.rstrip().splitlines()[-1] == "reward: made again: interrupted, resumes from step 20"
    with FileLock(run / ".lock"):
        assert main(["show", str(run)]) == 0
    assert table_of(capsys.readouterr().out)["ppo"][0] == "running, past step 20"


def test_two_runs_differ_in_settings_and_headlines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.with_name("b")
    made(other, "sft", {"eval_loss": 0.5}, seed=3, training={"learning_rate": 0.001})
    made(other, "reward", {"comparisons": {"accuracy": 0.75, "margin": 2.0}}, "sft")
    made(other, "ppo", {}, "sft")
    assert main(["show", str(run), str(other)]) == 0
    alone, settings, figures, hint = capsys.readouterr().out.rstrip().split("\n\n")
    assert alone == f"ppo: only in {other}"
    assert [line.split() for line in settings.splitlines()] == [
        ["settings", str(run), str(other)],
        ["sft.seed", "0", "3"],
        ["sft.training", "{}", "–"],
        ["sft.training.learning_rate", "–", "0.001"],
    ]
    assert [line.split() for line in figures.splitlines()[1:]] == [["sft.loss", "0.25", "0.5", "+0.25"]]
    assert hint == f"all metrics of a stage: rlhf show {run}/reward {other}/reward"
    assert main(["show", str(run / "reward"), str(other / "reward")]) == 0
    settings, figures = capsys.readouterr().out.rstrip().split("\n\n")
    assert settings == "settings: the same"
    assert [line.split() for line in figures.splitlines()[1:]] == [
        ["reward.comparisons.margin", "1.5", "2", "+0.5"]
    ]


def test_what_is_altered_is_not_told_to_be_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run, run.with_name("b"))
    (other / "reward" / "model.safetensors").write_text("something else")
    assert main(["show", str(run), str(other)]) == 0
    notes, *_ = capsys.readouterr().out.split("\n\n")
    assert notes.startswith(f"{other}/reward: altered, model.safetensors was altered: its SHA-256 is")
    assert notes.count("\n") == 0


@pytest.mark.parametrize("names", [("a", "a/sft"), ("a/sft", "a/reward")])
def test_what_cannot_be_compared(
    names: tuple[str, str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *(str(run.parent / name) for name in names)]) == 2
    assert "expected two runs, or two artifacts of one stage" in capsys.readouterr().err


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two KL coefficients with two seeds each, a run without ppo, and a second run of one seed."""
    for kl, seed, gold, tokens in (
        (1, 0, 0.25, 20.0),
        (1, 1, 0.75, 22.0),
        (2, 0, 0.5, 10.0),
        (2, 1, 0.5, 12.5),
    ):
        name = tmp_path / f"kl-{kl}-{seed}"
        made(name, "sft", {"eval_loss": 0.5}, seed=seed)
        made(name, "reward", {"comparisons": {"accuracy": 0.5 + seed / 4}}, "sft", seed=seed)
        metrics = {"eval_gold_reward": gold, "eval_response_tokens": tokens}
        made(name, "ppo", metrics, "sft", "reward", seed=seed, training={"kl_coef": float(kl)})
    made(tmp_path / "kl-3", "reward", {"comparisons": {"accuracy": 1.0}})
    shutil.copytree(tmp_path / "kl-1-1", tmp_path / "kl-1-1-again")
    return tmp_path


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]


def test_more_runs_are_a_table_with_means_over_seeds(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep)
    names = ["kl-1-0", "kl-1-1", "kl-2-0", "kl-2-1", "kl-3", "kl-1-1-again"]
    assert main(["show", *names]) == 0
    runs, means = capsys.readouterr().out.rstrip().split("\n\n")
    assert cells_of(runs) == [
        ["reward", "ppo"],
        ["run", "accuracy", "gold reward", "tokens"],
        ["kl-1-0", "0.5", "0.25", "20"],
        ["kl-1-1", "0.75", "0.75", "22"],
        ["kl-2-0", "0.5", "0.5", "10"],
        ["kl-2-1", "0.75", "0.5", "12.5"],
        ["kl-3", "1", "–", "–"],
        ["kl-1-1-again", "0.75", "0.75", "22"],
    ]
    assert cells_of(means) == [  # of two values, a standard deviation is their difference by √2
        ["reward", "ppo"],
        ["mean ± standard deviation over seeds", "n", "accuracy", "gold reward", "tokens"],
        ["kl-1-*", "2", "0.625 ± 0.18", "0.5 ± 0.35", "21 ± 1.4"],
        ["kl-2-*", "2", "0.625 ± 0.18", "0.5 ± 0", "11.25 ± 1.8"],
    ]


def test_a_table_of_two_and_of_one_stage(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweep)
    assert main(["show", "--table", "kl-1-0/reward", "kl-2-1/reward"]) == 0
    runs, means = capsys.readouterr().out.rstrip().split("\n\n")
    assert cells_of(runs)[1:] == [["run", "accuracy"], ["kl-1-0/reward", "0.5"], ["kl-2-1/reward", "0.75"]]
    assert cells_of(means)[2] == ["kl-*", "2", "0.625 ± 0.18"]
    (sweep / "kl-1-0" / "ppo" / "model.safetensors").write_text("something else")
    assert main(["show", "--table", "kl-1-0"]) == 0
    assert "\n\nkl-1-0/ppo: altered, model.safetensors was altered" in capsys.readouterr().out


def test_a_name_is_a_run_in_runs(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = run.parent / "place"
    (place / "runs").mkdir(parents=True)
    run.rename(place / "runs" / "a")
    (place / "a").mkdir()  # a recipe of this name
    monkeypatch.chdir(place)
    assert main(["show", "a"]) == 0
    assert capsys.readouterr().out.startswith("runs/a: ")


def test_ages_and_sizes() -> None:
    ages = {
        None: "",
        0: "now",
        1.5: "now",
        2.5: "2 seconds",
        119.5: "119 seconds",
        7199: "119 minutes",
        172700: "47 hours",
        172900: "2 days",
    }
    assert [format_age(seconds) for seconds in ages] == list(ages.values())
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 2_150_000: "2.1 MB", 5e15: "5000.0 TB"}
    assert [format_size(count) for count in sizes] == list(sizes.values())
