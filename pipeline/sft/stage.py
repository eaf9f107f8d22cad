"""Supervised fine-tuning: train the first policy on demonstrations.

In: `demonstrations` (prompt, completion) of the prepare artifact, and a base model: a hub id, a folder, or
`scratch`.
Out: a causal language model with its tokenizer. Under LoRA it is the adapter, whose config names its base and
revision, or with `merge` the whole model.
Only the assistant's turn, as the chat template writes it, contributes to the loss. A wrong input (no
demonstrations, a base that cannot be loaded) raises `UserError`.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import open_inputs
from pipeline.artifacts.manifest import Artifact
from pipeline.config import SFTStage
from pipeline.data.records import open_records
from pipeline.distributed.processes import is_main_process
from pipeline.errors import UserError, explain_row
from pipeline.models.adapters import check_modules
from pipeline.models.chat import encode_pair
from pipeline.models.ends import declare_ends, end_token_ids
from pipeline.models.load_errors import explain_adapter_errors
from pipeline.models.loading import load_tokenizer, merge_adapter
from pipeline.models.positions import max_positions
from pipeline.models.prompts import truncation_side
from pipeline.models.scratch import collect_texts, new_policy
from pipeline.training.arguments import (
    build_arguments,
    check_training,
    require_batch,
    require_eval_rows,
)
from pipeline.training.callbacks import PrintProgress, StopAtNonFinite
from pipeline.training.checkpoints import train_with_resume, write_log
from pipeline.training.policies import load_start
from pipeline.training.weights import publishable_state

TOKENIZED = "rows are tokenized by the stage, with the base's own tokenizer and template"
PACKED = (
    "the tokens of a whole batch would attend to each other, so that time grows with the square of the batch "
    "(30 s in place of 1 s on a small model), unless a kernel for variable lengths is loaded, which none is"
)
RESPONSES = "only the response is learned, and every token of it"
UNSUPPORTED = (
    dict.fromkeys(
        (
            "chat_template_path",
            "eos_token",
            "pad_token",
            "dataset_text_field",
            "dataset_kwargs",
            "model_init_kwargs",
        ),
        TOKENIZED,
    )
    | dict.fromkeys(("packing", "eval_packing", "padding_free", "packing_strategy"), PACKED)
    | dict.fromkeys(("completion_only_loss", "assistant_only_loss"), RESPONSES)
    | {
        "truncation_mode": "rows are cut by 'overlong'; set that",
        "trust_remote_code": "it is a key of the stage; set trust_remote_code beside 'training'",
    }
)
HEADLINE_METRICS = ("eval_loss", "eval_mean_token_accuracy")


def check(config: SFTStage) -> None:
    """Check the config on its own, without inputs. Raises `UserError` if it is wrong."""
    check_training(config, SFTConfig, UNSUPPORTED)


def run(config: SFTStage) -> Path:
    """Train and publish the policy; return the artifact's folder."""
    check(config)
    inputs = open_inputs(config)
    if "model" in inputs:
        config = config.model_copy(update={"revision": inputs["model"].revision})
    records = inputs["records"]
    return build_artifact(
        config,
        kind="policy",
        inputs=inputs,
        make=lambda *folders: train(config, records, *folders),
        on_every_rank=True,
    )


def train(config: SFTStage, records: Artifact, output: Path, work: Path) -> dict[str, Any]:
    """Train on `records` and save the policy to `output`; return the headline metrics.

    `work` keeps the checkpoints, from which an interrupted training resumes.
    """
    args = build_arguments(config, SFTConfig, work, packing=False, max_length=config.max_length)
    data = open_records(records, "demonstrations")

    set_seed(config.seed)
    model, tokenizer, lora = load_base(config, data)
    declare_ends(model, end_token_ids(model, tokenizer))
    train_rows, validation_rows = (
        tokenize_demonstrations(config, data[split], tokenizer, f"{records.path}: demonstrations: {split}")
        for split in ("train", "validation")
    )
    where = f"{config.stage}: lora"
    check_modules(model, lora, where)
    with explain_adapter_errors(where, lora):
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=require_batch(f"{records.path}: demonstrations: train", args, train_rows),
            eval_dataset=require_eval_rows(args, validation_rows),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[PrintProgress(), StopAtNonFinite(config.stage)],
        )
    train_with_resume(trainer, work)
    metrics = trainer.evaluate() if len(data["validation"]) else {}

    # Every rank takes part in gathering the weights; only the main process saves them.
    weights = publishable_state(trainer, config.stage)
    if not is_main_process():
        return {}
    policy: Any = trainer.model
    save_options = {} if config.lora is None else {"save_embedding_layers": False}
    policy.save_pretrained(output, state_dict=weights, **save_options)
    if config.lora is not None:
        policy.generation_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    if config.merge:
        merge_adapter(output, tokenizer, trust_remote_code=config.trust_remote_code)
    write_log(trainer, output)
    return {"metrics": {name: value for name, value in metrics.items() if name in HEADLINE_METRICS}}


def load_base(config: SFTStage, data: DatasetDict) -> tuple[Any, PreTrainedTokenizerBase, LoraConfig | None]:
    """Load the base model and its tokenizer, or build both from scratch; return also the adapter to add."""
    if config.scratch is not None:
        texts = collect_texts(data["train"], "prompt", "completion")
        return *new_policy(texts, config.scratch, config.separator), None

    tokenizer = load_tokenizer(
        config.model,
        separator=config.separator,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    model, lora = load_start(config, config.model, tokenizer, config.revision)
    check_length(config, model)
    return model, tokenizer, lora


def check_length(config: SFTStage, model: Any) -> None:
    """Raise `UserError` if `max_length` is more than the model can read."""
    positions = max_positions(model)
    if positions is not None and config.max_length > positions:
        raise UserError(
            f"{config.model}: reads at most {positions} tokens, but max_length is {config.max_length}; "
            "lower it"
        )


def tokenize_demonstrations(
    config: SFTStage, data: Dataset, tokenizer: PreTrainedTokenizerBase, name: str
) -> Dataset:
    """Return `input_ids` and `labels` for each row; the labels of the prompt are -100.

    Rows over `max_length` are cut or dropped, and their number is printed. `name` says where the rows are.
    Raises `UserError` if the chat template refuses a row, or if no row fits.
    """
    side = truncation_side(config.overlong)

    def tokenize(row: dict[str, Any], number: int) -> dict[str, Any]:
        with explain_row(f"{name}: row {number}"):
            prompt, turn, is_cut = encode_pair(
                tokenizer, row["prompt"], row["completion"], config.max_length, side
            )
        return {"input_ids": prompt + turn, "labels": [-100] * len(prompt) + turn, "is_cut": is_cut}

    rows = data.map(tokenize, with_indices=True, remove_columns=data.column_names)
    cut = [number for number, is_cut in enumerate(rows["is_cut"]) if is_cut] if len(rows) else []
    if cut and is_main_process():
        print(
            f"  {name}: over max_length={config.max_length} (overlong: {config.overlong}): "
            f"{len(cut):,} of {len(rows):,}"
        )
    if cut and config.overlong == "drop":
        rows = rows.select(sorted(set(range(len(rows))) - set(cut)))
        if not len(rows):
            raise UserError(f"{name}: none fits max_length={config.max_length}; raise it")
    return rows.remove_columns("is_cut") if len(rows) else rows
