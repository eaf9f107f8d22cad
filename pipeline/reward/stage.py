"""Reward models: human feedback in, a scalar reward out.

In: the records that the objective learns from (comparisons, rankings, labels or ratings) of the prepare artifact and a base model (hub
id, folder, or `scratch`), decoder or encoder. Out: a sequence-classification checkpoint that plain `transformers` loads, its tokenizer,
`reward.json` (how text becomes a reward), `metrics.json`, and README.md, which says all that; under LoRA the merged model with `adapter/`
beside it, on a quantized base the adapter alone. A wrong input gets one `UserError`.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset, DatasetDict
from peft import PeftModel, TaskType
from transformers import PreTrainedTokenizerBase, set_seed

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.config import OBJECTIVES, RewardStage
from pipeline.data.records import open_records
from pipeline.data.schema import KINDS, LEARNABLE
from pipeline.distributed.processes import broadcast, is_main_process
from pipeline.distributed.sharding import full_state_dict
from pipeline.errors import UserError
from pipeline.models.loading import head_module_names, load_classifier, load_tokenizer, max_positions
from pipeline.models.scratch import new_classifier
from pipeline.reward import batching
from pipeline.reward.card import describe_architecture, write_card
from pipeline.reward.dataset import tokenize_records
from pipeline.reward.encoding import Encoding, prompt_text
from pipeline.reward.encoding import check_encoding as check_encoding
from pipeline.reward.evaluation import evaluate_reward_model, held_out_split, reference_statistics
from pipeline.reward.model import DistributedRewardModel
from pipeline.reward.settings import RewardSettings
from pipeline.reward.trainer import RewardTrainer
from pipeline.training.arguments import (
    build_arguments,
    build_lora_config,
    check_training,
    load_options,
    require_eval_rows,
    weight_precision,
)
from pipeline.training.callbacks import PrintEvaluations
from pipeline.training.checkpoints import train_with_resume, write_log

MEMBER_FRACTION = 0.7  # of the rows each member learns from


def check(config: RewardStage) -> None:
    """Refuse what is wrong with the config alone. Raises `UserError`."""
    check_training(config, trl.RewardConfig)
    for key in {
        "eos_token",
        "pad_token",
        "chat_template_path",
        "model_init_kwargs",
        "pad_to_multiple_of",
    } & config.training.keys():
        raise UserError(
            f"reward: training.{key} is not read; what it would change is the base's tokenizer, see 'encoding' and 'model'"
        )
    compares = OBJECTIVES[config.objective].compares
    read = {
        "center_rewards_coefficient": compares,
        "label_smoothing_factor": config.objective in ("pairwise", "classification"),
    }
    for key, is_read in read.items():
        if config.training.get(key) and not is_read:
            raise UserError(
                f"reward: training.{key} is not read with objective: {config.objective}; remove it"
            )


def run(config: RewardStage) -> Path:
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
    """Train, save, and measure on the test split; returns the headline metrics."""
    # Ranks differ in their number of forwards, each of which would send buffers that no training changes.
    fixed = {"max_length": None, "remove_unused_columns": False, "ddp_broadcast_buffers": False}
    args = build_arguments(config, trl.RewardConfig, work, **fixed)
    kind = OBJECTIVES[config.objective].kind
    data = open_records(records, kind)
    set_seed(config.seed)  # the head is new
    settings = build_settings(config, data)
    model, tokenizer = load_base(config, settings, data)
    settings.encoding = choose_encoding(config, model, tokenizer)
    drop = config.overlong == "drop"
    rows = {
        split: tokenize_records(part, kind, tokenizer, settings.encoding, drop)
        for split, part in data.items()
        if len(part)
    }
    log_overlong(config, rows)
    if not len(rows["train"][0]):
        raise UserError(
            f"{records.path}: of {len(data['train'])} {kind} none fits max_length={config.max_length}; raise it"
        )
    batching.check_padding(model, tokenizer.pad_token_id, config.model)
    try:
        trainer = RewardTrainer(
            model,
            config.objective,
            class_weights=config.class_weights,
            positive=settings.logit,
            args=args,
            train_dataset=assign_bootstrap_rows(config, rows["train"][0]),
            eval_dataset=require_eval_rows(args, rows["validation"][0] if "validation" in rows else None),
            processing_class=tokenizer,
            peft_config=build_lora_config(
                config, TaskType.SEQ_CLS, config.revision, head_module_names(model)
            ),
            callbacks=[PrintEvaluations()],
        )
    except ValueError as error:
        if config.lora is None:
            raise
        # PEFT's, of modules that this model has not, or has by other names
        raise UserError(
            f"reward: lora: {' '.join(str(error).split())}; try lora.target_modules=all-linear"
        ) from None
    train_with_resume(trainer, work)
    trainer.optimizer = trainer.lr_scheduler = None  # room for the model as others will read it
    trainer.accelerator.free_memory()
    built = describe_architecture(trainer.model)
    weights = full_state_dict(trainer)
    if is_main_process():
        save_model(trainer, weights, config, settings, output)
        write_log(trainer, output)
    broadcast("saved")
    found = publish_metrics(config, records, data, output)
    if not is_main_process():
        return {}
    counted = {split: {"rows": len(kept)} | counts for split, (kept, counts) in rows.items()}
    write_card(output, config, settings, records, trainer, built, counted)
    return found | {"rows": counted}


def build_settings(config: RewardStage, data: DatasetDict) -> RewardSettings:
    """What the head gives, and which part of it is the reward."""
    settings = RewardSettings(objective=config.objective, output=config.reward_output)
    settings.quantization, settings.precision = config.quantization, weight_precision(config)
    if config.objective == "classification":
        classes = data["train"].features["label"]
        if not hasattr(classes, "names"):
            raise UserError(
                "labels: the column 'label' needs the names of its classes (datasets.ClassLabel); let prepare make the records"
            )
        settings.outputs = list(classes.names)
        settings.logit = positive_class(config, settings.outputs)
        if settings.logit not in data["train"]["label"]:
            raise UserError(
                f"reward: positive_label={settings.outputs[settings.logit]!r}: no row to train on has it; see prepare's report"
            )
        if config.class_weights and len(config.class_weights) != len(settings.outputs):
            raise UserError(
                f"reward: class_weights has {len(config.class_weights)} numbers for the classes {', '.join(settings.outputs)}"
            )
    elif config.ensemble > 1:
        settings.outputs = [f"reward_{i}" for i in range(config.ensemble)]
        settings.output, settings.uncertainty_penalty = "ensemble", config.uncertainty_penalty
    return settings


def positive_class(config: RewardStage, classes: list[str]) -> int:
    """The class whose logit is the reward: the one that is named, or "true" or "1"."""
    for name in (config.positive_label,) if config.positive_label is not None else ("true", "1"):
        if name in classes:
            return classes.index(name)
    found = (
        f"positive_label={config.positive_label!r} is none of them"
        if config.positive_label
        else "'positive_label' is not set"
    )
    raise UserError(
        f"reward: the classes are {', '.join(classes)}, and {found}; set positive_label to the one that is good"
    )


def load_base(
    config: RewardStage, settings: RewardSettings, data: DatasetDict
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base model with its head, and its tokenizer."""
    if config.scratch is not None:
        kind = KINDS[OBJECTIVES[config.objective].kind]
        assert kind.responses, f"{config.objective} learns from responses"
        texts = [
            prompt_text(text, " ")
            for record in data["train"]
            for text in (record["prompt"], *kind.responses(record))
        ]
        return new_classifier(texts, config.scratch, config.encoding.separator, settings.head)
    # Where no EOS ends the ids, a pad token that is EOS hides nothing, and the vocabulary stays that of the base.
    tokenizer = load_tokenizer(
        config.model,
        separator=config.encoding.separator,
        generates=False,
        distinct_pad=config.encoding.eos is not False,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    options = load_options(config, config.revision)
    return load_classifier(config.model, tokenizer, head=settings.head, **options), tokenizer


def choose_encoding(config: RewardStage, model: Any, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """The `encoding:` section, what it leaves open chosen by the model; the tokenizer is told what plain readers need to know."""
    form = config.encoding.form or ("pair" if batching.score_head(model) is None else "chat")
    eos = (
        config.encoding.eos
        if config.encoding.eos is not None
        else form != "pair" and batching.score_head(model) is not None
    )
    side = "right" if config.overlong == "truncate_right" else "left"
    how = Encoding(form, config.encoding.separator, eos, side, config.max_length)
    check_encoding(tokenizer, how, config.model, max_positions(model))
    told = {"model_max_length": config.max_length, "truncation_side": side, "padding_side": "right"}
    if not config.encoding.token_types:
        told["model_input_names"] = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    for name, value in told.items():
        setattr(tokenizer, name, value)
    tokenizer.init_kwargs |= told  # which is what is saved
    return how


def log_overlong(config: RewardStage, rows: dict[str, tuple[Dataset, dict[str, int]]]) -> None:
    for split, (_, counts) in rows.items():
        if counts and is_main_process():
            found = ", ".join(f"{count:,} {fate}" for fate, count in counts.items())
            print(f"  {split}: over max_length={config.max_length} (overlong: {config.overlong}): {found}")


def assign_bootstrap_rows(config: RewardStage, rows: Dataset) -> Dataset:
    """Each member of an ensemble learns from a sample of its own, so that where they agree it is for what the data say."""
    if config.ensemble == 1:
        return rows
    rng = random.Random(config.seed)
    return rows.add_column(
        "members",
        [[rng.random() < MEMBER_FRACTION for _ in range(config.ensemble)] for _ in range(len(rows))],
    )


def save_model(
    trainer: RewardTrainer,
    weights: dict[str, Any] | None,
    config: RewardStage,
    settings: RewardSettings,
    output: Path,
) -> None:
    """Write the checkpoint in the form its quantization asks for, and `reward.json`; `weights` are the model's where they were sharded."""
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    if config.quantization == "none" and weights is None:
        model = model.cpu()
    if config.lora is not None and config.quantization == "none":
        model.save_pretrained(output / "adapter", state_dict=weights, save_embedding_layers=False)
        if weights is not None:
            model, weights = reload_adapter(output / "adapter", config, settings, tokenizer), None
        model = model.float().merge_and_unload()  # in bf16 most of what was learned would be rounded away
    model.save_pretrained(
        output,
        state_dict=weights,
        **({} if config.quantization == "none" else {"save_embedding_layers": False}),
    )
    tokenizer.save_pretrained(output)
    settings.save(output)


def reload_adapter(
    adapter: Path, config: RewardStage, settings: RewardSettings, tokenizer: PreTrainedTokenizerBase
) -> PeftModel:
    """The base, whole in this process, with the adapter and head that were trained on its shards."""
    options = load_options(config, config.revision)
    base: Any = load_classifier(config.model, tokenizer, head=settings.head, **options)
    return PeftModel.from_pretrained(base, str(adapter))


def publish_metrics(
    config: RewardStage, records: Artifact, data: DatasetDict, output: Path
) -> dict[str, Any]:
    """Measure what was saved as all will read it, in fp32; the first line is on the records it learned from."""
    reward = DistributedRewardModel.load(output, trust_remote_code=config.trust_remote_code)
    kind = OBJECTIVES[config.objective].kind
    reference = data["validation"] if len(data["validation"]) else data["train"]
    reward.settings = dataclasses.replace(reward.settings, **reference_statistics(reward, reference))
    kinds = [
        kind,
        *sorted(
            name
            for name in LEARNABLE
            if name != kind and (records.path / name).is_dir() and not records.is_external
        ),
    ]
    found = evaluate_reward_model(
        reward, {name: held_out_split(open_records(records, name)) for name in kinds}
    )
    if is_main_process():
        reward.settings.save(output)
        (output / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
    return {
        "metrics": {
            name: {k: v for k, v in figures.items() if isinstance(v, int | float)}
            for name, figures in found.items()
        }
    }
