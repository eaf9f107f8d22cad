"""The reward stage: human feedback in, a reward model with a scalar reward out.

In: a base model (hub id, folder, or `scratch`), decoder or encoder, and records of the prepare artifact: the
kind that the objective learns from (comparisons, rankings, labels or ratings).

Out: a sequence-classification checkpoint that plain `transformers` loads, and its tokenizer; `reward.json`,
which defines how text becomes a reward; `metrics.json`; and README.md, the model card. With LoRA, the
checkpoint is the merged model with `adapter/` beside it; on a quantized base, it is the adapter alone.

A wrong input raises one `UserError`.
"""

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.files import write_json
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.config import OBJECTIVES, RewardStage
from pipeline.data.records import open_records
from pipeline.data.schema import KINDS, LEARNABLE
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.errors import UserError, explain_row
from pipeline.models.adapters import check_modules
from pipeline.models.heads import head_module_names
from pipeline.models.load_errors import explain_adapter_errors
from pipeline.models.loading import load_classifier, load_tokenizer
from pipeline.models.positions import max_positions
from pipeline.models.scratch import new_classifier
from pipeline.models.templates import fixed_date
from pipeline.reward import probes
from pipeline.reward.card import describe_architecture, write_card
from pipeline.reward.dataset import STEP_OUTPUTS, check_records, require_contrast, tokenize_records
from pipeline.reward.encoding import Encoding, check_encoding, prompt_text
from pipeline.reward.evaluation import evaluate_reward_model, held_out_split, reference_statistics
from pipeline.reward.model import DistributedRewardModel
from pipeline.reward.probes import accepts_token_types, supports_padding
from pipeline.reward.settings import RewardSettings
from pipeline.reward.trainer import RewardTrainer
from pipeline.training.arguments import (
    build_arguments,
    build_lora_config,
    check_training,
    load_options,
    require_batch,
    require_eval_rows,
    weight_precision,
)
from pipeline.training.callbacks import PrintProgress, StopAtNonFinite
from pipeline.training.checkpoints import train_with_resume, write_log
from pipeline.training.weights import publishable_state

MEMBER_FRACTION = 0.7  # of the rows, for each member of an ensemble

TOKENIZER = "it would change the base's tokenizer; use 'encoding' and 'model'"
OBJECTIVE = "the loss is that of 'objective'"
UNSUPPORTED = dict.fromkeys(
    ("eos_token", "pad_token", "chat_template_path", "model_init_kwargs", "pad_to_multiple_of"), TOKENIZER
) | {
    "trust_remote_code": "it is a key of the stage; set trust_remote_code beside 'training'",
    "include_num_input_tokens_seen": "num_tokens in log.jsonl is that number",
    "average_tokens_across_devices": OBJECTIVE,
    "use_liger_kernel": OBJECTIVE,
}

Split = tuple[Dataset, dict[str, int]]  # tokenised rows, and the counts of those that did not fit


def check(config: RewardStage) -> None:
    """Check the config alone. Raises `UserError`."""
    check_training(config, trl.RewardConfig, UNSUPPORTED)
    for key in ("remove_unused_columns", "ddp_broadcast_buffers"):
        if config.training.get(key):
            raise UserError(f"reward: training.{key}: this trainer's batches need it to be false; remove it")
    is_read = {
        "center_rewards_coefficient": OBJECTIVES[config.objective].compares,
        "label_smoothing_factor": config.objective in ("pairwise", "classification"),
    }
    for key, applies in is_read.items():
        if config.training.get(key) and not applies:
            raise UserError(
                f"reward: training.{key} is not read with objective: {config.objective}; remove it"
            )


def run(config: RewardStage) -> Path:
    """Run the stage and return the folder of its artifact. Raises `UserError` if an input is wrong."""
    check(config)
    inputs = open_inputs(config)
    if "model" in inputs:
        config = config.model_copy(update={"revision": inputs["model"].revision})
    records = inputs["records"]
    return build_artifact(
        config,
        kind="reward",
        inputs=inputs,
        make=lambda *folders: train(config, records, *folders),
        on_every_rank=True,
    )


