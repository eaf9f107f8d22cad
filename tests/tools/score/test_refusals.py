"""What the commands refuse in one line, before anything is lost."""

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline import RewardModel, cli
from tests.tools.score.commands import PARTIAL, PROMPTS, ROWS, jsonl, left, refusal


@pytest.mark.parametrize(
    "name",
    [".out.csv.tmp", ".out.csv.lock", str(PARTIAL), ".out.csv.quarantine.tmp", "out.csv.quarantine.jsonl"],
)
@pytest.mark.parametrize("link", [False, True])
def test_a_name_that_somebody_made_first_is_left_alone(
    name: str, link: bool, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(Path("in.jsonl"), [{"text": "good"}])
    Path("theirs").write_text("precious")
    if link:
        Path(name).symlink_to("theirs")
    else:
        Path(name).write_text("precious")
    before = left(Path())
    assert name in refusal(capsys, "score", model, source, "out.csv")
    assert (Path(name).read_text(), Path("theirs").read_text()) == ("precious", "precious")
    assert left(Path()) == before


def test_an_output_that_is_a_link_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(Path("in.jsonl"), [{"text": "good"}])
    Path("out.csv").symlink_to("theirs")
    line = refusal(capsys, "score", Path("runs/no/reward"), source, "out.csv", "--force")
    assert line == "error: --output out.csv: out.csv is a symbolic link; name another file"
    assert Path("out.csv").is_symlink()


@pytest.mark.parametrize(
    ("output", "text", "expected"),
    [
        ("out.tsv", None, "--output out.tsv: expected a name that ends in .csv, .jsonl, .parquet"),
        ("out", "text\na\n", "--output out: expected a name that ends in .csv, .jsonl, .parquet"),
        (
            "out.csv",
            None,
            "--input in.csv: does not exist; expected .csv, .tsv, .json, .jsonl, .ndjson, .parquet",
        ),
        ("in.csv", "text\na\n", "--output in.csv: is the input; name another file"),
        (
            "old.csv",
            "text\na\n",
            "--output old.csv: exists already; name another file, or add --force to replace it",
        ),
        (
            "out.csv",
            "prompt,respnse\na,b\n",
            "in.csv: score needs a column 'response' or 'completion' or 'text' or 'completions', found "
            "prompt, respnse; did you mean",
        ),
        (
            "out.csv",
            "text,reward\na,b\n",
            "in.csv: already has a column 'reward', which score would write; rename or remove it",
        ),
        ("out.csv", "text\n", "in.csv: none of its 0 rows can be read"),
        (
            "out.csv",
            "prompt,text\na,\n,  \n",
            "in.csv: none of its 2 rows can be read; line 2: response: is empty or blank",
        ),
        ("out.csv", 'text\n"torn', "in.csv:2: not valid CSV from here on"),
    ],
)
def test_refusals_come_before_anything_loads(
    output: str, text: str | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path("in.csv").write_text(text)
    Path("old.csv").write_text("kept")
    there = left(Path())
    assert expected in refusal(capsys, "score", Path("runs/no/reward"), Path("in.csv"), output)
    assert (left(Path()), Path("old.csv").read_text()) == (there, "kept")


def test_what_parquet_cannot_hold_is_told_before_anything_loads(capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(Path("in.jsonl"), [{"text": "a", "x": 1}, {"text": "b", "x": "one"}])
    assert "in.jsonl: cannot be written as Parquet: " in refusal(
        capsys, "score", Path("runs/no/reward"), source, "out.parquet"
    )


def test_models_are_checked_as_stages_check_them(
    model: Path, tiny_gpt2: Path, tiny_records: Path, capsys: Any
) -> None:
    source = jsonl(Path("in.jsonl"), PROMPTS)
    found = [
        refusal(capsys, "best-of-n", model, source, "out.csv", "--policy", str(policy))
        for policy in (model, "runs/no/sft")
    ]
    assert f"{model}: is of kind 'reward', expected 'policy'; run: rlhf run --until sft" in found[0]
    assert "runs/no/sft: does not exist; run: rlhf run --until sft" in found[1]
    assert cli.main(["compare", "--reward", str(tiny_records), "a", "b"]) == 2
    assert f"{tiny_records}: is of kind 'records', expected 'reward'" in capsys.readouterr().err
    assert cli.main(["compare", "--reward", str(model), "--positive-label", "good", "a", "b"]) == 2
    assert "positive_label='good' is none of its labels: reward" in capsys.readouterr().err
    assert cli.main(["compare", "--reward", str(model), "a", "b", " "]) == 2
    assert capsys.readouterr().err == "error: response 2 of 2: is empty or blank\n"


def test_an_output_has_one_writer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(Path("in.jsonl"), ROWS[:1])
    with FileLock(".out.csv.lock"):
        assert "--output out.csv: is being written by another process" in refusal(
            capsys, "score", model, source, "out.csv"
        )


def test_a_reward_that_is_no_number_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RewardModel, "score", lambda *given, **options: [1.0, float("nan")])
    assert f"{model}: gives the reward nan" in refusal(
        capsys, "score", model, jsonl(Path("in.jsonl"), ROWS[:2]), "out.csv"
    )
    assert PARTIAL.read_bytes().count(b"\n") == 1


FILES = ("--input", "a", "--output", "b", "--reward", "c")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("score", *FILES, "max_length=5"), "unrecognized arguments: max_length=5"),
        (("compare", "--reward", "c", "prompt"), "the following arguments are required: answer"),
        (
            ("score", *FILES, "--batch-size", "0"),
            "argument --batch-size: expected a whole number above 0, found '0'",
        ),
        (("score", *FILES, "--alpha", "nan"), "argument --alpha: expected a number, found 'nan'"),
        (
            ("best-of-n", *FILES, "--policy", "d", "--temperature", "0"),
            "argument --temperature: expected a number above 0, found '0'",
        ),
    ],
)
def test_no_command_line_of_these(
    argv: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: {expected}; see rlhf{'' if 'max' in expected else ' ' + argv[0]} --help\n"
    )
