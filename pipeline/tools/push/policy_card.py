"""The model card of a policy, written when it is pushed, from its manifest and its log."""

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import hub
from pipeline.artifacts.manifest import Artifact
from pipeline.formatting.markdown import format_place, markdown_environment
from pipeline.formatting.numbers import format_metric

COMMON_KEYS = ("run", "runs", "force")  # keys of a config that its card leaves out


def policy_card_text(opened: Artifact, folder: Path, to: str, *, is_adapter: bool) -> str:
    """Return the README.md of the policy in `folder`, which is the artifact or a folder inside it.

    The code on the card loads `to`.
    """
    config, step = opened.manifest["fingerprint"]["config"], _step(opened, folder)
    algorithm, start = config.get("algorithm", "sft"), config.get("policy") or config["model"]
    settings = _without_places({key: value for key, value in config.items() if key not in COMMON_KEYS})
    values = {
        "to": to,
        "config": config,
        "stage": opened.manifest["stage"],
        "versions": opened.manifest["versions"],
        "algorithm": algorithm,
        "start": None if start == "scratch" else start,
        "step": step,
        "is_best": folder.name == "best",
        "is_adapter": is_adapter,
        "tokens": config["training"].get("response_tokens", 48),
        "metrics": _metrics(opened, step),
        "front": _front_matter(start, algorithm, is_adapter),
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    }
    environment = markdown_environment(Path(__file__).parent)
    return environment.get_template("policy.md.j2").render(values)


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
        if name.startswith("eval_")
    ]


def _front_matter(start: str, algorithm: str, is_adapter: bool) -> str:
    """Return the metadata that a hub reads from the card."""
    base = {"base_model": start} if start != "scratch" and hub.is_hub_id(start) else {}
    library = {"pipeline_tag": "text-generation", "library_name": "peft" if is_adapter else "transformers"}
    return yaml.safe_dump(library | {"tags": ["rlhf", algorithm]} | base, sort_keys=False)


def _without_places(value: Any) -> Any:
    """Return the same value without absolute paths of this machine."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return format_place(value) if isinstance(value, str) and Path(value).is_absolute() else value
