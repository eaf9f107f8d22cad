"""The command line and the stages take a reward model by its URL."""

import json

import pytest
import yaml

from pipeline import RewardModel, cli, config
from pipeline.errors import UserError
from pipeline.evaluate import stage as evaluate
from pipeline.ppo import stage as ppo
from tests.reward.stand_in import ANSWERS, PROMPTS, by_hand


def test_the_timeout_is_no_part_of_what_is_made(tmp_path):
    made = [
        config.PPOStage(run="t", reward={"source": "http://h", "timeout": each}).resolved() for each in (1, 2)
    ]
    assert made[0] == made[1]


def test_the_command_line_takes_a_url(serve, decoder, tmp_path, capsys):
    server = serve("vllm", decoder)
    (tmp_path / "answers.jsonl").write_text(
        "".join(
            json.dumps({"prompt": p, "response": a}) + "\n" for p, a in zip(PROMPTS, ANSWERS, strict=True)
        )
    )
    files = ["--input", str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "scored.jsonl")]
    assert cli.main(["score", "--reward", server.url, *files]) == 0
    assert [json.loads(line)["reward"] for line in (tmp_path / "scored.jsonl").open()] == by_hand(decoder)
    capsys.readouterr()
    assert (
        cli.main(["compare", "--reward", server.url, "--reads", str(decoder), "Name a fruit.", *ANSWERS[:3]])
        == 0
    )
    best = RewardModel.load(decoder).rank("Name a fruit.", ANSWERS[:3])[0]
    assert capsys.readouterr().out.splitlines()[1].split(None, 2)[2] == ANSWERS[best]
    assert (
        cli.main(["compare", "--reward", str(decoder), "--reads", str(decoder), "Name a fruit.", "A.", "B."])
        == 2
    )
    assert "error: --reward" in capsys.readouterr().err


def test_ppo_trains_on_one_and_doctor_sees_it(serve, decoder, tiny_feedback, tiny_gpt2, tmp_path, capsys):
    server = serve("vllm", decoder)
    steps = {
        "num_rollouts": 1,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 1,
        "response_tokens": 4,
        "report_to": "none",
    }
    stage = {
        "run": "t",
        "runs": str(tmp_path),
        "policy": str(tiny_gpt2),
        "records": str(tiny_feedback),
        "training": steps,
    }
    served_one = {"source": server.url, "reads": str(decoder), "length_penalty": 1.0}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(stage | {"reward": served_one}))
    assert cli.main(["doctor", "--config", str(tmp_path / "ppo.yaml"), "--device-memory", "8"]) == 0
    assert f"reward_0   {server.url}: vllm serves rm, encoded as for {decoder}" in capsys.readouterr().out
    (tmp_path / "reward.yaml").write_text(
        yaml.safe_dump({"run": "t", "runs": str(tmp_path), "model": "scratch"})
    )
    to_come = [f"ppo.reward.reads={tmp_path}/t/reward", "ppo.reward.length_penalty=0"]
    assert cli.main(["doctor", "--config", str(tmp_path / "ppo.yaml"), "--device-memory", "8", *to_come]) == 0
    assert f"{server.url}: reads {tmp_path}/t/reward: not made yet; rlhf run" in capsys.readouterr().out
    assert (
        cli.main(
            [
                "doctor",
                "--config",
                str(tmp_path / "ppo.yaml"),
                "--device-memory",
                "8",
                f"ppo.reward.reads={tmp_path}/nowhere",
            ]
        )
        == 2
    )
    assert f"reward_0   error: {tmp_path}/nowhere: does not exist; run:" in capsys.readouterr().out
    folder = ppo.run(config.PPOStage(**stage, reward=served_one))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"]["reward_0"]["served"]["url"] == server.url
    assert manifest["inputs"]["reward_0"]["path"] == str(decoder)
    assert f"  {server.url}: read as {decoder}" in capsys.readouterr().out
    asked = len(server.asked)
    assert asked > 2
    again = ppo.run(config.PPOStage(**stage, reward=served_one))
    assert again == folder
    assert len(server.asked) == asked + 1  # it is asked once before anything is loaded
    lora = {"lora": {"r": 2}, "one_backbone": "always", "force": True}
    with pytest.raises(UserError, match=f"one_backbone: always, but {server.url} serves it"):
        ppo.run(config.PPOStage(**stage | lora, reward=served_one))
    with pytest.raises(UserError, match="ppo: value_init: reward needs one reward model"):
        ppo.run(
            config.PPOStage(
                **stage | {"training": steps | {"value_init": "reward"}, "force": True}, reward=served_one
            )
        )
    watched = {
        "training": steps | {"eval_strategy": "steps"},
        "evaluation": {"scorer": {"source": server.url}},
    }
    with pytest.raises(UserError, match=r"evaluation.scorer is a copy of what PPO is trained on"):
        ppo.run(config.PPOStage(**stage | watched, reward=str(decoder), force=True))


def test_evaluate_takes_one_as_its_scorer(serve, decoder, tiny_feedback, tiny_gpt2, tmp_path):
    given = {
        "run": "e",
        "runs": str(tmp_path),
        "records": str(tiny_feedback),
        "sft": str(tiny_gpt2),
        "ppo": str(tiny_gpt2),
    }
    sizes = {"prompts": 2, "samples_per_prompt": 1, "best_of": 2, "response_tokens": 4}
    server = serve("vllm", decoder)
    folder = evaluate.run(config.EvaluateStage(**given, **sizes, reward=str(decoder), scorer=server.url))
    found = json.loads((folder / "metrics.json").read_text())
    for policy in ("sft", "ppo"):
        assert found[policy]["scorer_reward"] == pytest.approx(found[policy]["reward"], abs=1e-5)
    assert (
        json.loads((folder / "manifest.json").read_text())["inputs"]["scorer"]["served"]["engine"] == "vllm"
    )


def test_a_run_on_a_served_model_needs_no_reward_stage(
    serve, decoder, tiny_feedback, tiny_gpt2, tmp_path, capsys
):
    server = serve("vllm", decoder)
    training = {"num_rollouts": 1, "per_device_train_batch_size": 4, "response_tokens": 4}
    common = {"runs": str(tmp_path), "records": str(tiny_feedback)}
    sizes = {"prompts": 2, "samples_per_prompt": 1, "best_of": 2, "response_tokens": 4}
    stages = {
        "ppo": {"policy": str(tiny_gpt2), "reward": server.url, "training": training},
        "evaluate": {"sft": str(tiny_gpt2), "scorer": str(decoder), **sizes},
    }
    folder = tmp_path / "served"
    folder.mkdir()
    for name, values in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | values))
    assert cli.main(["run", "--recipe", str(folder)]) == 0
    assert "reward: skipped, ppo.reward names no reward model of this run\n" in capsys.readouterr().out
    evaluated = tmp_path / "served" / "evaluate"
    metrics = json.loads((evaluated / "metrics.json").read_text())
    for policy in ("sft", "ppo"):
        assert metrics[policy]["reward"] == pytest.approx(metrics[policy]["scorer_reward"], abs=1e-5)
    manifest = json.loads((evaluated / "manifest.json").read_text())
    assert manifest["inputs"]["reward"]["served"]["url"] == server.url
