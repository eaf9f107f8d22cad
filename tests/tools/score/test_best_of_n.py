"""Prompts answered by the best of n responses, sampled here or by a server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline import RewardModel, config
from tests.engines.stand_in import stand_in
from tests.tools.score.commands import PROMPTS, jsonl, main, refusal, rows_of


@pytest.fixture
def best(model: Path, tiny_gpt2: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    def answer(output: str, rows: list[Any], *more: str) -> list[Any]:
        source = jsonl(tmp_path / "prompts.jsonl", rows)
        argv = ("--policy", str(tiny_gpt2), "--n", "3", "--response-tokens", "8", "--force", *more)
        assert main("best-of-n", model, source, output, *argv) == 0
        return rows_of(Path(output))

    return answer


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
