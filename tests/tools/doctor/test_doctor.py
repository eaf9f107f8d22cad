"""`rlhf doctor`: what it says of a recipe that has not run, of one that has, and of what is wrong."""

import json
import re
import shutil

import pytest

from pipeline import config
from pipeline.cli import main
from pipeline.sft import stage as sft
from pipeline.tools.doctor.examine import examine
from pipeline.tools.doctor.memory import estimate
from pipeline.tools.doctor.plans import plan_stage, stage_arguments


def lines(text: str) -> dict[str, str]:
    return {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}


def test_a_recipe_that_has_not_run(tmp_path, capsys):
    assert main(["doctor", "--config", "configs/demo", f"runs={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if not line.startswith(" ")] == [
        "prepare",
        "sft",
        "reward",
        "ppo",
        "evaluate",
    ]
    assert "not made yet; rlhf run --recipe demo --until reward makes it" in lines(said)["reward"]
    assert "KV cache" in lines(said)["memory"]


@pytest.mark.parametrize("recipe", ["llama-8b-qlora", "smollm2"])
def test_a_recipe_of_real_size_fits_where_it_says(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.tools.doctor.plans.reachable_commit", lambda _: None)
    models = ["sft.model=meta-llama/Llama-3.1-8B-Instruct", "reward.model=meta-llama/Llama-3.1-8B-Instruct"]
    more = models if recipe == "llama-8b-qlora" else []
    code = main(
        ["doctor", "--config", f"configs/{recipe}", "--device-memory", "24", f"runs={tmp_path}", *more]
    )
    said = capsys.readouterr()
    if recipe == "smollm2":  # has no shape beside it, and there is no hub here
        assert code == 2
        assert (
            "HuggingFaceTB/SmolLM2-135M-Instruct: is not on this machine, and the hub cannot be reached"
            in said.out
        )
        assert said.err.startswith("error: doctor: 4 things are wrong")
        return
    assert code == 0
    peaks = [float(line.split()[1]) for line in said.out.splitlines() if line.startswith("  peak")]
    assert len(peaks) == 4
    assert all(5 < peak < 24 for peak in peaks)
    assert (
        main(
            [
                "doctor",
                "--config",
                f"configs/{recipe}/ppo.yaml",
                "--device-memory",
                "8",
                f"runs={tmp_path}",
                *more,
            ]
        )
        == 2
    )
    assert "of 8.0 GB: it does not fit" in capsys.readouterr().out


def test_of_a_run_it_reads_tokenizer_template_and_a_batch(tiny_records, tiny_gpt2, tmp_path):
    stage = config.PPOStage(
        run="t", runs=str(tmp_path), policy=str(tiny_gpt2), records=str(tiny_records), reward="math:sqrt"
    )
    found, wrong = examine(stage, {}, None)
    said = dict(found)
    assert wrong == 0
    assert "files, external" in said["policy"]
    assert "files, as its stage wrote them" in said["records"]
    assert said["tokenizer"] == "558 tokens, pad '<|pad|>', EOS '<|eos|>'"
    assert said["template"].startswith("'Hello.' renders as 'Hello.\\n'")
    assert "0 prompts over 256 (overlong: truncate_left)" in said["batch"]
    assert float(said["peak"].split()[0]) > 0.1


def test_what_is_wrong_is_named_and_counted(tiny_records, tmp_path, capsys):
    (tmp_path / "ppo.yaml").write_text(
        f"records: {tiny_records}\npolicy: {tmp_path}/nowhere\nreward: math:no_such\ntraining: "
        f"{{learnin_rate: 1}}\n"
    )
    assert main(["doctor", "--config", str(tmp_path / "ppo.yaml")]) == 2
    said = capsys.readouterr()
    assert "did you mean 'learning_rate'" in lines(said.out)["config"]
    assert "error: " in lines(said.out)["policy"]
    assert "nowhere: does not exist" in lines(said.out)["policy"]
    assert said.err == "error: doctor: 2 things are wrong: see the lines that begin with 'error:'\n"


def test_what_it_trips_over_is_one_line_and_the_rest_is_looked_at(tiny_records, tiny_gpt2, tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{")
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records), "reward": "math:sqrt"}
    found, wrong = examine(config.PPOStage(policy=str(tmp_path / "policy"), **common), {}, None)
    assert wrong >= 2
    assert dict(found)["records"].startswith(f"{tiny_records}: ")
    found, wrong = examine(
        config.PPOStage(policy=str(tiny_gpt2), lora={"target_modules": ["nope"]}, **common), {}, None
    )
    assert wrong == 1
    assert "nope" in dict(found)["memory"]
    found, wrong = examine(
        config.PPOStage(policy=str(tiny_gpt2), training={"response_tokens": 400}, **common), {}, None
    )
    assert "response_tokens=400 leaves no room for a prompt" in dict(found)["memory"]


def test_a_small_model_is_asked_how_it_may_be_batched(
    tiny_records, tiny_gpt2, tiny_encoders, tiny_tokenizer, tmp_path
):
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records)}

    def model(stage):
        return dict(examine(stage, {}, None)[0])["model"]

    assert model(config.SFTStage(model=str(tiny_gpt2), max_length=96, **common)) == (
        "GPT2LMHeadModel reads 128 tokens; generates for prompts of any lengths, with a cache; "
        "reads rows together"
    )
    assert model(config.RewardStage(model=str(tiny_encoders["bert"]), max_length=96, **common)) == (
        "BertForSequenceClassification reads 130 tokens; a batch has rows of any lengths"
    )
    encoder = shutil.copytree(tiny_encoders["bert"], tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(encoder)
    policy = config.PPOStage(policy=str(encoder), reward="math:sqrt", **common)
    assert "BertLMHeadModel sees the tokens that it is to predict" in model(policy)
    long = config.SFTStage(model=str(tiny_gpt2), max_length=200, **common)
    assert "error: " in model(long)
    assert "reads at most 128 tokens, but max_length is 200" in model(long)


def test_an_adapter_that_is_there_counts_as_one_to_come(tiny_records, tiny_llama, tmp_path):
    """A published adapter's own config says that it is frozen."""
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records)}
    learned = config.SFTStage(
        model=str(tiny_llama), max_length=96, lora={"r": 4}, training={"max_steps": 1}, **common
    )
    stage = config.PPOStage(lora={}, reward="math:sqrt", **common)
    before = estimate(*plan_stage(stage, {"sft": learned, "ppo": stage}, stage_arguments(stage), 20))
    sft.run(learned)
    assert estimate(*plan_stage(stage, {"sft": learned, "ppo": stage}, stage_arguments(stage), 20)) == before
    assert before["adapters"] == 2 * before["gradients"] > 0