def train(config: RewardStage, records: Artifact, output: Path, work: Path) -> dict[str, Any]:
    """Train, save and evaluate a reward model, and return the headline metrics and the row counts.

    `output` is the folder of the artifact, `work` that of the checkpoints. Only rank 0 returns metrics.
    """
    # Ranks run different numbers of forwards. DDP would synchronise the buffers in each, and no training
    # changes them.
    fixed = {"max_length": None, "remove_unused_columns": False, "ddp_broadcast_buffers": False}
    args = build_arguments(config, trl.RewardConfig, work, **fixed)
    kind = OBJECTIVES[config.objective].kind
    data = open_records(records, kind)
    check_records(kind, data["train"])

    set_seed(config.seed)  # the head is initialised randomly
    settings = build_settings(config, data)
    model, tokenizer = load_base(config, settings, data)
    supports_padding(model, config.max_length, config.model)  # refuses bases that cannot be batched
    settings.encoding = choose_encoding(config, model, tokenizer)
    splits = tokenize_splits(config, data, tokenizer, settings.encoding)
    if not len(splits["train"][0]):
        raise UserError(
            f"{records.path}: of {len(data['train'])} {kind} none fits max_length={config.max_length}; "
            "raise it"
        )
    require_contrast(kind, ((row["target"], row["ids"]) for row in splits["train"][0]))

    trainer = build_trainer(config, model, tokenizer, settings, splits, args)
    train_with_resume(trainer, work)
    trainer.optimizer = trainer.lr_scheduler = None  # frees memory for the model that is evaluated
    trainer.accelerator.free_memory()

    architecture = describe_architecture(trainer.model)
    weights = publishable_state(trainer, config.stage)
    if is_main_process():
        save_model(trainer, weights, config, settings, output)
        write_log(trainer, output)
    broadcast("saved")
    headline = publish_metrics(config, records, data, output)
    if not is_main_process():
        return {}
    rows = {split: {"rows": len(kept)} | counts for split, (kept, counts) in splits.items()}
    write_card(output, config, settings, records, trainer, architecture, rows)
    return headline | {"rows": rows}


