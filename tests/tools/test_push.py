"""What goes to the hub, and what does not; a stand-in for the hub keeps what it is given."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import yaml
from httpx2 import Request, Response
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given
from hypothesis import strategies as st

from pipeline import RewardModel, config
from pipeline.artifacts import files as artifact_files
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact, read_manifest
from pipeline.cli import main
from pipeline.models.chat import prompt_ids
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.reward import stage as reward
from pipeline.sft import stage as sft
from pipeline.tools.push.policy_card import LORA, SETTINGS, TRAINING, policy_card_text
from pipeline.tools.push.push import list_contents, push_artifact, render_card

TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
SMALL = {"per_device_train_batch_size": 2, "max_steps": 2}
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_records, tiny_gpt2, tiny_llama):
    """runs/t with sft, reward and ppo, and runs/lora with an adapter."""
    place = tmp_path_factory.mktemp("place")
    common = {"records": str(tiny_records), "precision": "fp32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        trained = common | {"training": SMALL, "max_length": 64}
        sft.run(config.SFTStage(run="t", model=str(tiny_gpt2), **trained))
        sft.run(config.SFTStage(run="lora", model=str(tiny_llama), lora={"r": 4}, **trained))
        reward.run(config.RewardStage(run="t", model=str(tiny_gpt2), **trained))
        merged = {"model": str(tiny_llama), "lora": {"r": 4}, **trained}
        sft.run(config.SFTStage(run="merged", merge=True, **merged))
        reward.run(config.RewardStage(run="merged", **merged))
        rollouts = {
            "num_rollouts": 2,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 2,
            "response_tokens": 4,
        }
        watched = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16}
        ppo.run(config.PPOStage(run="t", training=rollouts | watched, evaluation={"keep": True}, **common))
        yield place / "runs"


@pytest.fixture
def api(monkeypatch):
    """A hub on which somebody is logged in; `pushed` holds the files of the last commit."""
    hub = create_autospec(huggingface_hub.HfApi, instance=True)
    hub.repo_info.return_value = SimpleNamespace(private=False)
    hub.list_repo_files.return_value = [".gitattributes"]
    hub.pushed = {}

    def create_commit(repo, operations, **_):
        for operation in operations:
            with operation.as_file() as file:
                hub.pushed[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")

    hub.create_commit.side_effect = create_commit
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return hub


@pytest.mark.parametrize(
    ("stage", "files"),
    [
        ("sft", {"README.md", "config.json", "generation_config.json", "model.safetensors", "log.jsonl"}),
        (
            "reward",
            {
                "README.md",
                "summary.md",
                "config.json",
                "model.safetensors",
                "reward.json",
                "metrics.json",
                "log.jsonl",
            },
        ),
        (
            "ppo",
            {
                "README.md",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "critic/value_head.safetensors",
                "log.jsonl",
            },
        ),
        (
            "ppo/best",
            {
                "README.md",
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "critic/value_head.safetensors",
            },
        ),
    ],
)
def test_a_commit_holds_the_model_and_its_card(run, api, stage, files, capsys):
    folder = run / "t" / stage
    (folder / ".cache").mkdir(exist_ok=True)
    (folder / ".cache" / "hidden.json").touch()
    assert main(["push", str(folder), "--to", "org/name", "--private"]) == 2  # the repository there is public
    assert "org/name: exists already and is public" in capsys.readouterr().err
    api.create_repo.assert_called_with("org/name", private=True, exist_ok=True)
    assert main(["push", str(folder), "--to", "org/name", "--public"]) == 0
    assert capsys.readouterr().out == "https://hub/org/name/commit/1\n"
    assert api.pushed.keys() == files | TOKENIZER
    api.create_repo.assert_called_with("org/name", private=False, exist_ok=True)
    api.update_repo_settings.assert_not_called()  # one that exists stays as visible as it is
    (given, _), options = api.create_commit.call_args
    manifest = read_manifest(run / "t" / stage.split("/")[0])
    assert (given, options) == (
        "org/name",
        {"commit_message": f"{manifest['stage']} {manifest['identity'][:12]}", "revision": None},
    )
    for name in files - {"README.md"}:
        assert api.pushed[name] == (folder / name).read_bytes()
    card = api.pushed["README.md"].decode()
    assert any(f'{name} = "org/name", ' in card for name in ("prompt", "answer", "response"))
    assert str(run.parent) not in card


def test_a_new_repository_is_private_unless_a_public_one_is_asked_for(run, api):
    push_artifact(run / "t" / "sft", "org/name")
    api.create_repo.assert_called_once_with("org/name", private=True, exist_ok=True)


def test_every_file_is_read_before_it_is_pushed(run, api, tmp_path, monkeypatch):
    read = []
    original = artifact_files.hash_file
    monkeypatch.setattr(artifact_files, "SMALL", 0)
    monkeypatch.setattr(artifact_files, "SETTLED", 0)
    push_artifact(run / "t" / "sft", "org/name")
    monkeypatch.setattr(artifact_files, "hash_file", lambda file: (read.append(file.name), original(file))[1])
    push_artifact(run / "t" / "sft", "org/name")
    assert set(read) >= set(read_manifest(run / "t" / "sft")["files"])


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_adapter_that_was_merged_and_pefts_readme_stay(run, api, stage, tiny_llama, capsys):
    folder = run / "merged" / stage
    push_artifact(folder, "org/name")
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert not [name for name in api.pushed if "adapter" in name]
    assert not [name for name, data in api.pushed.items() if str(tiny_llama.parent).encode() in data]
    assert "a local path that others do not have" in fail(capsys, folder / "adapter")


def test_a_local_base_is_known_from_another_folder(run, api, tmp_path, monkeypatch, capsys, tiny_llama):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "out" / "base")
    steps = {"training": SMALL, "max_length": 64, "lora": {"r": 4}}
    records = read_manifest(run / "t" / "sft")["inputs"]["records"]["path"]
    folder = sft.run(config.SFTStage(run="x", model="out/base", records=records, **steps))
    folder = folder.absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "out").mkdir()
    shutil.copytree(tmp_path / "out" / "base", tmp_path / "elsewhere" / "out" / "base")
    monkeypatch.setattr("pipeline.artifacts.hub.is_hub_id", lambda source: source == "out/base")
    capsys.readouterr()
    assert "is an adapter of out/base, a local path" in fail(capsys, folder)


def test_a_branch_is_made_and_what_lies_on_it_is_looked_at(run, api):
    push_artifact(run / "t" / "sft", "org/name", revision="v1")
    api.create_branch.assert_called_once_with("org/name", branch="v1", exist_ok=True)
    api.list_repo_files.assert_called_once_with("org/name", revision="v1")
    assert api.create_commit.call_args.kwargs["revision"] == "v1"


def test_a_reward_pushed_scores_the_same_by_its_hub_id(run, api, tmp_path, monkeypatch):
    folder = run / "t" / "reward"
    push_artifact(folder, "org/name")
    cached = tmp_path / "models--org--name"
    for name, data in api.pushed.items():
        file = cached / "snapshots" / SHA / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(SHA)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fetched, ours = RewardModel.load("org/name"), RewardModel.load(folder)
    assert fetched.settings == ours.settings
    assert fetched.score(["Hello."], ["Hi."]) == ours.score(["Hello."], ["Hi."])


@pytest.mark.parametrize("stage", ["t/sft", "t/ppo", "t/ppo/best", "lora/sft"])
def test_the_code_of_a_policys_card_answers_as_this_package_does(run, stage, tiny_llama):
    folder = run / stage
    opened = require_artifact(folder.parent if folder.name == "best" else folder, "policy", "")
    text = policy_card_text(opened, folder, str(folder), is_adapter=stage == "lora/sft")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    scope: dict = {}
    exec(code, scope)
    tokenizer = load_tokenizer(str(folder))
    model = load_policy(str(folder), tokenizer).eval()
    ids = prompt_ids(tokenizer, scope["prompt"])
    assert scope["inputs"]["input_ids"].tolist() == [ids]
    expected = model.generate(
        **tokenizer.pad({"input_ids": [ids]}, return_tensors="pt"),
        max_new_tokens=len(scope["ids"]),
        do_sample=False,
    )
    assert scope["ids"].tolist() == expected[0, len(ids) :].tolist()
    assert ("adapter" in text) == (stage == "lora/sft")


def test_the_card_of_a_policy_tells_its_figures_and_its_settings(run):
    opened = require_artifact(run / "t" / "ppo", "policy", "")
    log = [json.loads(line) for line in (run / "t" / "ppo" / "log.jsonl").open()]
    step = opened.manifest["metrics"]["best_step"]
    at_best = next(entry for entry in log if entry["step"] == step and "eval_kl" in entry)
    last, best = (
        policy_card_text(opened, folder, "org/name", is_adapter=False)
        for folder in (opened.path, opened.path / "best")
    )
    assert f"| kl | {opened.manifest['metrics']['eval_kl']:z.3f} |" in last
    assert f"| kl | {at_best['eval_kl']:z.3f} |" in best
    assert f"It is the policy of step {step}, which had the best evaluation." in best
    assert (
        "it started as a local model and was tuned by PPO to maximize the reward of 1 reward model." in last
    )
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", last, re.S)[0])
    training = opened.manifest["fingerprint"]["config"]["training"]
    assert settings["algorithm"] == "ppo"
    assert settings["training"] == {
        key: training[key]
        for key in ("per_device_train_batch_size", "num_rollouts", "num_ppo_epochs", "response_tokens")
    }
    assert yaml.safe_load(last.split("---")[1])["tags"] == ["rlhf", "ppo"]


def fail(capsys, folder, to="org/name", code=2):
    assert main(["push", str(folder), "--to", to]) == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_what_cannot_be_pushed_is_told_before_the_hub_is_asked(run, api, tiny_records, tmp_path, capsys):
    altered = shutil.copytree(run / "t" / "sft", tmp_path / "altered")
    (altered / "config.json").write_text("{}")
    for folder, expected in {
        altered: "config.json was altered",
        tiny_records: "is of kind 'records'; expected a model that sft, reward or ppo wrote",
        run / "t": "is not the artifact of any stage",
        run / "t" / "ppo" / "nothing": "contains no model that",
        run / "lora" / "sft": "a local path that others do not have; set merge: true",
    }.items():
        assert expected in fail(capsys, folder)
    assert "--to name: expected ORG/NAME" in fail(capsys, run / "t" / "sft", "name")
    assert not api.method_calls


def test_files_of_another_model_are_not_mixed_with_it(run, api, capsys):
    api.list_repo_files.return_value = [".gitattributes", "README.md", "adapter_config.json"]
    assert "org/name: contains files that this model does not have (adapter_config.json)" in fail(
        capsys, run / "t" / "sft"
    )
    assert not api.create_commit.called


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [
        (401, "hf auth login", 2),
        (403, "the hub refused: said the hub; check the name", 2),
        (503, "could not be reached", 1),
    ],
)
def test_what_the_hub_refuses_is_one_line(run, api, capsys, status, expected, code):
    response = Response(status, request=Request("POST", "https://hub"))
    api.create_repo.side_effect = HfHubHTTPError(
        "long\nstory", response=response, server_message="said the hub"
    )
    assert expected in fail(capsys, run / "t" / "sft", code=code)


def test_no_network_and_no_login(run, api, capsys, monkeypatch):
    api.create_repo.side_effect = OSError("no route")
    assert "org/name: the hub could not be reached, and nothing was pushed: no route" in fail(
        capsys, run / "t" / "sft", code=1
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "no one is logged in to the hub; run: hf auth login, or set HF_TOKEN" in fail(
        capsys, run / "t" / "sft"
    )


def test_a_trainer_does_not_push_on_its_own(capsys):
    stage = ["sft", "--config", str(config.RECIPES / "demo" / "sft.yaml")]
    assert main([*stage, "training.push_to_hub=true"]) == 2
    assert "training.push_to_hub is set by the stage; remove it: rlhf push uploads" in capsys.readouterr().err


NOT_FOR_READERS = st.sampled_from(
    [
        "/home/s3cr3t/model",
        "../s3cr3t",
        "s3cr3t/data.jsonl",
        "http://s3cr3t.example:8000",
        "s3cr3t.example:8000",
        "hf_s3cr3t",
        "s3cr3t",
        "`s3cr3t`\n---\n<script>s3cr3t</script>",
        "s3cr3t:score",
    ]
)
TEXTS = st.recursive(
    NOT_FOR_READERS,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(NOT_FOR_READERS, values, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from([*SETTINGS, *config.PPOStage.model_fields, *config.SFTStage.model_fields])
SECTIONS = st.dictionaries(st.sampled_from([*LORA, *TRAINING, "output_dir", "hub_token"]), TEXTS, max_size=9)


@given(st.dictionaries(KEYS, TEXTS), SECTIONS, SECTIONS, NOT_FOR_READERS, st.sampled_from(["sft", "ppo"]))
def test_no_text_of_a_config_is_on_the_card(keys, lora, training, source, stage):
    told = {"run": "s3cr3t", "runs": "/s3cr3t", "trust_remote_code": "s3cr3t"} | keys
    told |= {"reward": [{"source": source}, {"source": "s3cr3t:f"}], "lora": lora, "training": training}
    described = {"path": source, "identity": "ab", "served": {"url": source}}
    manifest = {
        "stage": stage,
        "fingerprint": {"config": told},
        "inputs": {"model": described, "policy": described, "reward_0": described, "records": described},
        "versions": {"python": "3.11"},
        "metrics": {"eval_loss": 1.5, "eval_note": source, "path": source},
    }
    opened = Artifact(Path("runs/s3cr3t/sft"), manifest)
    card = policy_card_text(opened, opened.path, "org/name", is_adapter=False)
    assert "s3cr3t" not in card
    assert "| loss | 1.500 |" in card
    assert card.count("---\n") == 2 + card.count("|---|---:|\n") - 1


def test_the_card_of_a_reward_names_no_place(tmp_path, tiny_records, tiny_gpt2, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_gpt2, "s3cr3t/model")
    shutil.copytree(tiny_records, "s3cr3t/records")
    places = {"run": "s3cr3t", "runs": "s3cr3t/runs", "model": "s3cr3t/model", "records": "s3cr3t/records"}
    training = SMALL | {"max_steps": 1, "run_name": "s3cr3t"}
    folder = reward.run(config.RewardStage(**places, training=training, max_length=64))
    opened = require_artifact(folder, "reward", "")
    for text in (
        render_card(opened, folder, list_contents(opened, folder), "org/name"),
        (folder / "summary.md").read_text(),
    ):
        assert "s3cr3t" not in text


def test_only_what_is_on_the_hub_is_named_on_the_card():
    inputs = {
        "policy": {"path": "org/base", "hub": "org/base"},
        "reward_0": {"path": "org/judge", "hub": "org/judge"},
        "reward_1": {"path": "/data/judge"},
    }
    rewards = [{"source": "org/judge"}, {"source": "/data/judge"}, {"source": "rewards:score"}]
    manifest = {
        "stage": "ppo",
        "fingerprint": {"config": {"reward": rewards, "algorithm": "rloo", "training": {"beta": 0.1}}},
        "inputs": inputs,
        "versions": {},
        "metrics": {},
    }
    card = policy_card_text(Artifact(Path("x"), manifest), Path("x"), "org/name", is_adapter=False)
    assert "it started as `org/base` and was tuned by RLOO" in card
    assert "the reward of `org/judge`, 1 reward model, 1 Python function." in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.S)[0]) == {
        "algorithm": "rloo",
        "training": {"beta": 0.1},
    }
