"""What the shapes of rewards need of training: running statistics in checkpoints, and reference responses."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from pipeline.artifacts.files import read_json, write_json
from pipeline.distributed.processes import is_main_process, on_main_process
from pipeline.distributed.sharding import with_full_params
from pipeline.errors import UserError
from pipeline.ppo.evaluation import share_rows
from pipeline.ppo.policy_trainer import PolicyTrainer
from pipeline.reward.references import Scores, record_keys
from pipeline.reward.running import RunningStatistics
from pipeline.reward.shaping import score_references, split_referring

CHUNK = 256  # prompts whose references are sampled before they are written


def add_shape_callbacks(trainer: PolicyTrainer) -> None:
    """Let a trainer keep the running statistics of its rewards, and sample the references that they need."""
    shapes = [source.shape for source in trainer.reward.parts if source.shape is not None]
    running = [shape.running for shape in shapes if shape.running is not None]
    if running:
        trainer.add_callback(KeepStatistics(running))
    if any(shape.references is not None for shape in shapes):
        trainer.add_callback(SampleReferences(trainer))


class KeepStatistics(TrainerCallback, ExportableState):
    """Save running statistics with the Trainer's state, and restore them on resume, to the bit."""

    def __init__(self, running: Sequence[RunningStatistics]):
        self.running = running

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": {"statistics": [dict(vars(running)) for running in self.running]}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the statistics of the checkpoint that training resumes from; all ranks read it."""
        callbacks: Any = state.stateful_callbacks  # a dict, by the names of their classes
        saved = callbacks[type(self).__name__]["attributes"]["statistics"]
        for running, values in zip(self.running, saved, strict=True):
            first = values["first"]
            vars(running).update(values | {"first": first and tuple(first)})


class SampleReferences(TrainerCallback):
    """Sample responses to each prompt before the first step, and score them: the references of the sources.

    The policy is then the one that training starts from. The scores are in `references/` of the output
    folder, so that an interrupted run neither samples nor scores a prompt again.
    """

    def __init__(self, trainer: PolicyTrainer):
        self.trainer = trainer
        self.sources, self.scores = split_referring(trainer.reward.parts)
        self.count = max(scores.count for scores in self.scores)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fill the reference scores, the same on all ranks. Raises `UserError` if they are lost."""
        data = {"train": self.trainer.prompts_in_training(), "eval": self.trainer.eval_dataset}
        for name, rows in data.items():
            for file, chunk in self._split(name, rows):
                saved = on_main_process(partial(read_json, file)).get("scores", [])
                if len(saved) != len(chunk):
                    if state.global_step:
                        raise UserError(
                            f"{file}: absent or damaged, and the policy is no longer the one that gave these "
                            "references; add --force to start over"
                        )
                    saved = self._sample(name, rows, list(chunk.values()))
                    _write(file, {"scores": saved})
                self._add(list(chunk), saved)

    def _split(self, name: str, rows: Dataset) -> Iterator[tuple[Path, dict[str, int]]]:
        """Yield the file of each chunk, and the first row of each record in it by the record's key."""
        for start in range(0, len(rows), CHUNK):
            indices = range(start, min(start + CHUNK, len(rows)))
            pairs = zip(record_keys(*_read_records(rows, indices)), indices, strict=True)
            first = {key: index for key, index in reversed(list(pairs)) if key not in self.scores[0].scores}
            if first:
                folder = Path(str(self.trainer.args.output_dir)) / "references"
                yield folder / f"{name}-{start:07}.json", first

    def _add(self, keys: Sequence[str], scores: Sequence[Sequence[Scores]]) -> None:
        """Add the scores of records: for each one, a list of every source's."""
        for key, row in zip(keys, scores, strict=True):
            for references, values in zip(self.scores, row, strict=True):
                references.scores[key] = values[: references.count]

    def _sample(self, name: str, rows: Dataset, indices: Sequence[int]) -> list[list[Scores]]:
        """Return the scores of new responses to some rows: a list of every source's for each row."""
        trainer, count = self.trainer, self.count
        total = len(indices) * count
        if is_main_process():
            print(f"  sampling {total} reference responses to prompts ({name})", flush=True)
        trainer.update_sampler()

        def score_numbers(numbers: list[int]) -> list[dict[str, Any]]:
            places = [divmod(number % total, count) for number in numbers]
            chosen = [indices[place] for place, _ in places]
            # The random numbers of a response depend on its row and its number among the row's responses.
            keys = [index * count + i for index, (_, i) in zip(chosen, places, strict=True)]
            responses = trainer.sample(rows, chosen, f"references-{name}", keys)
            prompts, columns = _read_records(rows, chosen)
            batch = (prompts, responses.texts, responses.token_lists(), responses.ended, columns)
            table = score_references(self.sources, *batch, trainer.processing_class)
            return [{"scores": row} for row in table]

        def score_all() -> list[dict[str, Any]]:
            return share_rows(score_numbers, total, trainer.args)

        table = with_full_params(trainer, trainer.actor, trainer.actor.policy, score_all)
        groups = (table[start : start + count] for start in range(0, total, count))
        return [list(map(list, zip(*(row["scores"] for row in group), strict=True))) for group in groups]


def _read_records(rows: Dataset, indices: Sequence[int]) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the prompts of some rows, and their other columns."""
    columns = rows.select(indices)[:]
    return columns.pop("prompt"), columns


def _write(file: Path, value: dict[str, Any]) -> None:
    if is_main_process():
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}")
        write_json(temporary, value)
        os.replace(temporary, file)