def tokenize_splits(
    config: RewardStage, data: DatasetDict, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> dict[str, Split]:
    """Tokenise the splits that have rows, and print how many rows did not fit."""
    kind, drop = OBJECTIVES[config.objective].kind, config.overlong == "drop"
    splits = {}
    for name, rows in data.items():
        if len(rows):
            with explain_row(f"{config.records}: {name}"):
                splits[name] = tokenize_records(rows, kind, tokenizer, encoding, drop)
    for name, (_, counts) in splits.items():
        if counts and is_main_process():
            outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
            print(f"  {name}: over max_length={config.max_length} (overlong: {config.overlong}): {outcomes}")
    return splits


def build_trainer(
    config: RewardStage,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardSettings,
    splits: Mapping[str, Split],
    args: trl.RewardConfig,
) -> RewardTrainer:
    """Build the trainer. Raises `UserError` if PEFT refuses the adapter of the `lora:` section."""
    validation = splits["validation"][0] if "validation" in splits else None
    train_rows = assign_bootstrap_rows(config, splits["train"][0])
    lora = build_lora_config(config, settings.task_type, config.revision, head_module_names(model))
    where = f"{config.stage}: lora"
    check_modules(model, lora, where)
    with explain_adapter_errors(where, lora):
        return RewardTrainer(
            model,
            config.objective,
            class_weights=config.class_weights,
            positive=settings.logit,
            args=args,
            train_dataset=require_batch(f"{config.records}: train", args, train_rows),
            eval_dataset=require_eval_rows(args, validation),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[PrintProgress(), StopAtNonFinite(config.stage)],
        )


def build_settings(config: RewardStage, data: DatasetDict) -> RewardSettings:
    """Return the settings of the model to train: its outputs, and which of them is the reward.

    Raises `UserError` if the labels have no class names, if no training row has the positive label, or if
    `class_weights` has another number of classes.
    """
    settings = RewardSettings(
        objective=config.objective,
        output=config.reward_output,
        quantization=config.quantization,
        precision=weight_precision(config),
    )
    if config.objective == "classification":
        labels = data["train"].features["label"]
        if not hasattr(labels, "names"):
            raise UserError(
                "labels: the column 'label' needs the names of its classes (datasets.ClassLabel); "
                "let prepare make the records"
            )
        settings.outputs = list(labels.names)
        settings.logit = positive_class(config, settings.outputs)
        if settings.logit not in data["train"]["label"]:
            raise UserError(
                f"reward: positive_label={settings.outputs[settings.logit]!r}: no training row has it; "
                "see prepare's report"
            )
        if config.class_weights and len(config.class_weights) != len(settings.outputs):
            raise UserError(
                f"reward: class_weights has {len(config.class_weights)} numbers "
                f"for the classes {', '.join(settings.outputs)}; give one for each"
            )
    elif config.objective == "stepwise":
        settings.outputs, settings.logit, settings.output = list(STEP_OUTPUTS), 1, "probability"
        settings.aggregate = config.aggregate
    elif config.ensemble > 1:
        settings.outputs = [f"reward_{i}" for i in range(config.ensemble)]
        settings.output, settings.uncertainty_penalty = "ensemble", config.uncertainty_penalty
    return settings


def positive_class(config: RewardStage, classes: list[str]) -> int:
    """Return the index of the class whose logit is the reward: `positive_label`, or else "true" or "1".

    Raises `UserError` if there is no such class.
    """
    names = ("true", "1") if config.positive_label is None else (config.positive_label,)
    for name in names:
        if name in classes:
            return classes.index(name)
    problem = (
        f"positive_label={config.positive_label!r} is none of them"
        if config.positive_label
        else "'positive_label' is not set"
    )
    raise UserError(
        f"reward: the classes are {', '.join(classes)}, and {problem}; "
        "set positive_label to the class whose logit is the reward"
    )


def load_base(
    config: RewardStage, settings: RewardSettings, data: DatasetDict
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the base model with its head, and its tokenizer; `scratch` initialises both from the records.

    Raises `UserError` if the base cannot be loaded.
    """
    if config.scratch is not None:
        kind = KINDS[OBJECTIVES[config.objective].kind]
        assert kind.responses, f"{config.objective} learns from responses"
        texts = [
            prompt_text(text, " ")
            for record in data["train"]
            for text in (record["prompt"], *kind.responses(record))
        ]
        return new_classifier(
            texts, config.scratch, config.encoding.separator, settings.head, settings.auto_class
        )
    # If no EOS ends the ids, the pad token may be EOS: it hides nothing, and the base keeps its vocabulary.
    tokenizer = load_tokenizer(
        config.model,
        separator=config.encoding.separator,
        generates=False,
        distinct_pad=config.encoding.eos is not False,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    options = load_options(config, config.revision) | {"auto_class": settings.auto_class}
    return load_classifier(config.model, tokenizer, head=settings.head, **options), tokenizer


def choose_encoding(config: RewardStage, model: Any, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """Return the `encoding:` section with its open fields chosen for the model.

    The tokenizer gets the settings that plain `transformers` needs to encode the same way. Raises `UserError`
    if the model or its tokenizer does not support the encoding.
    """
    is_decoder = probes.is_decoder(model)
    form = config.encoding.form or ("chat" if is_decoder else "pair")
    eos = config.encoding.eos if config.encoding.eos is not None else form != "pair" and is_decoder
    side = "right" if config.overlong == "truncate_right" else "left"
    date = fixed_date(tokenizer) if form == "chat" else None
    separator = config.encoding.separator
    options: dict[str, Any] = {"date": date, "step_separator": config.encoding.step_separator}
    encoding = Encoding(form, separator, eos, side, config.max_length, **options)
    check_encoding(tokenizer, encoding, config.model, max_positions(model))

    options = {
        "model_max_length": config.max_length,
        "truncation_side": side,
        "padding_side": "right",
    }
    # Decoders have none of their own: GPT-2 would add embeddings of the tokens 0 and 1.
    reads_types = config.encoding.token_types and not is_decoder and accepts_token_types(model)
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids" or reads_types]
    if not config.encoding.token_types or names != tokenizer.model_input_names:
        options["model_input_names"] = names
    for name, value in options.items():
        setattr(tokenizer, name, value)
    tokenizer.init_kwargs |= options  # `save_pretrained` writes these
    return encoding


def assign_bootstrap_rows(config: RewardStage, rows: Dataset) -> Dataset:
    """Assign each member of an ensemble its own random sample of the rows, in the column `members`.

    Members then agree because of the data, not because they were trained on the same rows.
    """
    if config.ensemble == 1:
        return rows
    rng = random.Random(config.seed)
    members = [[rng.random() < MEMBER_FRACTION for _ in range(config.ensemble)] for _ in range(len(rows))]
    return rows.add_column("members", members)


def save_model(
    trainer: RewardTrainer,
    weights: dict[str, Any] | None,
    config: RewardStage,
    settings: RewardSettings,
    output: Path,
) -> None:
    """Write the checkpoint in the form that its quantization requires, the tokenizer and `reward.json`.

    `weights` is the full state if the model is sharded, else None.
    """
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    if config.quantization == "none" and weights is None:
        model = model.cpu()
    if config.lora is not None and config.quantization == "none":
        model.save_pretrained(output / "adapter", state_dict=weights, save_embedding_layers=False)
        if weights is not None:
            model, weights = reload_adapter(output / "adapter", config, settings, tokenizer), None
        model = model.float().merge_and_unload()  # in bf16 most of what was learned would be rounded away

    options = {} if config.quantization == "none" else {"save_embedding_layers": False}
    model.save_pretrained(output, state_dict=weights, **options)
    tokenizer.save_pretrained(output)
    settings.save(output)


def reload_adapter(
    adapter: Path, config: RewardStage, settings: RewardSettings, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """Load the unsharded base in this process, with the adapter and head that were trained on its shards."""
    options = load_options(config, config.revision) | {"auto_class": settings.auto_class}
    base: Any = load_classifier(config.model, tokenizer, head=settings.head, **options)
    return PeftModel.from_pretrained(base, str(adapter))


def publish_metrics(
    config: RewardStage, records: Artifact, data: DatasetDict, output: Path
) -> dict[str, Any]:
    """Evaluate the saved model in fp32, as its users load it, and return the headline metrics.

    Writes metrics.json, whose first entry is the kind of records in training, and the reference statistics.
    """
    reward = DistributedRewardModel.load(output, trust_remote_code=config.trust_remote_code)
    reference = data["validation"] if len(data["validation"]) else data["train"]
    reward.settings = dataclasses.replace(reward.settings, **reference_statistics(reward, reference))

    kinds = [OBJECTIVES[config.objective].kind]
    if not records.is_external:
        kinds += sorted(name for name in LEARNABLE if name not in kinds and (records.path / name).is_dir())
    held_out = {kind: held_out_split(open_records(records, kind)) for kind in kinds}
    metrics = evaluate_reward_model(reward, held_out)

    if is_main_process():
        reward.settings.save(output)
        write_json(output / "metrics.json", metrics)
    headline = {
        kind: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for kind, values in metrics.items()
    }
    return {"metrics": headline}
