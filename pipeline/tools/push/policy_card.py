"""The model card of a policy, made when it is pushed: what the manifest and the log say of it."""

import json
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import hub
from pipeline.artifacts.manifest import Artifact
from pipeline.formatting.markdown import format_place, markdown_environment
from pipeline.formatting.numbers import format_metric

COMMON = ("run", "runs", "force")


def policy_card_text(opened: Artifact, folder: Path, to: str, *, is_adapter: bool) -> str:
    """README.md of the policy in `folder`, which is the artifact or a part of it; its code reads `to`."""
    made, step = opened.manifest["fingerprint"]["config"], _step(opened, folder)
    algorithm, start = made.get("algorithm", "sft"), made.get("policy") or made["model"]
    values = {
        "to": to, "config": made, "stage": opened.manifest["stage"], "versions": opened.manifest["versions"], "algorithm": algorithm,
        "start": None if start == "scratch" else start, "step": step, "best": folder.name == "best", "is_adapter": is_adapter,
        "tokens": made["training"].get("response_tokens", 48), "figures": _metrics(opened, step),
        "front": _front_matter(start, algorithm, is_adapter),
        "settings": yaml.safe_dump(_placed({k: v for k, v in made.items() if k not in COMMON}), sort_keys=False, allow_unicode=True),
    }  # fmt: skip
    environment = markdown_environment(Path(__file__).parent)
    return environment.get_template("policy.md.j2").render(values)


def _step(opened: Artifact, folder: Path) -> int | None:
    """The step at which a part of the artifact was kept: of `best`, and of `policies/step-N`; None of the artifact itself."""
    if folder.name == "best":
        return int(opened.manifest["metrics"]["best_step"])
    return int(folder.name.removeprefix("step-")) if folder.name.startswith("step-") else None


def _metrics(opened: Artifact, step: int | None) -> list[list[str]]:
    """[figure, value] of the evaluation of this policy."""
    found: dict[str, Any] = opened.manifest["metrics"]
    if step is not None:
        log = [json.loads(line) for line in (opened.path / "log.jsonl").read_text().splitlines()]
        found = {name: value for entry in log if entry["step"] == step for name, value in entry.items()}
    return [
        [name[5:].replace("_", " "), format_metric(value)]
        for name, value in found.items()
        if name.startswith("eval_")
    ]


def _front_matter(start: str, algorithm: str, is_adapter: bool) -> str:
    """What a hub reads of the card."""
    base = {"base_model": start} if start != "scratch" and hub.is_hub_id(start) else {}
    library = {"pipeline_tag": "text-generation", "library_name": "peft" if is_adapter else "transformers"}
    return yaml.safe_dump(library | {"tags": ["rlhf", algorithm]} | base, sort_keys=False)


def _placed(value: Any) -> Any:
    """The same without this machine's absolute paths."""
    if isinstance(value, dict):
        return {name: _placed(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_placed(each) for each in value]
    return format_place(value) if isinstance(value, str) and Path(value).is_absolute() else value