def test_the_critic_is_an_input_and_counts(tiny_records, tiny_gpt2, tiny_llama, tmp_path):
    common = {"run": "t", "runs": str(tmp_path), "records": str(tiny_records), "reward": "math:sqrt"}

    def findings(**critic):
        stage = config.PPOStage(policy=str(tiny_gpt2), critic=critic, **common)
        found, wrong = examine(stage, {}, None)
        return dict(found), wrong, estimate(*plan_stage(stage, {}, stage_arguments(stage), 20))

    _, wrong, alone = findings()
    found, _, beside = findings(on="model")
    assert wrong == 0
    assert "critic" not in found
    assert beside["weights"] == 1.5 * alone["weights"]  # the policy, the reference, the critic
    assert beside["gradients"] == 2 * alone["gradients"]
    found, wrong, larger = findings(on="model", source=str(tiny_llama))
    assert wrong == 0
    assert found["critic"].endswith("files, external")
    assert larger["weights"] != beside["weights"]
    found, wrong, _ = findings(source=str(tiny_llama))
    assert wrong == 1
    assert "has no critic; expected the artifact of a ppo stage" in found["critic"]


def test_what_is_no_config_is_told(tmp_path, capsys):
    assert main(["doctor", "--config", str(tmp_path)]) == 2
    assert "expected a recipe's folder, or one of its files: prepare.yaml" in capsys.readouterr().err


def test_the_shape_beside_the_recipe_stands_for_no_other_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.tools.doctor.plans.reachable_commit", lambda _: None)
    given = [
        "--config",
        "configs/llama-8b-qlora/sft.yaml",
        "model=meta-llama/Llama-3.1-70B-Instruct",
        f"runs={tmp_path}",
    ]
    assert main(["doctor", *given]) == 2
    assert 'with "_name_or_path": "meta-llama/Llama-3.1-70B-Instruct" in it' in capsys.readouterr().out


def test_the_shape_beside_the_recipe_is_llama_s():
    shape = json.loads((config.RECIPES / "llama-8b-qlora" / "config.json").read_text())
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]) == (4096, 32, 128256)


@pytest.mark.parametrize(
    ("recipe", "gigabytes", "launch"),
    [("qwen-0.5b", "24", []), ("llama-8b-fsdp", "80", ["--launch", "fsdp2"])],
)
def test_recipes_trained_in_full_fit_where_they_say(recipe, gigabytes, launch, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.tools.doctor.plans.reachable_commit", lambda _: None)
    given = ["--config", f"configs/{recipe}", "--device-memory", gigabytes, f"runs={tmp_path}"]
    assert main(["doctor", *given, *launch]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory")]
    weights, optimizer = (
        float(re.search(rf"{what} ([\d.]+)", shown[2]).group(1)) for what in ("weights", "optimizer")
    )
    # of 8.03 billion weights, those of policy and reference in eighths; of the reward model 7.5 billion
    # whole
    if launch:
        assert (weights, optimizer) == (
            pytest.approx(2 * 4 * 8.03 / 8 + 4 * 7.505, abs=0.02),
            pytest.approx(8 * 8.03 / 8, abs=0.01),
        )
        assert main(["doctor", *given]) == 2
    else:  # policy, reference and reward model of 0.494 billion
        assert (weights, optimizer) == (
            pytest.approx(3 * 4 * 0.494, abs=0.02),
            pytest.approx(8 * 0.494, abs=0.01),
        )


def test_a_launch_that_is_not_there_is_refused(capsys):
    assert main(["doctor", "--config", "configs/demo", "--launch", "fspd2"]) == 2
    assert "did you mean 'fsdp2'?; there are: cpu, deepspeed-zero2" in capsys.readouterr().err
