"""The model card: README.md in a reward artifact; its second part is also summary.md.

It contains what was measured on the model and what it was made from. `rlhf push` publishes it, so of the
sources it names only those on the hub; it contains no times and no absolute paths.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.artifacts.manifest import Artifact
from pipeline.config import OBJECTIVES, RewardStage
from pipeline.formatting.markdown import format_span, markdown_environment
from pipeline.formatting.numbers import format_metric
from pipeline.formatting.tables import Table, metric_tables
from pipeline.models.chat import conversation_ids, read_markup
from pipeline.models.heads import unquantized_patterns
from pipeline.models.probing import unwrap
from pipeline.models.templates import is_plain
from pipeline.reward.encoding import Encoding
from pipeline.reward.settings import RewardSettings
from pipeline.reward.trainer import RewardTrainer
from pipeline.training.arguments import resolve_precision

LORA_SHOWN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
COMMIT = re.compile("[0-9a-f]{7,40}")
MAX_LOSS_ROWS = 20  # of the table of losses
AGGREGATE_NAMES = {
    "min": "the smallest score of its steps",
    "product": "the product of the scores of its steps",
    "mean": "the mean score of its steps",
    "last": "the score of its last step",
}
TEMPLATES = {"README.md": "card.md.j2", "summary.md": "summary.md.j2"}


def write_card(
    output: Path,
    config: RewardStage,
    settings: RewardSettings,
    records: Artifact,
    trainer: RewardTrainer,
    architecture: dict[str, Any],
    rows: dict[str, dict[str, int]],
) -> None:
    """Write README.md and summary.md into `output`, which has metrics.json.

    `architecture` is from `describe_architecture`. `rows` counts, for each split, its rows and those that did
    not fit, by outcome.
    """
    environment = markdown_environment(Path(__file__).parent)
    environment.filters["metric"] = format_metric
    objective = OBJECTIVES[config.objective]
    metrics, examples = read_json(output / "metrics.json"), cast(Dataset, trainer.train_dataset)
    values = {
        "config": config,
        "settings": settings,
        "auto_class": settings.auto_class.__name__,
        "aggregate": AGGREGATE_NAMES[settings.aggregate],
        "reads_types": trainer.use_token_types,
        "encoding": settings.encoding,
        "turn": describe_turn(cast(PreTrainedTokenizerBase, trainer.processing_class), settings.encoding),
        "kind": objective.kind,
        "front_matter": front_matter(config),
        "base": describe_base(config),
        "lora": {name: value for name, value in (config.lora or {}).items() if name in LORA_SHOWN},
        "reward_lines": reward_lines(settings),
        "unquantized": unquantized_patterns(unwrap(trainer.model)),
        "sources": source_table(records.manifest),
        "splits": split_table(rows),
        "architecture": architecture,
        "args": trainer.args,
        "state": trainer.state,
        "has_margins": config.objective == "pairwise" and "margin" in examples.column_names,
        "has_votes": not {"preference", "shares"}.isdisjoint(examples.column_names),
        "precision": resolve_precision(config.precision),
        "loss": objective.loss,
        "losses": training_table(trainer.state.log_history),
        "evaluation": {kind: metric_tables(scores) for kind, scores in metrics.items()},
        "limits": known_limits(config, settings, metrics),
    }
    for name, template in TEMPLATES.items():
        (output / name).write_text(environment.get_template(template).render(values), encoding="utf-8")


def describe_turn(tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> dict[str, Any]:
    """Return how plain Python encodes a chat: whether EOS is appended, and what is left of too many `ids`."""
    markup, most = read_markup(tokenizer), encoding.max_length
    needs_eos = encoding.eos and markup.end is None
    first = int(conversation_ids(tokenizer, "a", "b")[:1] == [tokenizer.bos_token_id])
    last = len(markup.closing_ids) + needs_eos
    if encoding.truncation == "left":
        cut_ids = f"ids[:{first}] + ids[-{most - first}:]" if first else f"ids[-{most}:]"
    else:
        cut_ids = f"ids[:{most - last}] + ids[-{last}:]" if last else f"ids[:{most}]"
    return {"is_plain": is_plain(tokenizer), "needs_eos": needs_eos, "cut_ids": cut_ids}


def describe_architecture(model: Any) -> dict[str, Any]:
    """Return the class of a model in training, and its numbers of all and of trained parameters.

    Call it before an adapter is merged: the numbers of the adapter are lost then.
    """
    if isinstance(model, PeftModel):
        trained, parameters = model.get_nb_trainable_parameters()
        return {"class": type(model.get_base_model()).__name__, "parameters": parameters, "trained": trained}
    return {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "trained": model.num_parameters(only_trainable=True),
    }


def describe_base(config: RewardStage) -> str | None:
    """Return the model that the training started from, in Markdown; None for one made from scratch."""
    if config.model == "scratch":
        return None
    if not hub.is_hub_id(config.model):
        return "a local model"
    commit = config.revision if COMMIT.fullmatch(config.revision or "") else None
    return format_span(config.model) + (f" at revision {format_span(commit)}" if commit else "")


def front_matter(config: RewardStage) -> str:
    """Return the metadata of the card for the hub, as YAML."""
    base = {"base_model": config.model} if config.model != "scratch" and hub.is_hub_id(config.model) else {}
    fixed = {
        "pipeline_tag": f"{'token' if config.objective == 'stepwise' else 'text'}-classification",
        "library_name": "transformers",
        "tags": ["reward-model", "trl"],
    }
    return yaml.safe_dump(fixed | base, sort_keys=False)


def reward_lines(settings: RewardSettings) -> list[str]:
    """Return Python lines that compute `reward` from the model's inputs.

    They do what `RewardSettings.reward` does with the logits of one response.
    """
    inputs = (
        "inputs"
        if settings.encoding.form == "pair"
        else 'tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")'
    )
    device = "" if settings.quantization == "none" else ".to(model.device)"
    logits = f"model(**{inputs}{device}).logits"
    sign, k = "-" if settings.sign < 0 else "", settings.logit
    match settings.output:
        case "ensemble" if settings.uncertainty_penalty:
            penalty = f"{settings.uncertainty_penalty} * logits.std(correction=0)"
            return [f"logits = {logits}[0]", f"reward = ({sign}logits.mean() - {penalty}).item()"]
        case "log_odds":
            others = [i for i in range(len(settings.outputs)) if i != k]
            return [
                f"logits = {logits}[0]",
                f"reward = {sign}(logits[{k}] - logits[{others}].logsumexp(0)).item()",
            ]
        case "ensemble":
            output = ".mean()"
        case "probability":
            output = f".softmax(1)[0, {k}]"
        case _:
            output = f"[0, {k}]"
    return [f"reward = {sign}{logits}{output}.item()"]


def source_table(manifest: dict[str, Any]) -> Table | None:
    """Return the table of the records' sources, with the rows that prepare quarantined, by reason.

    `manifest` is that of the records. Sources on the hub and built-in worlds are named; local files are
    numbered. Returns None for records that prepare did not make.
    """
    inputs = manifest.get("inputs") or {}
    public = {name for name, source in inputs.items() if "hub" in source} | {"demo", "sums"}
    lines: list[list[str]] = []
    for name, counts in (manifest.get("rows") or {}).get("by_source", {}).items():
        reasons = [f"{reason} {format_metric(count)}" for reason, count in counts["quarantined"].items()]
        lines.append(
            [
                name if name in public else f"local file {len(lines) + 1}",
                format_metric(counts["read"]),
                format_metric(counts["kept"]),
                format_metric(counts.get("merged", 0)),  # artifacts older than votes have none
                ", ".join(reasons),
            ]
        )
    columns = ("source", "rows read", "kept", "merged", "quarantined")
    return Table("Sources", columns, lines) if lines else None


def split_table(rows: dict[str, dict[str, int]]) -> Table:
    """Return the table of the splits: their rows, and those that did not fit, by outcome."""
    columns = list(dict.fromkeys(name for counts in rows.values() for name in counts))
    lines = [
        [split, *(format_metric(counts.get(name, 0)) for name in columns)] for split, counts in rows.items()
    ]
    return Table("Splits", ("split", *columns), lines)


def training_table(log: Sequence[dict[str, Any]]) -> Table:
    """Return the table of losses, with a row for each evaluation; without evaluations, for each logging step.

    A training loss is the mean since the row before. Of more than 20 rows, 20 evenly spaced ones remain.
    """
    evaluated = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    logged = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if not logged:  # the training was shorter than `logging_steps`
        logged = [(entry["step"], entry["train_loss"]) for entry in log if "train_loss" in entry]
    steps = sorted(evaluated) or [step for step, _ in logged]
    if len(steps) > MAX_LOSS_ROWS:
        steps = [steps[(i + 1) * len(steps) // MAX_LOSS_ROWS - 1] for i in range(MAX_LOSS_ROWS)]

    epochs = {step: f"{round(entry['epoch'], 2):g}" for step, entry in evaluated.items()}
    by_epoch = bool(epochs) and all(epoch.isdigit() for epoch in epochs.values())
    rows = [
        [
            epochs[step] if by_epoch else f"{step:,}",
            _mean_loss(logged, before, step),
            f"{evaluated[step]['eval_loss']:.4f}" if evaluated else "–",
        ]
        for before, step in zip([0, *steps], steps, strict=False)
    ]
    return Table("Losses", ("epoch" if by_epoch else "step", "training loss", "validation loss"), rows)


def _mean_loss(logged: Sequence[tuple[int, float]], before: int, last: int) -> str:
    """Format the mean loss of the steps after `before` up to `last`.

    A logged loss is the mean since the previous entry, so it is weighted by the steps between.
    """
    starts = [0, *(step for step, _ in logged)]
    losses = [
        (loss, max(step - start, 1))
        for (step, loss), start in zip(logged, starts, strict=False)
        if before < step <= last
    ]
    return f"{fmean(*zip(*losses, strict=True)):.4f}" if losses else "–"


def known_limits(config: RewardStage, settings: RewardSettings, metrics: dict[str, Any]) -> list[str]:
    """Return the sentences on what the rewards do not show."""
    objective = OBJECTIVES[config.objective]
    limits = [
        f"The model learned only from these {objective.kind}. On other prompts and responses, "
        "and on those of a policy trained against it, its reward may be meaningless."
    ]
    if objective.compares:
        is_centred = config.training.get("center_rewards_coefficient")
        centred = "; centring pulled it towards zero" if is_centred else ""
        limits.append(
            "Only differences between responses to one prompt are meaningful: "
            f"training leaves a constant for each prompt undetermined{centred}."
        )
    if config.objective == "classification" and settings.output == "logit":
        limits.append(
            "A softmax determines the logits of a response only up to a constant, "
            "so the logit of one class is not identified. "
            "`reward_output: log_odds` and `probability` are identified, and they compare responses."
        )
    if config.objective == "stepwise":
        limits.append(
            "A score is the probability that a step is labelled right after those before it. "
            "Steps that are cut in another way than in training, or follow an error where those of training "
            "did not, may have a meaningless one."
        )
    if config.objective == "regression":
        limits.append(
            "A reward is an estimate of a rating, on the scale of the ratings in training; "
            "beyond them it extrapolates."
        )
    limits.append(describe_truncation(config, settings.encoding))
    pairs = metrics.get("comparisons", {})
    if "accuracy" in pairs and pairs["accuracy"] <= pairs["accuracy_longer"]:
        limits.append("On held-out pairs it is no better than preferring the longer response.")
    return limits


def describe_truncation(config: RewardStage, encoding: Encoding) -> str:
    """Return the sentence on the longest input, and on what is cut from longer ones."""
    if encoding.form == "concatenation":
        cut = "its beginning" if encoding.truncation == "left" else "its end"
    elif encoding.truncation == "left":
        cut = "the beginning of the prompt, and the end of the response if that alone is too long"
    else:
        cut = "the end of the response, and the end of the prompt if that alone is too long"
    dropped = " Such rows were left out of training." if config.overlong == "drop" else ""
    return f"The model reads at most {encoding.max_length:,} tokens; a longer input loses {cut}.{dropped}"
