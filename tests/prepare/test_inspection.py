"""`rlhf prepare --inspect FILE`: what it prints, its exit code, and that it writes nothing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from pipeline.cli import main
from pipeline.config import PrepareStage
from pipeline.data.readers import read_source
from tests.data.reading import jsonl

SHP = {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "post_id": "x"}
TIE = {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 0}


def inspect(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(["prepare", *arguments])
    except SystemExit as error:
        code = int(str(error.code))
    done = capsys.readouterr()
    return code, done.out, done.err


def config_of(output: str) -> Any:
    return yaml.safe_load(output.partition("prepare.yaml:\n")[2])


def test_a_file_is_described_with_the_config_that_reads_it(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(Path("shp.jsonl"), [SHP, SHP | {"history": "R", "labels": 0}, SHP | {"labels": 7}, SHP])
    code, output, _ = inspect(capsys, "--inspect", "shp.jsonl")
    assert code == 0
    assert output == (
        "shp.jsonl:\n"
        "  history      str  'Q'\n"
        "  human_ref_A  str  'a'\n"
        "  human_ref_B  str  'b'\n"
        "  labels       int  1\n"
        "  post_id      str  'x'\n"
        "  shp.jsonl: recognized as format: shp\n"
        "  shp.jsonl: columns that are not read: post_id\n"
        "  2 of 4 rows kept, as comparisons 2\n"
        "  merged with others as votes: 1\n"
        "  quarantined: no-winner 1\n"
        "\n"
        "This reads it, in prepare.yaml:\n"
        "\n"
        "source:\n"
        "  format: shp\n"
        "  path: shp.jsonl\n"
    )
    (source,) = PrepareStage(run="a", **config_of(output)).source
    assert read_source(source)[0].record == {"prompt": "Q", "chosen": "a", "rejected": "b"}
    assert [path.name for path in tmp_path.iterdir()] == ["shp.jsonl"]


def test_overrides_map_columns_and_are_part_of_the_config(tmp_path: Path, capsys: Any) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", [{"text": "rude", "toxic": 1}, {"text": "kind", "toxic": 0}]))
    code, output, _ = inspect(capsys, "--inspect", path, "source.columns.label=toxic")
    assert (code, "2 of 2 rows kept, as labels 2" in output) == (0, True)
    assert config_of(output) == {"source": {"format": "labels", "path": path, "columns": {"label": "toxic"}}}


def test_a_folder_and_a_saved_dataset_are_inspected(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train.jsonl", [SHP])
    jsonl(tmp_path / "folder" / "test.jsonl", [SHP | {"history": "R"}])
    _, output, _ = inspect(capsys, "--inspect", str(tmp_path / "folder"))
    assert (
        "  2 of 2 rows kept, as comparisons 2\n  split by the names of its files: test is test.jsonl"
        in output
    )
    datasets.Dataset.from_list([SHP]).save_to_disk(tmp_path / "saved")
    code, output, _ = inspect(capsys, "--inspect", str(tmp_path / "saved"))
    assert (code, config_of(output)["source"]["format"]) == (0, "shp")


def test_rows_with_tools_are_told_in_one_line(tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"Q{n}", "completion": "a", "tools": [{"name": "f"}] if n else None} for n in range(3)]
    _, output, _ = inspect(capsys, "--inspect", str(jsonl(tmp_path / "a.jsonl", rows)))
    assert (
        "  1 of 3 rows kept, as demonstrations 1\n"
        "  quarantined: tool-calls 2\n"
        "  2 rows have tools, images or separate reasoning, which are not read; "
        "ignore: [tools], for example, passes a column or a key of messages over\n"
    ) in output


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "a.jsonl: no such file or folder; check 'path' of the source"),
        ([], "a.jsonl: holds no rows; check path, subset and split of the source"),
        (
            [{"foo": "Q", "label": 1}],
            "a.jsonl: no format has its columns: foo, label; nearly: labels lacks 'text', steps lacks "
            "'question', kto lacks 'conversations'; map them with 'format' and 'columns' of the source",
        ),
        (
            [TIE],
            "a.jsonl: of 1 rows none can be kept (tie 1); a.jsonl:1: the preference is 0.5; "
            "ties: keep trains on it; "
            "check path, format and columns of the source",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: Any, monkeypatch: Any, rows: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        jsonl(Path("a.jsonl"), rows)
    code, _, error = inspect(capsys, "--inspect", "a.jsonl")
    assert (code, error) == (2, f"error: {message}\n")


@pytest.mark.parametrize("arguments", [(), ("--config", "a.yaml", "--inspect", "a.jsonl")])
def test_prepare_takes_a_config_or_a_file_to_inspect(capsys: Any, arguments: tuple[str, ...]) -> None:
    code, _, error = inspect(capsys, *arguments)
    assert (code, error) == (
        2,
        "error: prepare needs either --config FILE or --inspect FILE; see rlhf --help\n",
    )


def test_no_torch_is_imported(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [SHP])
    code = (
        f"import sys; from pipeline.cli import main; main(['prepare', '--inspect', {str(path)!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0
