"""Reward models: human feedback in, a scalar reward out.

In: `comparisons` (prompt, chosen, rejected, optional margin) of the prepare artifact and a base model (hub id or folder).
Out: a sequence-classification checkpoint that plain `transformers` loads, its tokenizer and `reward.json`; under LoRA the merged model with
`adapter/` beside it, on a quantized base the adapter alone. A wrong input gets one `UserError`.
"""

import statistics
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from peft import TaskType
from transformers import PreTrainedTokenizerBase, set_seed

from pipeline import artifact, encoding, models, training
from pipeline.config import RewardStage
from pipeline.ranks import is_main_process
from pipeline.records import open_records
from pipeline.reward.metrics import held_out, pair_metrics, score_pairs
from pipeline.reward.model import RewardModel, Settings

REFERENCE_PAIRS = 256


def check(config: RewardStage) -> None:
    """Refuse what is wrong with the config alone. Raises `UserError`."""
    training.check(config, trl.RewardConfig)


def run(config: RewardStage) -> Path:
    check(config)
    records = artifact.require(config.records or "", "records", config.fix("prepare"))
    base = artifact.require(config.model, "model", f"{config.fix('sft')}, or name a hub id or a folder in 'model'", config.revision)
    config = config.model_copy(update={"revision": base.revision})
    inputs = {"records": records, "model": base}
    return artifact.build(config, kind="reward", inputs=inputs, make=lambda *folders: train(config, records, *folders), on_every_rank=True)


def train(config: RewardStage, records: artifact.Artifact, output: Path, work: Path) -> dict[str, Any]:
    """Train on pairs, save, and measure on the test split; returns the headline metrics."""
    args = training.arguments(config, trl.RewardConfig, work, max_length=None)
    data = open_records(records, "comparisons")
    set_seed(config.seed)  # the head is new
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = models.load_tokenizer(config.model, separator=config.separator, **options)
    weights: dict[str, Any] = {"quantization": config.quantization, "precision": training.weight_precision(config)}
    trainer = trl.RewardTrainer(
        model=models.load_classifier(config.model, tokenizer, new_head=True, **weights, **options),
        args=args,
        train_dataset=tokenize(data["train"], tokenizer, config.max_length),
        eval_dataset=tokenize(data["validation"], tokenizer, config.max_length) if len(data["validation"]) else None,
        processing_class=tokenizer,
        peft_config=training.lora_config(config, TaskType.SEQ_CLS, config.revision),
        callbacks=[training.Say()],
    )
    model: Any = trainer.model
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL halves the adapter and the head of a quantized base, which then do not fit fp32 activations
            parameter.data = parameter.data.float()
    training.fit(trainer, work)
    if not is_main_process():
        return {}
    trainer.optimizer = trainer.lr_scheduler = None  # room for the model as others will read it
    trainer.accelerator.free_memory()
    save(trainer, config, output)
    reward = RewardModel.load(output, trust_remote_code=config.trust_remote_code)  # measured as all will read it, in fp32
    reference = data["validation"] if len(data["validation"]) else data["train"]
    reward.settings.reward_mean, reward.settings.reward_std = reference_statistics(reward, reference)
    reward.settings.save(output)
    training.write_log(trainer, output)
    pairs = held_out(data)
    return {"metrics": pair_metrics(*score_pairs(reward, pairs), pairs)}


def tokenize(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`chosen_ids` and `rejected_ids` (and `margin` where there is one), by the one encoding."""

    def one(row: dict[str, Any]) -> dict[str, list[int]]:
        sides = {side: encoding.encode(tokenizer, row["prompt"], row[side], max_length) for side in ("chosen", "rejected")}
        return {f"{side}_ids": prompt + completion for side, (prompt, completion) in sides.items()}

    return data.map(one, remove_columns=[column for column in data.column_names if column != "margin"])


def save(trainer: trl.RewardTrainer, config: RewardStage, output: Path) -> None:
    """Write the checkpoint in the form its quantization asks for, and `reward.json`."""
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    if config.quantization == "none":
        model = model.cpu()
    if config.lora is not None and config.quantization == "none":
        model.save_pretrained(output / "adapter", save_embedding_layers=False)
        model = model.float().merge_and_unload()  # in bf16 most of what was learned would be rounded away
    model.save_pretrained(output, **({} if config.quantization == "none" else {"save_embedding_layers": False}))
    tokenizer.save_pretrained(output)
    Settings(objective=config.objective, max_length=config.max_length, quantization=config.quantization).save(output)


def reference_statistics(reward: RewardModel, pairs: Dataset) -> tuple[float, float]:
    """Mean and standard deviation of the raw reward over both answers of the first pairs."""
    sample = pairs.select(range(min(REFERENCE_PAIRS, len(pairs))))
    scores = reward.score(sample["prompt"][:] * 2, sample["chosen"][:] + sample["rejected"][:])
    return statistics.fmean(scores), statistics.pstdev(scores) or 1.0
