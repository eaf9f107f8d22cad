"""What is measured of a policy while it trains: answers to each held-out prompt, always drawn with the same noise."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from pipeline.distributed.sharding import full_state_dict, with_full_params
from pipeline.errors import UserError
from pipeline.models.chat import prompt_ids
from pipeline.models.generation import Responses, generate, uniforms
from pipeline.models.loading import max_positions
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.evaluation import evaluate_responses, warn_overoptimization
from pipeline.ppo.samples import write_samples
from pipeline.reward.functions import RewardFunction, RewardSource, call_reward_function

EVALUATION = "evaluation"  # stands where a rollout's number stands

POLICIES = "policies"  # where a policy of each evaluation lies, if it is kept

BEST_STEP = "best_step"  # the file that says of which step best/ is


class GenerationShape(NamedTuple):
    """Answers of at most `response_tokens`, `samples` to each held-out prompt; `options` go to `pipeline.models.generation.generate`."""

    response_tokens: int
    samples: int
    options: dict[str, Any]


class PolicyTrainer(Trainer):
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
    drawing: GenerationShape
    max_prompt_tokens: int
    keep: bool = False
    generate: Callable[..., Responses] = staticmethod(generate)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over the answers to held-out prompts: reward, the scorer's and the gold reward, KL to the reference, length."""
        self.model.eval()  # by which TRL's trainers tell whose figures are logged
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        table = with_full_params(self, self.actor, self.actor.policy, lambda: evaluate_responses(self, data))
        figures = [name for name in table[0] if name not in ("prompt", "answer")]
        metrics = {f"{metric_key_prefix}_{name}": statistics.fmean(row[name] for row in table) for name in figures}
        self.log(dict(metrics))
        if self.args.should_save:
            write_samples(self, table)
        judge = next(name for name in ("scorer_reward", "gold_reward", "reward") if name in figures)
        warn_overoptimization(self, table, judge)
        self._keep(metrics[f"{metric_key_prefix}_{judge}"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def answer(self, data: Dataset, indices: Sequence[int], rollout: Any, rows: Sequence[int]) -> Responses:
        """One answer to each of these prompts of `data`; its noise is that of its number in `rows`, in this rollout."""
        tokenizer = self.processing_class
        # A template may render nothing at all of an empty prompt: an answer then follows EOS, as it does in training.
        prompts = [prompt_ids(tokenizer, data[i]["prompt"])[-self.max_prompt_tokens :] or [tokenizer.eos_token_id] for i in indices]
        drawn = uniforms(self.args.seed, rollout, rows, self.drawing.response_tokens)
        with self.accelerator.autocast():
            return self.generate(self.actor.policy, tokenizer, prompts, drawn, **self.drawing.options)

    def call(self, function: RewardFunction, answers: Responses, data: Dataset, indices: Sequence[int]) -> list[float]:
        """The function's score of each answer, given the prompt's record."""
        records = data.select(indices)[:]
        return call_reward_function(function, records.pop("prompt"), answers.texts, answers.token_lists(), answers.ended, records)

    def publish(self, folder: Path) -> None:
        """Write the policy (of a LoRA policy the adapter) as others load it, and its tokenizer. All ranks call it, one writes."""
        weights = full_state_dict(self)
        if self.args.should_save:
            self.write(folder, weights)

    def write(self, folder: Path, weights: dict[str, Any] | None) -> None:
        """What `publish` does on rank 0, with the weights where they were sharded."""
        folder.mkdir(parents=True, exist_ok=True)
        options = {"selected_adapters": ["default"], "save_embedding_layers": False} if isinstance(self.actor.policy, PeftModel) else {}
        self.actor.policy.save_pretrained(folder, state_dict=submodule_state(weights, "policy"), **options)
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


def submodule_state(weights: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Those of the submodule `name`, by their names in it."""
    return weights and {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def prompt_budget(policy: Any, response_tokens: int, max_prompt_tokens: int) -> int:
    """How much of a prompt fits before an answer. Raises `UserError` where nothing does."""
    positions = max_positions(policy)
    left = max_prompt_tokens if positions is None else min(max_prompt_tokens, positions - response_tokens)
    if left < 1:
        raise UserError(f"ppo: response_tokens={response_tokens} leaves no room for a prompt in the policy's {positions} positions")
    return left
