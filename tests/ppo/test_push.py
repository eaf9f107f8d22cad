"""`PPOTrainer.push_to_hub` uploads the policy that was trained, with a card, and nothing else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline import PPOConfig, PPOTrainer
from pipeline.errors import UserError
from pipeline.models.loading import load_policy

PROMPTS = Dataset.from_list([{"prompt": "Hello."}, {"prompt": "Name the colour of snow."}])


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is uploaded, in place of the hub."""
    calls: list[dict[str, Any]] = []
    created = SimpleNamespace(repo_id="me/policy")
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **options: calls.append(options) or created)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: calls.append(options) or "commit")
    return calls


def make(policy: Any, tokenizer: Any, folder: Path, **more: Any) -> PPOTrainer:
    sizes = {"num_rollouts": 1, "num_ppo_epochs": 1, "per_device_train_batch_size": 2, "response_tokens": 4}
    args = PPOConfig(str(folder), report_to="none", use_cpu=True, learning_rate=1e-2, **sizes, **more)
    return PPOTrainer(policy, lambda prompts, **_: list(range(len(prompts))), args, PROMPTS, tokenizer)


def test_the_trained_policy_is_pushed_with_a_card(
    uploads: list[dict[str, Any]], tiny_gpt2: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make(load_policy(str(tiny_gpt2), tiny_tokenizer), tiny_tokenizer, tmp_path, hub_token="secret")
    trainer.train()
    assert trainer.push_to_hub("done", private=True) == "commit"
    created, uploaded = uploads
    assert (created["private"], created["token"]) == (True, "secret")
    assert (uploaded["repo_id"], uploaded["commit_message"]) == ("me/policy", "done")
    assert (uploaded["token"], uploaded["run_as_future"]) == ("secret", False)

    folder = Path(uploaded["folder_path"])
    names = {file.name for file in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "value_head.safetensors"} <= names
    assert not names & {"training_args.bin", "trainer_state.json", "samples.jsonl", "optimizer.pt"}
    card = (folder / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("me/policy")' in card
    assert "| response_tokens | 4 |" in card
    for text in ("secret", str(tmp_path), str(tiny_gpt2)):
        assert text not in card
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    trained = trainer.actor.policy.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in loaded.items())


def test_an_adapter_of_a_local_base_is_not_pushed(
    uploads: list[dict[str, Any]], tiny_gpt2: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = load_policy(str(tiny_gpt2), tiny_tokenizer)
    trainer = make(get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")), tiny_tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"is an adapter of .*, a local path that others do not have"):
        trainer.push_to_hub()
    assert uploads == []


def test_an_adapter_of_a_base_on_the_hub_names_it(
    uploads: list[dict[str, Any]], tiny_gpt2: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = load_policy(str(tiny_gpt2), tiny_tokenizer)
    policy = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))
    policy.peft_config["default"].base_model_name_or_path = "org/base"
    trainer = make(policy, tiny_tokenizer, tmp_path)
    trainer.push_to_hub(blocking=False)
    folder = Path(uploads[1]["folder_path"])
    assert uploads[1]["run_as_future"] is True
    card = (folder / "README.md").read_text()
    assert card.startswith('---\npipeline_tag: "text-generation"\nlibrary_name: "peft"')
    assert 'base_model: "org/base"' in card
    assert str(tiny_gpt2) not in card + (folder / "adapter_config.json").read_text()


def test_pushing_while_it_trains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"push_to_hub=True is not for PPO; .*call push_to_hub\(\) after"):
        PPOConfig(str(tmp_path), push_to_hub=True)
