"""What is measured of a policy while it trains: answers to each held-out prompt, always drawn with the same noise."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from pipeline import encoding, models, sampling
from pipeline.errors import UserError
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.shown import write_samples
from pipeline.reward.sources import RewardFunction, RewardSource, ask
from pipeline.sampling import Answers, noise
from pipeline.sharding import at_leisure, gathered

EVALUATION = "evaluation"  # stands where a rollout's number stands
POLICIES = "policies"  # where a policy of each evaluation lies, if it is kept
BEST_STEP = "best_step"  # the file that says of which step best/ is


class Drawing(NamedTuple):
    """Answers of at most `response_tokens`, `samples` to each held-out prompt; `options` go to `pipeline.sampling.generate`."""

    response_tokens: int
    samples: int
    options: dict[str, Any]


class Watched(Trainer):
    """A trainer of policies whose evaluations ask this project's rewards, whatever the algorithm.

    `reward` is trained on; `scorer` and `gold` (where they are) look on. The best so far, by the scorer, or else by gold, or else by
    reward, is published in `best/`; with `keep` every evaluation's policy in `policies/step-N/`.
    """

    model: Any
    processing_class: PreTrainedTokenizerBase
    eval_dataset: Any
    actor: ActorCritic
    reward: RewardSource
    scorer: RewardFunction | None = None
    gold: RewardFunction | None = None
    drawing: Drawing
    max_prompt_tokens: int
    keep: bool = False
    generate: Callable[..., Answers] = staticmethod(sampling.generate)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over the answers to held-out prompts: reward, the scorer's and the gold reward, KL to the reference, length."""
        self.model.eval()  # by which TRL's trainers tell whose figures are logged
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        table = at_leisure(self, self.actor, self.actor.policy, lambda: answered(self, data))
        figures = [name for name in table[0] if name not in ("prompt", "answer")]
        metrics = {f"{metric_key_prefix}_{name}": statistics.fmean(row[name] for row in table) for name in figures}
        self.log(dict(metrics))
        if self.args.should_save:
            write_samples(self, table)
        judge = next(name for name in ("scorer_reward", "gold_reward", "reward") if name in figures)
        warn_of_exploits(self, table, judge)
        self._keep(metrics[f"{metric_key_prefix}_{judge}"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def answer(self, data: Dataset, indices: Sequence[int], rollout: Any, rows: Sequence[int]) -> Answers:
        """One answer to each of these prompts of `data`; its noise is that of its number in `rows`, in this rollout."""
        tokenizer = self.processing_class
        # A template may render nothing at all of an empty prompt: an answer then follows EOS, as it does in training.
        prompts = [
            encoding.prompt_ids(tokenizer, data[i]["prompt"])[-self.max_prompt_tokens :] or [tokenizer.eos_token_id] for i in indices
        ]
        drawn = noise(self.args.seed, rollout, rows, self.drawing.response_tokens)
        with self.accelerator.autocast():
            return self.generate(self.actor.policy, tokenizer, prompts, drawn, **self.drawing.options)

    def call(self, function: RewardFunction, answers: Answers, data: Dataset, indices: Sequence[int]) -> list[float]:
        """The function's score of each answer, given the prompt's record."""
        records = data.select(indices)[:]
        return ask(function, records.pop("prompt"), answers.texts, answers.token_lists(), answers.ended, records)

    def publish(self, folder: Path) -> None:
        """Write the policy (of a LoRA policy the adapter) as others load it, and its tokenizer. All ranks call it, one writes."""
        weights = gathered(self)
        if self.args.should_save:
            self.write(folder, weights)

    def write(self, folder: Path, weights: dict[str, Any] | None) -> None:
        """What `publish` does on rank 0, with the weights where they were sharded."""
        folder.mkdir(parents=True, exist_ok=True)
        options = {"selected_adapters": ["default"], "save_embedding_layers": False} if isinstance(self.actor.policy, PeftModel) else {}
        self.actor.policy.save_pretrained(folder, state_dict=part(weights, "policy"), **options)
        self.processing_class.save_pretrained(folder)

    def _keep(self, figure: float) -> None:
        """What is best so far is part of the Trainer's own state, and so of every checkpoint."""
        best, folder = self.state.best_metric is None or figure > self.state.best_metric, Path(str(self.args.output_dir))
        if best:
            self.state.best_metric, self.state.best_global_step = figure, self.state.global_step
        if best:
            self.publish(folder / "best")
            if self.args.should_save:
                (folder / BEST_STEP).write_text(str(self.state.global_step))
        if self.keep and self.state.global_step:  # at step 0 it is SFT's
            self.publish(folder / POLICIES / f"step-{self.state.global_step:06}")


def part(weights: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Those of the submodule `name`, by their names in it."""
    return weights and {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def answered(trainer: Watched, data: Dataset) -> list[dict[str, Any]]:
    """`drawing.samples` rows for each prompt of `data`: prompt, answer, the rewards there are, KL, response tokens, whether it ended. The
    prompts are shared out over the ranks."""
    args, drawing, table = trainer.args, trainer.drawing, []
    scorers = {"reward": trainer.reward.score, "scorer_reward": trainer.scorer, "gold_reward": trainer.gold}
    total = len(data) * drawing.samples
    # As many for each rank, who may share a reference: some are drawn twice.
    mine = range(args.process_index, math.ceil(total / args.world_size) * args.world_size, args.world_size)
    for start in range(0, len(mine), args.per_device_eval_batch_size):
        numbers = list(mine[start : start + args.per_device_eval_batch_size])
        rows = [number % len(data) for number in numbers]
        answers = trainer.answer(data, rows, EVALUATION, numbers)
        columns = {"prompt": data[rows]["prompt"], "answer": answers.texts}
        columns |= {name: trainer.call(scorer, answers, data, rows) for name, scorer in scorers.items() if scorer is not None}
        with trainer.accelerator.autocast():
            columns["kl"] = kl_to_reference(trainer.actor, answers, drawing.options["temperature"])
        columns |= {"response_tokens": answers.response_mask.sum(1).tolist(), "ended_fraction": list(map(float, answers.ended))}
        columns["number"] = numbers
        table += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    table = sorted(gather_object(table), key=lambda row: row["number"])[:total]
    return [{name: value for name, value in row.items() if name != "number"} for row in table]


@torch.no_grad()  # not inference_mode, in which sharded weights would be gathered into tensors that training cannot fill again
def kl_to_reference(actor: ActorCritic, answers: Answers, temperature: float) -> list[float]:
    """log p − log q summed over each answer (k1): an unbiased sample of the KL of whole answers, in nats."""
    tensors = (answers.query_ids, answers.query_mask, answers.response_ids, answers.response_mask)
    logprobs = actor(*tensors, temperature).logprobs
    return (logprobs - actor.reference_logprobs(*tensors, temperature)).sum(1).tolist()


def warn_of_exploits(trainer: Watched, table: list[dict[str, Any]], judge: str) -> None:
    """Says that the reward has risen since the best evaluation of the `judge`, which has fallen by more than two standard errors: the
    policy then exploits the reward."""
    history = [entry for entry in trainer.state.log_history if f"eval_{judge}" in entry]
    if judge == "reward" or not history or len(table) < 2 or not trainer.args.should_save:
        return
    best, now = (max(history, key=lambda entry: entry[f"eval_{judge}"]), history[-1])
    error = statistics.stdev(row[judge] for row in table) / len(table) ** 0.5
    if now["eval_reward"] > best["eval_reward"] and best[f"eval_{judge}"] - now[f"eval_{judge}"] > 2 * error:
        moves = [f"{best[f'eval_{name}']:.3f} to {now[f'eval_{name}']:.3f}" for name in ("reward", judge)]
        print(
            f"  step {now['step']}: since step {best['step']} the reward rose from {moves[0]} and the {judge.replace('_', ' ')} fell from "
            f"{moves[1]}, at a KL of {now['eval_kl']:.2f}: the policy exploits the reward model",
            flush=True,
        )


def room(policy: Any, response_tokens: int, max_prompt_tokens: int) -> int:
    """How much of a prompt fits before an answer. Raises `UserError` where nothing does."""
    positions = models.most_tokens(policy)
    left = max_prompt_tokens if positions is None else min(max_prompt_tokens, positions - response_tokens)
    if left < 1:
        raise UserError(f"ppo: response_tokens={response_tokens} leaves no room for a prompt in the policy's {positions} positions")
    return left
