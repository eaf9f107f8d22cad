"""Files scored by a stepwise reward model: the scores of the steps beside the reward."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from pipeline import RewardModel, config
from pipeline.reward import stage as reward
from pipeline.tools.score import chunks
from tests.tools.score.commands import jsonl, main, rows_of

SEPARATOR = " | "
IN = Path("in.jsonl")
ROWS = [
    {"prompt": "2+3-1=", "completions": ["2+3=5", "5-1=4"], "id": 1},
    {"prompt": "7-2+9=", "completions": ["7-2=5", "5+9=3", "so 3"], "id": 2},
    {"prompt": "", "completions": ["nothing to add"], "id": 3},
]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stepwise reward artifact, and one that scores whole responses."""
    runs = tmp_path_factory.mktemp("runs")
    texts = [(f"{a}+{b}=", [f"{a}+{b}={a + b}", f"so {c}"], a + b == c) for a, b, c in [(1, 2, 3), (2, 2, 5)]]
    steps = [{"prompt": q, "completions": s, "labels": [True, right]} for q, s, right in texts * 4]
    pairs = [{"prompt": q, "chosen": s[0], "rejected": s[1]} for q, s, _ in texts * 4]
    artifacts = {}
    for objective, rows in (("stepwise", steps), ("pairwise", pairs)):
        data = Dataset.from_list(rows)
        DatasetDict(train=data, validation=data, test=data).save_to_disk(str(runs / "records" / objective))
        more = {"encoding": {"step_separator": SEPARATOR}, "aggregate": "product"} if rows is steps else {}
        artifacts[objective] = reward.run(
            config.RewardStage(
                run=objective,
                runs=str(runs),
                model=str(tiny_llama),
                records=str(runs / "records" / objective),
                objective=objective,
                max_length=96,
                training={"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
                **more,
            )
        )
    return artifacts


def joined(rows: list[Any] = ROWS) -> list[Any]:
    return [{"prompt": row["prompt"], "response": SEPARATOR.join(row["completions"])} for row in rows]


def test_each_row_gets_the_scores_of_its_steps_and_their_aggregate(models: dict[str, Path]) -> None:
    assert main("score", models["stepwise"], jsonl(IN, ROWS), "out.jsonl", "--alpha", "2") == 0
    found = rows_of(Path("out.jsonl"))
    assert [{key: row[key] for key in ROWS[0]} for row in found] == ROWS
    model = RewardModel.load(models["stepwise"])
    prompts, steps = [row["prompt"] for row in ROWS], [row["completions"] for row in ROWS]
    for row, expected in zip(found, model.score_steps(prompts, steps), strict=True):
        assert row["step_scores"] == pytest.approx(expected, abs=1e-5)
        assert row["reward"] == pytest.approx(2 * math.prod(row["step_scores"]), abs=1e-6)
    assert [len(row["step_scores"]) for row in found] == [2, 3, 1]
    assert list(found[0]) == ["prompt", "completions", "id", "reward", "step_scores"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_responses_are_split_and_give_the_same_scores(suffix: str, models: dict[str, Path]) -> None:
    assert main("score", models["stepwise"], jsonl(IN, ROWS), "steps.jsonl") == 0
    assert main("score", models["stepwise"], jsonl(Path("texts.jsonl"), joined()), f"out{suffix}") == 0
    for row, expected in zip(rows_of(Path(f"out{suffix}")), rows_of(Path("steps.jsonl")), strict=True):
        scores = json.loads(row["step_scores"]) if suffix == ".csv" else row["step_scores"]
        assert scores == pytest.approx(expected["step_scores"], abs=1e-5)
        assert float(row["reward"]) == pytest.approx(expected["reward"], abs=1e-5)


def test_steps_in_the_cells_of_a_csv_file(models: dict[str, Path]) -> None:
    Path("in.csv").write_text("prompt,completions\n2+3-1=,\"['2+3=5', '5-1=4']\"\n")
    assert main("score", models["stepwise"], Path("in.csv"), "csv.jsonl") == 0
    assert main("score", models["stepwise"], jsonl(IN, ROWS[:1]), "json.jsonl") == 0
    assert rows_of(Path("csv.jsonl"))[0]["step_scores"] == rows_of(Path("json.jsonl"))[0]["step_scores"]


def test_an_interrupted_run_goes_on_with_the_scores_it_has(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, written = jsonl(IN, ROWS), []
    assert main("score", models["stepwise"], source, "whole.jsonl") == 0
    append = chunks._append

    def stop(partial: Path, value: Any) -> Any:
        written.append(append(partial, value))
        if len(written) == 2:  # the settings and the first chunk
            raise KeyboardInterrupt
        return value

    with monkeypatch.context() as patch:
        patch.setattr(chunks, "_append", stop)
        assert main("score", models["stepwise"], source, "out.jsonl") == 130
    capsys.readouterr()
    assert main("score", models["stepwise"], source, "out.jsonl") == 0
    assert "2 of 3 rows are done" in capsys.readouterr().out
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_what_is_wrong_with_steps_is_quarantined(models: dict[str, Path]) -> None:
    wrong = [[], ["a", " "], "a", ["a", 1], None]
    rows = [ROWS[0], *({"prompt": "Q", "completions": steps} for steps in wrong)]
    assert main("score", models["stepwise"], jsonl(IN, rows), "out.jsonl") == 0
    entries = rows_of(Path("out.jsonl.quarantine.jsonl"))
    assert [(entry["line"], entry["reason"], entry["detail"]) for entry in entries] == [
        (2, "no-steps", "completions: the response has no step"),
        (3, "empty-text", "completions: step 2 is empty or blank"),
        (4, "no-steps", "completions: expected a list, found str"),
        (5, "not-text", "completions: step 2: expected text, found int"),
        (6, "no-steps", "completions: expected a list, found NoneType"),
    ]


NO_SEPARATOR = f"score: each response is one step: none has the separator {SEPARATOR!r} between two steps"


def test_a_file_without_the_separator_is_told_once(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Q", "response": text} for text in ("a\nb", "c", "d", "e", "f")]
    assert main("score", models["stepwise"], jsonl(IN, rows), "out.jsonl") == 0
    assert capsys.readouterr().out.count(NO_SEPARATOR) == 1
    assert [len(row["step_scores"]) for row in rows_of(Path("out.jsonl"))] == [1] * 5
    # One response with the separator is enough, even if a whole chunk has none.
    assert main("score", models["stepwise"], jsonl(IN, [*rows, *joined()[:1]]), "more.jsonl") == 0
    assert NO_SEPARATOR not in capsys.readouterr().out
    assert not [record for record in caplog.records if "separator" in record.message]


@pytest.mark.parametrize(
    ("objective", "row", "problem"),
    [
        ("pairwise", ROWS[0], "in.jsonl: 'completions' has the steps of responses, and .* scores whole resp"),
        ("stepwise", ROWS[0] | {"step_scores": []}, "already has a column 'step_scores', which score would"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_one_line(
    objective: str,
    row: Any,
    problem: str,
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main("score", models[objective], jsonl(IN, [row]), "out.jsonl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(problem, line)


def test_best_of_n_ranks_by_the_aggregate(models: dict[str, Path], tiny_llama: Path) -> None:
    policy = ("--policy", str(tiny_llama), "--n", "4", "--response-tokens", "12")
    source = jsonl(IN, [{"prompt": "2+3="}])
    assert main("best-of-n", models["stepwise"], source, "out.jsonl", *policy) == 0
    (row,) = rows_of(Path("out.jsonl"))
    (expected,) = RewardModel.load(models["stepwise"]).score([row["prompt"]], [row["response"]])
    assert row["reward"] == pytest.approx(expected, abs=1e-5)
    assert row["reward"] >= row["reward_mean"]
