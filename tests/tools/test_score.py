"""Files scored and answered: values are `RewardModel.score`'s, an interruption changes no byte, what is wrong
is told or quarantined.
"""

import csv
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from pyarrow import parquet, schema, table
from pyarrow import types as arrow
from transformers import AutoTokenizer

from pipeline import RewardModel, cli, config
from pipeline.data.files import READERS
from pipeline.reward import stage as reward
from pipeline.tools.score import chunks
from pipeline.tools.score.job import read_job
from tests.engines.stand_in import stand_in
from tests.models.manners import save_llama

ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a fruit.", "response": "An apple.", "id": 1},
    {"prompt": "", "response": "No prompt at all", "id": 2},
    {"prompt": "Name a fruit.", "response": 'x=y, "quoted"\r\nand\ra line', "id": 3},
    {"prompt": "שלום, מה שלומך?", "response": "مرحبا 👩‍👩‍👧 🎉", "id": 4},
    {"prompt": "Name a colour.", "response": "Blue.", "id": 5},
    {"prompt": "Name a colour.", "response": "Seven.", "id": 6},
    {"prompt": "A long one", "response": "word " * 100_000, "id": 7},
]


@pytest.fixture(scope="module")
def model(tiny_records: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward artifact."""
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    paths = {
        "runs": str(tmp_path_factory.mktemp("runs")),
        "model": str(tiny_llama),
        "records": str(tiny_records),
    }
    return reward.run(config.RewardStage(run="t", max_length=96, training=steps, **paths))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 2)
    monkeypatch.chdir(tmp_path)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[Any]:
    return [row.data for row in READERS[path.suffix](path)]


def main(command: str, model: Path, source: Path, output: str, *more: str) -> int:
    return cli.main([command, "--reward", str(model), "--input", str(source), "--output", output, *more])


def refusal(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line with which a command is refused."""
    assert main(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Values


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_row_gets_what_the_model_gives_it(
    suffix: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "in.jsonl", ROWS)
    assert (
        main("score", model, source, f"new/out{suffix}", "--alpha", "-2", "--normalize", "--batch-size", "3")
        == 0
    )
    found = rows_of(Path(f"new/out{suffix}"))
    as_text = str if suffix == ".csv" else lambda value: value
    assert [{**row, "reward": 0} for row in found] == [
        {key: as_text(value) for key, value in row.items()} | {"reward": 0} for row in ROWS
    ]
    expected = RewardModel.load(model).score(
        *zip(*((r["prompt"], r["response"]) for r in ROWS), strict=True), alpha=-2, normalize=True
    )
    assert [float(row["reward"]) for row in found] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 4
    assert capsys.readouterr().out.splitlines()[-1] == f"7 rows scored, 0 quarantined: new/out{suffix}"
    assert left(tmp_path / "new") == [f"out{suffix}"]


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "in.json", "in.parquet"])
def test_every_type_of_file_gives_the_same_rewards(name: str, model: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    if name == "in.json":
        source.write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    elif name == "in.parquet":
        parquet.write_table(table({key: [row[key] for row in ROWS] for key in ROWS[0]}), source)
    else:
        with source.open("w", encoding="utf-8-sig", newline="") as lines:  # a BOM, and CRLF after each row
            writer = csv.DictWriter(
                lines, ROWS[0], delimiter="\t" if name == "in.tsv" else ",", quoting=csv.QUOTE_ALL
            )
            writer.writeheader()
            writer.writerows(ROWS)
    assert main("score", model, source, "out.csv") == 0
    assert main("score", model, jsonl(tmp_path / "in.jsonl", ROWS), "same.csv") == 0
    assert Path("out.csv").read_bytes() == Path("same.csv").read_bytes()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_that_the_output_cannot_hold_are_quarantined_before_any_is_scored(
    suffix: str, tmp_path: Path
) -> None:
    bad = ["[" * 600 + "]" * 600, "1" * 5000, '"\\ud800"', '{"a": 1, "a": 2}', "9" * 30]
    lines = ['{"text": "a", "id": 1}', *(f'{{"text": "b", "id": {value}}}' for value in bad), '{"text": "c"}']
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    found = read_job("score", source, tmp_path / f"out{suffix}", force=False)
    expected = ["unreadable-line", "unreadable-line", "not-unicode", "repeated-key"]
    expected += ["not-writable"] if suffix == ".parquet" else []
    assert [item.fault.reason for item in found.items if item.fault] == expected
    chunks.publish(found, [{"reward": 0.5} for _ in found.valid], {})
    written = rows_of(found.output)
    assert [written[0]["text"], written[-1]["text"]] == ["a", "c"]
    quarantine = (tmp_path / f"out{suffix}.quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in quarantine] == list(range(2, 2 + len(expected)))


@pytest.mark.parametrize("column", ["completion", "text"])
def test_the_answer_may_have_other_names_and_the_prompt_may_be_missing(
    column: str, model: Path, tmp_path: Path
) -> None:
    assert main("score", model, jsonl(tmp_path / "in.jsonl", [{column: "An apple."}]), "out.jsonl") == 0
    (row,) = rows_of(Path("out.jsonl"))
    assert row == {
        column: "An apple.",
        "reward": pytest.approx(RewardModel.load(model).score_response("", "An apple."), abs=1e-5),
    }


def test_parquet_keeps_its_types_and_columns_of_some_rows_come_before_the_reward(
    model: Path, tmp_path: Path
) -> None:
    day = datetime(2024, 5, 1)
    types = schema(
        [("text", "string"), ("n", "int16"), ("x", "float32"), ("day", "timestamp[ms]"), ("none", "string")]
    )
    parquet.write_table(
        table(
            {"text": ["a", "b"], "n": [1, None], "x": [0.5, 1], "day": [day, day], "none": [None, None]},
            types,
        ),
        "in.parquet",
    )
    assert main("score", model, Path("in.parquet"), "out.parquet") == 0
    written = parquet.read_schema("out.parquet")
    assert written.remove(5).equals(types)
    assert arrow.is_float64(written.field("reward").type)
    assert main("score", model, Path("in.parquet"), "out.jsonl") == 0
    assert rows_of(Path("out.jsonl"))[1] | {"reward": 0} == {
        "text": "b",
        "n": None,
        "x": 1,
        "day": str(day),
        "none": None,
        "reward": 0,
    }
    assert (
        main(
            "score",
            model,
            jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b", "tags": ["é", None]}]),
            "out.csv",
        )
        == 0
    )
    with open("out.csv", encoding="utf-8", newline="") as lines:
        (_, *head), (_, none, _), (_, tags, _) = csv.reader(lines)
    assert (head, none, json.loads(tags)) == (["tags", "reward"], "", ["é", None])


def test_answers_to_a_prompt_are_listed_best_first(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    answers = ["An apple.", "x=y", "界" * 40, "two\nlines " + "and more " * 9, "--debug"]
    assert cli.main(["compare", "--reward", str(model), "--", "Name a fruit.", *answers]) == 0
    head, *lines, note = capsys.readouterr().out.splitlines()
    assert note == "  over max_length=96, cut: 1 of 5"
    opened = RewardModel.load(model)
    scores = opened.score(["Name a fruit."] * 5, answers)
    ranked = opened.rank("Name a fruit.", answers)
    assert [line.split()[:2] for line in lines] == [
        [str(rank), f"{scores[i]:.4f}"] for rank, i in enumerate(ranked, 1)
    ]
    start = head.index("response")
    shown = {i: line[start:] for i, line in zip(ranked, lines, strict=True)}
    room = 40 - start
    assert (shown[0], shown[1], shown[4]) == ("An apple.", "x=y", "--debug")
    assert shown[2] == "界" * ((room - 1) // 2) + "…"
    assert shown[3] == ("two lines " + "and more " * 9)[: room - 1] + "…"


# Best of n


@pytest.fixture
def best(model: Path, tiny_gpt2: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    def answer(output: str, rows: list[Any], *more: str) -> list[Any]:
        source = jsonl(tmp_path / "prompts.jsonl", rows)
        argv = ("--policy", str(tiny_gpt2), "--n", "3", "--response-tokens", "8", "--force", *more)
        assert main("best-of-n", model, source, output, *argv) == 0
        return rows_of(Path(output))

    return answer


PROMPTS = [
    {"prompt": prompt, "id": i}
    for i, prompt in enumerate(["Name a fruit.", "word " * 300, "Why?", "سلام", "Name a colour."])
]


def test_the_best_of_n_are_the_best_of_what_evaluate_samples(
    best: Callable[..., list[Any]], model: Path, tiny_gpt2: Path
) -> None:
    from pipeline.evaluate.sampling import sample_policy
    from pipeline.models.loading import load_sampler

    found = best("out.jsonl", PROMPTS, "--seed", "5", "--temperature", "1.5")
    settings = {
        "seed": 5,
        "temperature": 1.5,
        "response_tokens": 8,
        "max_prompt_tokens": 120,
        "batch_size": 4,
    }  # of 128 positions
    stage = config.EvaluateStage.model_construct(**settings)
    sampled = sample_policy(
        stage, "sft", *load_sampler(str(tiny_gpt2)), [row["prompt"] for row in PROMPTS], 3
    )
    scores = RewardModel.load(model).score(sampled["prompt"], sampled["text"])
    for i, (row, given) in enumerate(zip(found, PROMPTS, strict=True)):
        group = range(3 * i, 3 * i + 3)
        kept = max(group, key=scores.__getitem__)
        mean = sum(scores[j] for j in group) / 3
        expected = {"response": sampled["text"][kept], "reward": pytest.approx(scores[kept], abs=1e-5)}
        assert row == given | expected | {"reward_mean": pytest.approx(mean, abs=1e-5)}
    assert len(set(sampled["text"])) > 10


def test_an_answer_depends_on_the_seed_and_on_its_row(best: Callable[..., list[Any]]) -> None:
    rows = best("out.jsonl", PROMPTS)
    assert best("again.jsonl", [PROMPTS[0], {"prompt": " "}, *PROMPTS[2:]], "--batch-size", "2") == [
        rows[0],
        *rows[2:],
    ]
    assert [
        row["prompt"]
        for row in rows_of(Path("again.jsonl.quarantine.jsonl"))[0].values()
        if isinstance(row, dict)
    ] == [" "]
    assert [row["response"] for row in best("other.jsonl", PROMPTS, "--seed", "1")] != [
        row["response"] for row in rows
    ]


def test_a_server_of_the_policy_generates_the_responses(
    best: Callable[..., list[Any]],
    model: Path,
    tiny_gpt2: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stand_in(tiny_gpt2) as server:
        rows = best("out.jsonl", PROMPTS, "--policy-url", f"{server.url}/", "--temperature", "0.9")
    bodies = [body for path, body in server.asked if path == "/v1/completions"][1:]
    assert {(body["temperature"], body["max_tokens"]) for body in bodies} == {(0.9, 8)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in server.sampled[1:]]
    assert len(texts) == 15
    for i, row in enumerate(rows):
        group = texts[3 * i : 3 * i + 3]
        scores = RewardModel.load(model).score([row["prompt"]] * 3, group)
        assert row["response"] == group[scores.index(max(scores))]
        assert row["reward_mean"] == pytest.approx(sum(scores) / 3, abs=1e-5)

    source = tmp_path / "prompts.jsonl"
    with stand_in(tiny_llama) as other:
        capsys.readouterr()  # of its loading
        argv = ("--policy", str(tiny_gpt2), "--policy-url", other.url)
        line = refusal(capsys, "best-of-n", model, source, "out.csv", *argv)
    assert line.startswith(f"error: {other.url}: serves {tiny_llama}, expected {tiny_gpt2}; start one with: ")
    with stand_in(tiny_gpt2) as trained:
        trained.version = "of a run"
        capsys.readouterr()  # of its loading
        argv = ("--policy", str(tiny_gpt2), "--policy-url", trained.url)
        line = refusal(capsys, "best-of-n", model, source, "out.csv", *argv)
    assert "of a run" in line
    assert "expected the version default" in line
    argv = ("--policy", str(tiny_gpt2), "--policy-url", "localhost:8000")
    line = refusal(capsys, "best-of-n", model, source, "out.csv", *argv)
    assert line.startswith("error: --policy-url: 'localhost:8000': expected http://host:port alone")


def test_a_policy_without_room_for_a_prompt_is_refused(
    model: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(Path("in.jsonl"), PROMPTS)
    line = refusal(
        capsys, "best-of-n", model, source, "out.csv", "--policy", str(tiny_gpt2), "--response-tokens", "128"
    )
    assert (
        line == f"error: {tiny_gpt2}: its 128 positions leave no room for a prompt; lower --response-tokens"
    )


# Interruptions

PARTIAL = Path(".out.csv.partial.jsonl")


@pytest.fixture(params=["score", "best-of-n"])
def run(request: pytest.FixtureRequest, model: Path, tiny_gpt2: Path) -> Callable[..., int]:
    """One command, always the same but for what is given."""
    more = {
        "score": ["--alpha=3"],
        "best-of-n": ["--policy", str(tiny_gpt2), "--n=2", "--response-tokens=4", "--seed=3"],
    }[request.param]
    source = jsonl(Path("in.jsonl"), (ROWS if request.param == "score" else PROMPTS)[:5])
    return lambda *others: main(request.param, model, source, "out.csv", *more, *others)


@pytest.fixture
def partial(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The whole of a run's partial file; the output is there too."""
    states: list[bytes] = []
    publish = chunks.publish
    with monkeypatch.context() as patched:
        patched.setattr(
            chunks, "publish", lambda *given: (states.append(PARTIAL.read_bytes()), publish(*given))
        )
        assert run() == 0
    return states[0]


def test_cut_anywhere_it_ends_in_the_same_bytes(
    run: Callable[..., int], partial: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path("out.csv").read_bytes()
    ends = [i + 1 for i, byte in enumerate(partial) if byte == ord("\n")]
    done = set()
    for cut in (3, ends[0] - 1, ends[0], ends[0] + 5, ends[1], ends[-2], ends[-1] - 1, ends[-1]):
        finished = sum(
            len(json.loads(line)) for line in partial[:cut].splitlines()[1 : sum(end <= cut for end in ends)]
        )
        PARTIAL.write_bytes(partial[:cut])
        Path("out.csv").unlink()
        capsys.readouterr()
        assert run() == 0
        assert (f"resuming {PARTIAL}: {finished} of 5 rows are done" in capsys.readouterr().out) == (
            finished > 0
        )
        assert Path("out.csv").read_bytes() == whole
        done.add(finished)
        assert left(Path()) == ["in.jsonl", "out.csv"]
    assert done > {0, 5}
    assert len(done) > 3


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt


def test_what_was_replaced_stays_until_the_new_one_is_whole(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out.csv").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        assert run("--force") == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert Path("out.csv").read_text() == "old"
    assert run("--force") == 0
    assert f"resuming {PARTIAL}: 5 of 5 rows are done" in capsys.readouterr().out
    assert left(Path()) == ["in.jsonl", "out.csv"]


@pytest.mark.parametrize(
    ("more", "rows", "named"),
    [(("--alpha=2",), 6, "alpha"), ((), 4, "input"), (("--normalize",), 6, "normalize")],
)
def test_what_was_made_from_something_else_is_not_gone_on_from(
    more: Any,
    rows: int,
    named: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path("in.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)
        assert main("score", model, jsonl(source, ROWS[:6]), "out.csv") == 130
    capsys.readouterr()
    jsonl(source, ROWS[:rows])
    assert main("score", model, source, "out.csv", *more) == 0
    assert (
        capsys.readouterr().out.splitlines()[0] == f"{PARTIAL}: was made with another {named}; starting over"
    )
    assert main("score", model, source, "clean.csv", *more) == 0
    assert Path("out.csv").read_bytes() == Path("clean.csv").read_bytes()


def test_the_same_command_given_again_is_done(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = Path("out.csv").read_bytes()
    PARTIAL.write_bytes(b'{"command": ')  # as a kill before the last deletion leaves it
    with monkeypatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)  # nothing is computed or written again
        capsys.readouterr()
        assert run() == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(": unchanged, keeping out.csv")
        assert left(Path()) == ["in.jsonl", "out.csv"]
        assert run("--force") == 130
    PARTIAL.unlink()
    Path("out.csv").write_bytes(before + b"more\n")
    assert run() == 2
    assert "--output out.csv: exists already; name another file, or add --force" in capsys.readouterr().err
    assert Path("out.csv").read_bytes() == before + b"more\n"


def test_an_output_of_other_settings_is_not_replaced(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = jsonl(Path("in.jsonl"), [{"text": "good"}, {"text": ""}])
    assert main("score", model, source, "out.csv") == 0
    before = {name: Path(name).read_bytes() for name in left(Path())}
    assert (
        refusal(capsys, "score", model, source, "out.csv", "--alpha=2")
        == "error: --output out.csv: exists already, and was made with another alpha; name another file, "
        "or add --force to replace it"
    )
    assert {name: Path(name).read_bytes() for name in left(Path())} == before
    assert main("score", model, source, "out.csv", "--alpha=2", "--force") == 0
    assert Path("out.csv").read_bytes() != before["out.csv"]


# What is wrong


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


@pytest.mark.parametrize("line", ["[1]", '{"reward": 1}', '[{"reward": 1, "more": 2}]', "[" * 100_000])
def test_a_line_that_no_run_wrote_is_computed_again(line: str, model: Path) -> None:
    source = jsonl(Path("in.jsonl"), ROWS[:5])
    assert main("score", model, source, "whole.csv") == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunks, "publish", interrupted)
        assert main("score", model, source, "out.csv") == 130
    head, first, *_ = PARTIAL.read_text().splitlines()
    PARTIAL.write_text("\n".join([head, first, line, first, first, ""]))
    assert main("score", model, source, "out.csv") == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_a_bad_row_is_quarantined_with_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        '{"text": ""}',
        '{"text": " \\n"}',
        '{"text": 5}',
        "{torn",
        '{"prompt": 3, "text": "a"}',
        '{"prompt": "a"}',
        "[1]",
        '{"text": "\\ud800"}',
    ]
    source = tmp_path / "in.jsonl"
    source.write_text(
        "\r\n".join(['{"text": "first"}', *bad, "", '{"prompt": null, "text": "last"}']), encoding="utf-8"
    )
    assert main("score", model, source, "out.jsonl") == 0
    assert [row["text"] for row in rows_of(Path("out.jsonl"))] == ["first", "last"]
    entries = rows_of(Path("out.jsonl.quarantine.jsonl"))
    assert [list(entry) for entry in entries] == [["source", "line", "reason", "detail", "row"]] * 8
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (2, "empty-text"),
        (3, "empty-text"),
        (4, "not-text"),
        (5, "unreadable-line"),
        (6, "not-text"),
        (7, "not-text"),
        (8, "unreadable-line"),
        (9, "not-unicode"),
    ]
    assert (entries[0]["row"], entries[3]["row"], entries[3]["source"]) == (
        {"text": ""},
        "{torn",
        str(source),
    )
    assert capsys.readouterr().out.splitlines() == [
        "  quarantined: empty-text 2, not-text 3, not-unicode 1, unreadable-line 2; see "
        "out.jsonl.quarantine.jsonl",
        "2 rows scored, 8 quarantined: out.jsonl",
    ]
    jsonl(source, [{"text": "good"}])
    assert main("score", model, source, "out.jsonl", "--force") == 0
    assert left(tmp_path) == ["in.jsonl", "out.jsonl"]


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
        ("out.csv", "text\n", "in.csv: none of its 0 rows can be scored"),
        (
            "out.csv",
            "prompt,text\na,\n,  \n",
            "in.csv: none of its 2 rows can be scored; line 2: response: is empty or blank",
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


@pytest.mark.parametrize("overlong", [None, "truncate_left", "truncate_right", "drop"])
def test_rows_that_are_cut_are_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overlong: str | None
) -> None:
    source = jsonl(tmp_path / "in.jsonl", ROWS)
    options = ["--overlong", overlong] if overlong else []
    assert main("score", model, source, "out.jsonl", *options) == 0
    printed = capsys.readouterr()
    assert f"over max_length=96 (overlong: {overlong or 'truncate_left'}): 1 of 7" in printed.out
    assert "were cut" not in printed.err  # it is told once
    found = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == [1, 2, 3, 4, 5, 6, *([] if overlong == "drop" else [7])]
    if overlong == "drop":
        (fault,) = rows_of(tmp_path / "out.jsonl.quarantine.jsonl")
        assert (fault["reason"], fault["detail"], fault["line"]) == ("overlong", "over max_length=96", 7)
    elif overlong:
        side = overlong.removeprefix("truncate_")
        opened = RewardModel.load(model, encoding={"truncation": side})
        assert found[-1]["reward"] == pytest.approx(
            opened.score_response(ROWS[-1]["prompt"], ROWS[-1]["response"]), abs=1e-5
        )


def test_a_row_that_a_template_refuses_is_quarantined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward_model = save_llama(tmp_path / "rm", "gemma", labels=1)
    policy = save_llama(tmp_path / "policy", "gemma")
    refused = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    source = jsonl(tmp_path / "in.jsonl", [{"prompt": prompt, "response": "A"} for prompt in ("Q", refused)])
    assert main("score", reward_model, source, "out.jsonl") == 0
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Q"}, {"prompt": refused}])
    sampling = ("--policy", str(policy), "--n", "2", "--response-tokens", "3")
    assert main("best-of-n", reward_model, prompts, "best.jsonl", *sampling) == 0
    assert capsys.readouterr().out.count("1 rows scored, 1 quarantined") == 2
    for output in ("out.jsonl", "best.jsonl"):
        (fault,) = rows_of(tmp_path / f"{output}.quarantine.jsonl")
        assert (fault["reason"], fault["line"]) == ("refused", 2)
        assert "refuses the conversation (system, user" in fault["detail"]

    alone = jsonl(tmp_path / "alone.jsonl", [{"prompt": refused, "response": "A"}])
    assert refusal(capsys, "score", reward_model, alone, "none.jsonl").startswith(
        f"error: {alone}: no row is left to score; line 1: the chat template refuses"
    )


def test_compare_can_leave_out_what_it_cannot_read_whole(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["compare", "--reward", str(model), "--overlong", "drop", "Name a fruit."]
    assert cli.main([*argv, "An apple.", "word " * 200]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(lines), lines[-1]] == [3, "  over max_length=96, left out: 1 of 2"]
    assert cli.main([*argv, "word " * 200]) == 2
    assert "compare: every response is over max_length=96" in capsys.readouterr().err


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
