"""Which stages a run needs, by the inputs that its configs name, and what evaluate takes from PPO."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline import config

STAGES = list(config.STAGES)


def run(*, until: str = "evaluate", **keys: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the run `t` with these keys of its stages."""
    given = {
        "prepare": {"source": [{"format": "demo"}]},
        "sft": {"model": "scratch"},
        "reward": {"model": "runs/t/sft"},
    }

    def load(stage: str) -> Any:
        return config.STAGES[stage](run="t", **given.get(stage, {}) | keys.get(stage, {}))

    return config.load_run(STAGES[: STAGES.index(until) + 1], load)


def test_a_run_with_its_own_reward_model_skips_nothing() -> None:
    configs, skipped = run()
    assert (list(configs), skipped) == (STAGES, {})
    assert configs["evaluate"].resolved()["reward"] == "runs/t/reward"  # as older versions wrote it
    assert "uncertainty_penalty" not in configs["evaluate"].resolved()


@pytest.mark.parametrize("reward", ["m:f", "http://h", ["m:f", "http://h"], "org/model", "runs/other/reward"])
def test_the_reward_stage_is_skipped_if_ppo_reads_none_of_this_run(reward: Any) -> None:
    configs, skipped = run(ppo={"reward": reward})
    assert list(configs) == ["prepare", "sft", "ppo", "evaluate"]
    assert skipped == {"reward": "ppo.reward names no reward model of this run"}
    assert configs["evaluate"].reward == configs["ppo"].reward


EVALUATES = {"training": {"eval_strategy": "steps"}}


@pytest.mark.parametrize(
    "keys",
    [
        {"ppo": {"reward": ["m:f", "runs/t/reward"]}},
        {"ppo": {"reward": str(Path("runs/t/reward").absolute())}},
        {"ppo": {"reward": {"source": "http://h", "reads": "runs/t/reward"}}},
        {"ppo": {"reward": "m:f", "evaluation": {"scorer": "runs/t/reward"}, **EVALUATES}},
        {"ppo": {"reward": "m:f", "critic": {"on": "model", "source": "runs/t/reward"}}},
        {"ppo": {"reward": "m:f"}, "evaluate": {"scorer": "runs/t/reward"}},
        {"ppo": {"reward": "m:f"}, "evaluate": {"reward": "runs/t/reward"}},
        {"ppo": {"reward": "m:f"}, "evaluate": {"ppo": "org/policy"}},
    ],
)
def test_the_reward_stage_runs_if_any_key_reads_it(keys: dict[str, Any]) -> None:
    assert "reward" in run(**keys)[0]


def test_a_reward_model_that_does_not_start_from_sft_needs_none() -> None:
    configs, skipped = run(until="reward", reward={"model": "org/base"})
    assert list(configs) == ["prepare", "reward"]
    assert skipped == {"sft": "reward.model names no policy of this run"}
    assert list(run(until="reward")[0]) == ["prepare", "sft", "reward"]


def test_a_run_of_inputs_from_elsewhere_is_its_last_stage_alone() -> None:
    ppo = {"records": "data", "policy": "org/policy", "reward": "m:f"}
    configs, skipped = run(until="ppo", ppo=ppo)
    assert list(configs) == ["ppo"]
    assert skipped == {
        "reward": "ppo.reward names no reward model of this run",
        "sft": "ppo.policy names no policy of this run",
        "prepare": "ppo.records names no records of this run",
    }
    config.check_run(list(configs.values()))
    both = run(evaluate={"sft": "org/policy", "records": "data"}, ppo=ppo)[1]
    assert both["prepare"] == "ppo.records and evaluate.records name no records of this run"


def test_evaluate_takes_what_ppo_sums_and_keeps_what_it_names() -> None:
    rewards = [{"source": "m:f", "weight": 2.0}, {"source": "m:g", "weight": 1.0}]
    ppo = {"reward": rewards, "uncertainty_penalty": 0.5}
    for keys in ({}, {"ppo": "runs/t/ppo/best"}):
        resolved = run(ppo=ppo, evaluate=keys)[0]["evaluate"].resolved()
        assert [(reward["source"], reward["weight"]) for reward in resolved["reward"]] == [
            ("m:f", 2.0),
            ("m:g", 1.0),
        ]
        assert resolved["uncertainty_penalty"] == 0.5
    resolved = run(ppo=ppo, evaluate={"reward": "m:h"})[0]["evaluate"].resolved()
    assert (resolved["reward"], "uncertainty_penalty" in resolved) == ("m:h", False)


@pytest.mark.parametrize("keys", [{}, {"reward": "m:f"}])
def test_a_penalty_for_disagreement_needs_two_rewards(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="only read with two rewards or more"):
        config.EvaluateStage(run="t", uncertainty_penalty=1.0, **keys)
