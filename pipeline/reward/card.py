"""The model card: README.md in a reward artifact, which ends in what summary.md says alone.

All of it is read from what the artifact was made from and from what was measured on it: no times, no absolute paths.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import yaml
from datasets import Dataset
from peft import PeftModel

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.artifacts.manifest import Artifact
from pipeline.config import OBJECTIVES, RewardStage
from pipeline.formatting.markdown import format_place, markdown_environment
from pipeline.formatting.numbers import format_metric
from pipeline.formatting.tables import Table, metric_tables
from pipeline.models.loading import UNQUANTIZED
from pipeline.reward.encoding import Encoding
from pipeline.reward.settings import RewardSettings
from pipeline.reward.trainer import RewardTrainer
from pipeline.training.arguments import resolve_precision

MOST_ROWS = 20  # of the table of losses


def write_card(
    output: Path, config: RewardStage, settings: RewardSettings, records: Artifact, trainer: RewardTrainer, built: dict[str, Any],
    rows: dict[str, dict[str, int]],
) -> None:  # fmt: skip
    """Write README.md and summary.md; metrics.json is there. `built` is `architecture`'s, `rows` counts rows and their fates by split."""
    environment = markdown_environment(Path(__file__).parent)
    environment.filters["shown"] = format_metric
    metrics, examples = read_json(output / "metrics.json"), cast(Dataset, trainer.train_dataset)
    values = {
        "config": config,
        "settings": settings,
        "how": settings.encoding,
        "kind": OBJECTIVES[config.objective].kind,
        "front": front_matter(config),
        "base": None if config.model == "scratch" else format_place(config.model),
        "code": reward_lines(settings),
        "heads": UNQUANTIZED,
        "records": records,
        "sources": source_table(records.manifest.get("rows") or {}),
        "rows": split_table(rows),
        "built": built,
        "args": trainer.args,
        "state": trainer.state,
        "margins": config.objective == "pairwise" and "margin" in examples.column_names,
        "precision": resolve_precision(config.precision),
        "objective": OBJECTIVES[config.objective].loss,
        "progress": training_table(trainer.state.log_history),
        "measured": {kind: metric_tables(figures) for kind, figures in metrics.items()},
        "limits": known_limits(config, settings, metrics),
    }
    for name, template in (("README.md", "card.md.j2"), ("summary.md", "summary.md.j2")):
        (output / name).write_text(environment.get_template(template).render(values), encoding="utf-8")


def describe_architecture(model: Any) -> dict[str, Any]:
    """Class and number of parameters of a model as it is trained: once an adapter is merged nobody can tell what was."""
    if isinstance(model, PeftModel):
        trained, parameters = model.get_nb_trainable_parameters()
        return {"class": type(model.get_base_model()).__name__, "parameters": parameters, "trained": trained}
    counts = {"parameters": model.num_parameters(), "trained": model.num_parameters(only_trainable=True)}
    return {"class": type(model).__name__, **counts}


def front_matter(config: RewardStage) -> str:
    """What a hub reads of the card."""
    base = {"base_model": config.model} if config.model != "scratch" and hub.is_hub_id(config.model) else {}
    fixed = {
        "pipeline_tag": "text-classification",
        "library_name": "transformers",
        "tags": ["reward-model", "trl"],
    }
    return yaml.safe_dump(fixed | base, sort_keys=False)


def reward_lines(settings: RewardSettings) -> list[str]:
    """Python from the model's inputs to `reward`: what `Settings.reward` makes of one answer's logits."""
    given = (
        "inputs"
        if settings.encoding.form == "pair"
        else 'tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")'
    )
    device = "" if settings.quantization == "none" else ".to(model.device)"
    logits, sign, k = f"model(**{given}{device}).logits", "-" if settings.sign < 0 else "", settings.logit
    match settings.output:
        case "ensemble" if settings.uncertainty_penalty:
            spread = f"{settings.uncertainty_penalty} * logits.std(correction=0)"
            return [f"logits = {logits}[0]", f"reward = ({sign}logits.mean() - {spread}).item()"]
        case "log_odds":
            others = [i for i in range(len(settings.outputs)) if i != k]
            return [
                f"logits = {logits}[0]",
                f"reward = {sign}(logits[{k}] - logits[{others}].logsumexp(0)).item()",
            ]
    part = {"ensemble": ".mean()", "probability": f".softmax(1)[0, {k}]"}.get(settings.output, f"[0, {k}]")
    return [f"reward = {sign}{logits}{part}.item()"]


