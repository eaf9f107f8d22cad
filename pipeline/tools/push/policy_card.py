"""The model card of a policy, written when it is pushed, from its manifest and its log.

It publishes an allow-list of settings: numbers by their keys, and words of a fixed vocabulary. Paths, hosts,
URLs and the names of runs and local files are never on it.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts.manifest import Artifact
from pipeline.formatting.markdown import format_span, markdown_environment
from pipeline.formatting.numbers import as_finite, format_metric

# What a reader needs in order to judge a policy, and to train one like it.
SETTINGS = (
    *("algorithm", "seed", "precision", "quantization", "adapter", "merge", "packing", "max_length"),
    *("max_prompt_tokens", "overlong", "uncertainty_penalty"),
)
SCRATCH = ("layers", "width", "heads", "vocabulary", "positions")
LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
TRAINING = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size"),
    *("num_rollouts", "num_ppo_epochs", "num_mini_batches", "num_generations", "num_iterations"),
    *("response_tokens", "max_completion_length", "temperature", "top_k", "top_p", "min_p"),
    *("kl_coef", "kl_target", "kl_horizon", "kl_estimator", "target_kl", "beta", "gamma", "lam"),
    *("lam_value", "lam_length", "critic_warmup_patience"),
    *("clip_low", "clip_high", "clip_value", "dual_clip", "epsilon", "epsilon_high", "max_kl"),
    *("vf_coef", "ptx_coef", "min_response_tokens"),
    *("value_init", "critic_warmup_rollouts", "score_normalization", "score_clip", "missing_eos_penalty"),
    *("entropy_coef", "label_smoothing_factor", "neftune_noise_alpha"),
)
# The only texts among the values: others could be names of files, hosts or people.
WORDS = {
    *("ppo", "rloo", "grpo", "auto", "fp32", "bf16", "fp16", "none", "8bit", "4bit", "merge", "continue"),
    *("drop", "truncate_left", "truncate_right", "reference", "running", "reward", "zero", "k1", "k2", "k3"),
    *("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
    *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"),
}


def policy_card_text(opened: Artifact, folder: Path, to: str, *, is_adapter: bool) -> str:
    """Return the README.md of the policy in `folder`, which is the artifact or a folder inside it.

    The code on the card loads `to`.
    """
    config, step = opened.manifest["fingerprint"]["config"], _step(opened, folder)
    settings = public_settings(config)
    start = opened.manifest["inputs"].get("policy") or opened.manifest["inputs"].get("model")
    stage = "sft" if opened.manifest["stage"] == "sft" else "ppo"
    algorithm = "sft" if stage == "sft" else settings.get("algorithm", "ppo")
    tokens = as_finite((config.get("training") or {}).get("response_tokens"))
    values = {
        "to": to,
        "stage": stage,
        "versions": opened.manifest["versions"],
        "algorithm": algorithm,
        "start": _describe_start(start),
        "rewards": _describe_rewards(opened.manifest["inputs"], config),
        "step": step,
        "is_best": folder.name == "best",
        "is_adapter": is_adapter,
        "runs_code": config.get("trust_remote_code") is True,
        "quantization": settings.get("quantization", "none"),
        "tokens": int(tokens or 48),
        "metrics": _metrics(opened, step),
        "front": _front_matter(start, algorithm, is_adapter),
        "settings": yaml.safe_dump(settings, sort_keys=False),
    }
    environment = markdown_environment(Path(__file__).parent)
    return environment.get_template("policy.md.j2").render(values)


def public_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a card publishes: those of the allow-lists that are numbers or known words."""
    public = _select(config, SETTINGS)
    for section, keys in (("scratch", SCRATCH), ("lora", LORA), ("training", TRAINING)):
        if isinstance(config.get(section), dict):
            public[section] = _select(config[section], keys)
    return public


def _select(section: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    values = {key: section[key] for key in keys if key in section}
    return {key: value for key, value in values.items() if isinstance(value, bool) or _is_public(value)}


def _is_public(value: Any) -> bool:
    return as_finite(value) is not None or (isinstance(value, str) and value in WORDS)


def _describe_start(start: dict[str, Any] | None) -> str:
    """Return the model that the training started from, in Markdown; only one on the hub is named."""
    if start is None:
        return "it was randomly initialized"
    return f"it started as {format_span(start['hub']) if 'hub' in start else 'a local model'}"


def _describe_rewards(inputs: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the rewards, in Markdown: those on the hub by name, the others by their number and kind."""
    models = [source for name, source in inputs.items() if name.startswith("reward_")]
    named = [format_span(source["hub"]) for source in models if "hub" in source and "served" not in source]
    others = len(models) - len(named)
    functions = len(config.get("reward") or []) - len(models)
    if others:
        named.append(f"{others} reward model{'s' if others > 1 else ''}")
    if functions > 0:
        named.append(f"{functions} Python function{'s' if functions > 1 else ''}")
    return ", ".join(named) or "a reward"


def _step(opened: Artifact, folder: Path) -> int | None:
    """Return the step of the policy in `best/` or `policies/step-N/`; None for the artifact itself."""
    if folder.name == "best":
        return int(opened.manifest["metrics"]["best_step"])
    return int(folder.name.removeprefix("step-")) if folder.name.startswith("step-") else None


def _metrics(opened: Artifact, step: int | None) -> list[list[str]]:
    """Return [name, value] of each metric in the evaluation of this policy."""
    metrics: dict[str, Any] = opened.manifest["metrics"]
    if step is not None:
        log = [json.loads(line) for line in (opened.path / "log.jsonl").read_text().splitlines()]
        metrics = {name: value for entry in log if entry["step"] == step for name, value in entry.items()}
    return [
        [name.removeprefix("eval_").replace("_", " "), format_metric(value)]
        for name, value in metrics.items()
        if name.startswith("eval_") and as_finite(value) is not None
    ]


def _front_matter(start: dict[str, Any] | None, algorithm: str, is_adapter: bool) -> str:
    """Return the metadata that a hub reads from the card."""
    base = {"base_model": start["hub"]} if start and "hub" in start else {}
    library = {"pipeline_tag": "text-generation", "library_name": "peft" if is_adapter else "transformers"}
    return yaml.safe_dump(library | {"tags": ["rlhf", algorithm]} | base, sort_keys=False)
