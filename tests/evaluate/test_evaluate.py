"""evaluate where there are no comparisons: what the reward model learned from is told instead."""

import json
import shutil

import pytest
from datasets import Dataset
from pydantic import ValidationError

from pipeline import config
from pipeline.artifacts.manifest import Artifact
from pipeline.config.evaluate import POLICY_METRICS
from pipeline.errors import UserError
from pipeline.evaluate import sampling
from pipeline.evaluate import stage as evaluate
from pipeline.evaluate.report import describe_test_prompts, write_report
from pipeline.evaluate.summary import summary_table
from pipeline.ppo import stage as ppo
from pipeline.prepare import stage as prepare
from pipeline.reward import stage as reward


def test_records_without_comparisons(tmp_path, tiny_gpt2):
    rows = [
        {"prompt": f"What is {n}?", "completion": f"It is {n}." if n % 2 else "No.", "rating": n % 2}
        for n in range(60)
    ]
    (tmp_path / "ratings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"run": "t", "runs": str(tmp_path / "runs")}
    prepare.run(
        config.PrepareStage(source=[{"format": "ratings", "path": str(tmp_path / "ratings.jsonl")}], **common)
    )
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    learned = {"model": str(tiny_gpt2), "objective": "regression", "max_length": 96, "training": steps}
    scored = reward.run(config.RewardStage(**learned, **common))
    few = {"prompts": 2, "best_of": 2, "samples_per_prompt": 1, "response_tokens": 4}
    folder = evaluate.run(config.EvaluateStage(sft=str(tiny_gpt2), ppo=str(tiny_gpt2), **few, **common))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["reward"] == json.loads((scored / "metrics.json").read_text())
    assert list(metrics["reward"]) == ["ratings"]
    rmse = f"{metrics['reward']['ratings']['rmse']:.3f}"
    row = f"reward RMSE {rmse} {metrics['reward']['ratings']['rows']} test ratings:".split()
    assert row in [line.split()[: len(row)] for line in summary_table(folder).splitlines()]
    assert "reward accuracy" not in summary_table(folder)
    page = (folder / "report.html").read_text()
    assert f'<th scope="row" dir="auto">RMSE</th><td class="number">{rmse}</td>' in page
    assert 'aria-label="RMSE. ' in page
    assert '<section id="calibration">' not in page
    assert '<th scope="row">ratings</th><td class="number">' in page
    assert '<li id="stage-evaluate">' in page


def test_both_policies_stop_where_ppo_did(tiny_gpt2, tmp_path, monkeypatch):
    """PPO's stop token is in the generation config of its policy alone."""
    tuned = shutil.copytree(tiny_gpt2, tmp_path / "ppo")
    (tuned / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    found = {}

    def sample_policy(config, name, policy, tokenizer, prompts, per_prompt, ends, **_):
        found[name] = ends
        return {}

    monkeypatch.setattr(sampling, "sample_policy", sample_policy)
    inputs = {"sft": Artifact(tiny_gpt2, {}), "ppo": Artifact(tuned, {})}
    sampling.sample_policies(config.EvaluateStage(run="t"), inputs, Dataset.from_dict({"prompt": ["a"]}))
    assert found == {"sft": [1, 1, 7], "ppo": [1, 1, 7]}


def length(prompts, completions, completion_ids, ended, **_):
    """The number of tokens, one for each."""
    return [[1.0] * len(ids) for ids in completion_ids]


def test_the_policies_on_the_way_and_a_scorer_that_looks_on(tmp_path, tiny_gpt2, tiny_feedback):
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_feedback)}
    learned = {"model": str(tiny_gpt2), "max_length": 96, "training": {"max_steps": 2}}
    scored = reward.run(config.RewardStage(**learned, **common))
    other = reward.run(config.RewardStage(**learned, **common | {"run": "other", "seed": 1}))
    training = {
        "num_rollouts": 3,
        "num_ppo_epochs": 1,
        "per_device_train_batch_size": 4,
        "response_tokens": 4,
        "learning_rate": 1e-2,
    }
    training |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    tuned = ppo.run(
        config.PPOStage(policy=str(tiny_gpt2), training=training, evaluation={"keep": True}, **common)
    )
    few = {
        "prompts": 2,
        "best_of": 8,
        "samples_per_prompt": 2,
        "response_tokens": 4,
        "sft": str(tiny_gpt2),
        "reward": str(scored),
        "measures": {"tokens_said": f"{__name__}:length"},
    }
    metrics = {}
    for scorer in (str(other), f"{__name__}:length"):
        folder = evaluate.run(config.EvaluateStage(scorer=scorer, force=True, **few, **common))
        metrics = json.loads((folder / "metrics.json").read_text())
        assert list(metrics)[1:] == [
            "sft",
            "best_of_2",
            "best_of_4",
            "best_of_8",
            "ppo_1",
            "ppo_2",
            "ppo",
            "fits",
            "rows",
        ]
        assert all("scorer_reward" in metrics[name] for name in ("sft", "best_of_8", "ppo_1", "ppo"))
        assert "win_rate_scorer" in metrics["ppo"]
        assert metrics["fits"]["best-of-n"].keys() == {"reward", "scorer_reward"}
    assert metrics["ppo_1"] != metrics["ppo_2"]
    assert metrics["sft"]["scorer_reward"] == metrics["sft"]["response_tokens"]
    for policy in ("sft", "best_of_2", "best_of_8", "ppo_1", "ppo"):
        assert metrics[policy]["tokens_said"] == metrics[policy]["response_tokens"]
        names = {name.removesuffix("_interval") for name in metrics[policy]}
        assert {name for name in names if not name.startswith("win_rate")} <= POLICY_METRICS | {"tokens_said"}
        assert metrics[policy]["prompts"] == 2
        low, high = metrics[policy]["reward_interval"]
        assert low < metrics[policy]["reward"] < high
    assert metrics["ppo"]["win_rate_rows"] == 4
    said = [line.split() for line in summary_table(folder).splitlines()]
    assert ["tokens", "said,", "ppo", f"{metrics['ppo']['tokens_said']:.3f}"] in said
    assert [folder.name for folder in sorted((tuned / "policies").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
    page = (folder / "report.html").read_text()
    assert 'aria-label="Held-out reward against KL. ' in page
    assert "PPO, step 2" in page
    assert '<th scope="col" class="number">Tokens said</th>' in page
    assert '<section id="strips">' in page
    with pytest.raises(UserError, match="is of kind 'policy', expected 'reward'"):
        evaluate.run(config.EvaluateStage(scorer=str(tuned), **few, **common))


@pytest.mark.parametrize(
    ("measures", "problem"),
    [
        ({"right-steps": "m:f"}, "'right-steps' is no name of a metric; expected letters, digits and _"),
        ({"kl": "m:f"}, "'kl' is a name that evaluate uses already; choose another"),
        ({"win_rate_mine": "m:f"}, "'win_rate_mine' is a name that evaluate uses already; choose another"),
        ({"gold_reward_interval": "m:f"}, "'gold_reward_interval' is a name that evaluate uses already"),
        ({"text": "m:f"}, "'text' is a name that evaluate uses already; choose another"),
    ],
)
def test_a_measure_needs_a_name_of_its_own(measures, problem):
    with pytest.raises(ValidationError) as error:
        config.EvaluateStage(run="t", measures=measures)
    assert problem in str(error.value)


def test_a_measure_that_is_no_function_is_refused_before_the_first_stage():
    with pytest.raises(
        UserError,
        match=r"^measures\.right \(pipeline\.prepare\.demo:right_steps\): .*expected module:function",
    ):
        evaluate.check(config.EvaluateStage(run="t", measures={"right": "pipeline.prepare.demo:right_steps"}))


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (["demo"], "The test prompts of the demo world are other wordings of facts that training has seen."),
        (["comparisons", "prompts"], ""),
    ],
)
def test_the_report_says_what_training_has_seen_of_the_test_prompts(tmp_path, formats, expected):
    sources = "".join(f"- format: {name}\n" for name in formats)
    (tmp_path / "config.yaml").write_text(f"source:\n{sources}")
    assert describe_test_prompts(Artifact(tmp_path, {"stage": "prepare"})) == expected
    assert describe_test_prompts(Artifact(tmp_path, {})) == ""  # a dataset that no stage made
    write_report(tmp_path / "report.html", {"summary": [{"name": "a"}], "test_prompts": expected})
    assert (f'<p class="hint">{expected}</p>' in (tmp_path / "report.html").read_text()) == bool(expected)