def source_table(counts: dict[str, Any]) -> Table | None:
    """Where the records come from, and what prepare left out of them; None of records it did not make."""
    found = []
    for name, each in counts.get("by_source", {}).items():
        reasons = ", ".join(
            f"{reason} {format_metric(count)}" for reason, count in each["quarantined"].items()
        )
        found.append([format_place(name), format_metric(each["read"]), format_metric(each["kept"]), reasons])
    return Table("Sources", ("source", "rows read", "kept", "quarantined"), found) if found else None


def split_table(rows: dict[str, dict[str, int]]) -> Table:
    """Rows of each split, and what happened to those that did not fit."""
    fates = list(dict.fromkeys(name for counts in rows.values() for name in counts))
    found = [
        [split, *(format_metric(counts.get(name, 0)) for name in fates)] for split, counts in rows.items()
    ]
    return Table("Splits", ("split", *fates), found)


def training_table(log: Sequence[dict[str, Any]]) -> Table:
    """Losses at each evaluation, or at each logging step where there is none: a training loss is the mean since the row before."""
    evaluated = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    logged = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    logged = logged or [
        (entry["step"], entry["train_loss"]) for entry in log if "train_loss" in entry
    ]  # shorter than `logging_steps`
    steps = sorted(evaluated) or [step for step, _ in logged]
    steps = (
        [steps[(i + 1) * len(steps) // MOST_ROWS - 1] for i in range(MOST_ROWS)]
        if len(steps) > MOST_ROWS
        else steps
    )
    starts = [0, *(step for step, _ in logged)]
    epochs = {step: f"{round(entry['epoch'], 2):g}" for step, entry in evaluated.items()}
    by_epoch = bool(epochs) and all(epoch.isdigit() for epoch in epochs.values())
    found = []
    for before, step in zip([0, *steps], steps, strict=False):
        losses = [
            (loss, max(at - start, 1))
            for (at, loss), start in zip(logged, starts, strict=False)
            if before < at <= step
        ]
        mean = f"{fmean(*zip(*losses, strict=True)):.4f}" if losses else "–"
        found.append(
            [
                epochs[step] if by_epoch else f"{step:,}",
                mean,
                f"{evaluated[step]['eval_loss']:.4f}" if evaluated else "–",
            ]
        )
    return Table("Losses", ("epoch" if by_epoch else "step", "training loss", "validation loss"), found)


def known_limits(config: RewardStage, settings: RewardSettings, metrics: dict[str, Any]) -> list[str]:
    """What its rewards do not say."""
    kind = OBJECTIVES[config.objective].kind
    found = [
        f"All it knows it learned from these {kind}: on other prompts and answers, and on those of a policy trained against it, its reward "
        "may mean nothing."
    ]
    if OBJECTIVES[config.objective].compares:
        centred = (
            "; centring drew it towards zero" if config.training.get("center_rewards_coefficient") else ""
        )
        found.append(
            f"Only differences between answers to one prompt mean something: a constant for each prompt is left open{centred}."
        )
    if config.objective == "classification" and settings.output == "logit":
        found.append(
            "A softmax fixes the logits of an answer only up to a constant, so the logit of one class is not identified; "
            "what is, and compares answers, is `reward_output: log_odds` or `probability`."
        )
    if config.objective == "regression":
        found.append(
            "A reward is a guess at a rating, on the scale of those it was trained on; beyond them it extrapolates."
        )
    found.append(reach(config, settings.encoding))
    pairs = metrics.get("comparisons", {})
    if "accuracy" in pairs and pairs["accuracy"] <= pairs["accuracy_longer"]:
        found.append("On held-out pairs it is no better than preferring the longer answer.")
    return found


def reach(config: RewardStage, how: Encoding) -> str:
    """How much it reads, and what it does not."""
    lost, first, then = (
        ("beginning", "prompt", "answer") if how.truncation == "left" else ("end", "answer", "prompt")
    )
    cut = f"the {lost} of the {first}, and the end of the {then} where that alone is too long"
    if how.form == "concatenation":
        cut = f"its {lost}"
    dropped = " Such rows were left out of training." if config.overlong == "drop" else ""
    return f"It reads at most {how.max_length:,} tokens; what is longer loses {cut}.{dropped}"
