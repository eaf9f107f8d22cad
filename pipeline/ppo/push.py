"""`PPOTrainer.push_to_hub`: upload the policy, its tokenizer and value head, and a card, in one commit.

The folder that is uploaded holds nothing else: no checkpoints, prompts or settings of this machine.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from pipeline.artifacts.files import read_json
from pipeline.artifacts.hub import is_hub_id
from pipeline.distributed.processes import on_main_process
from pipeline.errors import UserError

PUSHED = "pushed"  # the folder in `output_dir` that is uploaded
CARD_SETTINGS = (
    "num_rollouts",
    "num_ppo_epochs",
    "num_mini_batches",
    "learning_rate",
    "response_tokens",
    "temperature",
    "kl_coef",
    "gamma",
    "lam",
    "clip_low",
    "clip_high",
    "vf_coef",
    "seed",
)
CARD = """---
{front}---

# Policy tuned by PPO

A language model that responds to a prompt, tuned by PPO for {steps} optimizer steps.

```python
{imports}

tokenizer = AutoTokenizer.from_pretrained({repository})
model = {loader}.from_pretrained({repository})
```

| setting | value |
| --- | ---: |
{settings}
"""


def push_policy(
    trainer: Any, message: str, *, token: str | None, private: bool | None, **options: Any
) -> Any:
    """Publish the trainer's policy in a folder of its own, and upload it; all ranks call it.

    The repository is created if it is not there. `options` go to `HfApi.upload_folder`. Returns the commit,
    or its Future with `run_as_future`; None on other ranks. Raises `UserError` if the policy is an adapter of
    a local base, which others do not have.
    """
    folder = Path(str(trainer.args.output_dir)) / PUSHED
    on_main_process(lambda: shutil.rmtree(folder, ignore_errors=True))
    trainer.publish(folder)
    if not trainer.is_world_process_zero():
        return None

    adapter = folder / "adapter_config.json"
    base = read_json(adapter).get("base_model_name_or_path", "")
    if base and not is_hub_id(base):
        raise UserError(
            f"ppo: push_to_hub: the policy is an adapter of {base}, a local path that others do not have; "
            "merge it into its base first, with merge_and_unload"
        )
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    card = format_card(trainer, trainer.hub_model_id, base)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return HfApi().upload_folder(
        repo_id=trainer.hub_model_id, folder_path=folder, commit_message=message, token=token, **options
    )


def format_card(trainer: Any, repository: str, base: str) -> str:
    """Return the card of a policy; `base` is the hub id of an adapter's base, or empty."""
    library = "peft" if base else "transformers"
    front = {"pipeline_tag": "text-generation", "library_name": library, "tags": ["rlhf", "ppo"]}
    front |= {"base_model": base} if base else {}
    settings = {name: getattr(trainer.args, name) for name in CARD_SETTINGS}
    log = trainer.state.log_history
    evaluated: dict[str, Any] = next((entry for entry in reversed(log) if "eval_reward" in entry), {})
    settings |= {name: value for name, value in evaluated.items() if name.startswith("eval_")}
    loader = "AutoPeftModelForCausalLM" if base else "AutoModelForCausalLM"
    plain = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    return CARD.format(
        front="".join(f"{name}: {json.dumps(value)}\n" for name, value in front.items()),
        steps=trainer.state.global_step,
        imports=f"from peft import {loader}\nfrom transformers import AutoTokenizer" if base else plain,
        loader=loader,
        repository=json.dumps(repository),
        settings="\n".join(f"| {name} | {value:g} |" for name, value in settings.items()),
    )
