"""`PolicyTrainer`: sampling, scoring, evaluation and publishing, shared by PPO and TRL's trainers."""

import math
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from pipeline.artifacts.seals import replace_folder, seal_folder
from pipeline.distributed.sharding import with_full_params
from pipeline.errors import UserError
from pipeline.models.generation import Responses, generate, uniforms
from pipeline.models.positions import max_positions
from pipeline.models.prompts import prepare_prompts, truncation_side
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.evaluation import kl_and_values, overoptimization_warning, share_rows
from pipeline.ppo.metrics import mean_over_processes
from pipeline.ppo.samples import MAX_SAMPLES, TOKEN_COLUMNS, token_columns, write_samples
from pipeline.reward.calls import ResponseReward, RewardFunction, call_reward_function
from pipeline.reward.functions import RewardSource
from pipeline.reward.token_rewards import total_reward
from pipeline.training.callbacks import REMEDY
from pipeline.training.weights import publishable_state, submodule_state

EVALUATION = "evaluation"  # replaces the rollout's number in the key of random numbers
POLICIES = "policies"  # folder of the policies of all evaluations, if they are kept
NO_METRICS = ("prompt", "answer", *TOKEN_COLUMNS)
SELECTION_METRICS = ("scorer_reward", "gold_reward", "reward")  # the first that exists selects best/


class GenerationShape(NamedTuple):
    """Size of generation: tokens per response, responses per held-out prompt, and sampling options.

    `response_tokens` is a maximum. `options` go to `pipeline.models.generation.generate`.
    """

    response_tokens: int
    samples: int
    options: dict[str, Any]


class PolicyTrainer(Trainer):
    """A trainer of policies whose evaluations call this project's rewards, whatever the algorithm.

    `reward` is trained on; `scorer` and `gold` are only evaluated. With `has_critic`, samples have the values
    of the actor's critic. The best policy so far is published in `best/`: best by the scorer if there is one,
    else by gold, else by reward. With `keep`, every evaluation's policy is published in `policies/step-N/`.
    """

    model: Any
    processing_class: PreTrainedTokenizerBase
    eval_dataset: Any
    actor: ActorCritic
    reward: RewardSource
    scorer: RewardFunction | None = None
    gold: RewardFunction | None = None
    generation: GenerationShape
    max_prompt_tokens: int
    overlong: str = "truncate_left"
    keep: bool = False
    has_critic: bool = False
    generate: Callable[..., Responses] = staticmethod(generate)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return means over the responses to held-out prompts: rewards, KL to the reference, length."""
        self.model.eval()  # TRL's trainers log metrics as those of evaluation if the model is in this mode
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        total = len(data) * self.generation.samples
        logged: dict[str, list[float]] = defaultdict(list)  # by the rewards' `log_metric`
        self.update_sampler()

        def evaluate_all() -> list[dict[str, Any]]:
            return share_rows(partial(self._evaluate_rows, data, logged), total, self.args)

        table = with_full_params(self, self.actor, self.actor.policy, evaluate_all)
        names = [name for name in table[0] if name not in NO_METRICS]
        metrics = {
            f"{metric_key_prefix}_{name}": statistics.fmean(row[name] for row in table) for name in names
        }
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"ppo: step {self.state.global_step}: {name} is {value}, not finite; "
                    f"nothing is published; {REMEDY}"
                )
        more = {f"{metric_key_prefix}_{name}": value for name, value in mean_over_processes(logged).items()}
        metrics |= {name: value for name, value in more.items() if name not in metrics}
        self.log(dict(metrics))

        selection = next(name for name in SELECTION_METRICS if name in names)
        if self.args.should_save:
            write_samples(self, table)
            if warning := overoptimization_warning(self.state.log_history, table, selection):
                print(f"  {warning}", flush=True)
        self._keep_policy(metrics[f"{metric_key_prefix}_{selection}"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prompts_in_training(self) -> Dataset:
        """Return the rows of the prompts to which training samples responses."""
        raise NotImplementedError

    def update_sampler(self) -> None:
        """Bring the servers of an engine's sampler to the policy of this step; all ranks call it."""
        update = getattr(self.generate, "update", None)
        if update is not None:
            update(self.state.global_step, self.publish_policy)

    def sample(self, data: Dataset, indices: Sequence[int], rollout: Any, rows: Sequence[int]) -> Responses:
        """Sample a response to each of these prompts of `data`.

        The random numbers of a response derive from its number in `rows` and from `rollout`.
        """
        policy, tokenizer, options = self.actor.policy, self.processing_class, self.generation.options
        prompts = [data[index]["prompt"] for index in indices]
        ids = prepare_prompts(tokenizer, prompts, self.max_prompt_tokens, truncation_side(self.overlong))
        numbers = uniforms(self.args.seed, rollout, rows, self.generation.response_tokens)
        with self.accelerator.autocast():
            return self.generate(policy, tokenizer, ids, numbers, **options)

    def score(
        self,
        function: RewardFunction,
        responses: Responses,
        data: Dataset,
        indices: Sequence[int],
        **of_trainer: Any,
    ) -> list[ResponseReward]:
        """Return the function's reward of each response or its tokens, given the record of its prompt.

        `of_trainer` is what TRL's trainers pass beside the record, such as `log_metric`.
        """
        columns = data.select(indices)[:] | {"trainer_state": self.state} | of_trainer
        prompts, ids = columns.pop("prompt"), responses.token_lists()
        batch = (prompts, responses.texts, ids, responses.ended, columns)
        return call_reward_function(function, *batch, tokenizer=self.processing_class)

    def publish(self, folder: Path) -> None:
        """Write the policy (under LoRA its adapter) as other libraries load it, and its tokenizer.

        All ranks call it, and one writes.
        """
        weights = publishable_state(self, "ppo")
        if self.args.should_save:
            self.write(folder, weights)

    def publish_policy(self, folder: Path) -> None:
        """Write what a server loads: the policy without its critic. All ranks call it, and one writes."""
        weights = publishable_state(self, "ppo")
        if self.args.should_save:
            PolicyTrainer.write(self, folder, weights)

    def write(self, folder: Path, weights: dict[str, Any] | None) -> None:
        """Write on rank 0 what `publish` publishes; `weights` is the full state if the model is sharded."""
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {}
        if isinstance(self.actor.policy, PeftModel):
            options = {"selected_adapters": ["default"], "save_embedding_layers": False}
            self.actor.policy.generation_config.save_pretrained(folder)
        self.actor.policy.save_pretrained(folder, state_dict=submodule_state(weights, "policy"), **options)
        self.processing_class.save_pretrained(folder)

    def _evaluate_rows(
        self, data: Dataset, logged: dict[str, list[float]], numbers: list[int]
    ) -> list[dict[str, Any]]:
        """Sample and score the responses of these numbers; return rows of prompt, response and metrics.

        What the rewards log goes to `logged`, once for each response.
        """
        indices = [number % len(data) for number in numbers]
        responses = self.sample(data, indices, EVALUATION, numbers)
        scorers = {"reward": self.reward.score, "scorer_reward": self.scorer, "gold_reward": self.gold}

        def log_metric(name: str, value: float) -> None:
            logged[name] += [float(value)] * len(numbers)

        columns: dict[str, Any] = {"prompt": data[indices]["prompt"], "answer": responses.texts}
        rewards = {
            name: self.score(scorer, responses, data, indices, log_metric=log_metric)
            for name, scorer in scorers.items()
            if scorer
        }
        columns |= {name: list(map(total_reward, scores)) for name, scores in rewards.items()}
        with self.accelerator.autocast():
            shape = self.generation
            columns["kl"], values = kl_and_values(
                self.actor, responses, shape.options["temperature"], shape.response_tokens
            )
        columns["response_tokens"] = responses.response_mask.sum(1).tolist()
        columns["ended_fraction"] = list(map(float, responses.ended))
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

        ids = responses.token_lists()
        for i, number in enumerate(numbers):
            if number < MAX_SAMPLES:  # the other rows are not written
                value_list = values[i] if self.has_critic else None
                row = (ids[i], responses.texts[i], rewards["reward"][i], value_list)
                rows[i] |= token_columns(self.processing_class, *row)
        return rows

    def _keep_policy(self, metric: float) -> None:
        """Publish the policy if it is the best so far.

        The best metric is part of the Trainer's state, and so of checkpoints.
        """
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        if self.state.best_metric is None or metric > self.state.best_metric:
            self.state.best_metric, self.state.best_global_step = metric, step
            self._publish_whole(folder / "best")
        if self.keep and step:  # at step 0 the policy is SFT's
            self._publish_whole(folder / POLICIES / f"step-{step:06}")

    def _publish_whole(self, folder: Path) -> None:
        """Publish the policy beside `folder`, seal it with its step, and then replace `folder` by it."""
        new = folder.with_name(f".{folder.name}.new")
        if self.args.should_save:
            shutil.rmtree(new, ignore_errors=True)
        self.publish(new)
        if self.args.should_save:
            seal_folder(new, self.state.global_step)
            replace_folder(new, folder)


def prompt_budget(policy: Any, response_tokens: int, max_prompt_tokens: int) -> int:
    """Return how many prompt tokens fit before a response. Raises `UserError` if none does."""
    positions = max_positions(policy)
    budget = max_prompt_tokens if positions is None else min(max_prompt_tokens, positions - response_tokens)
    if budget < 1:
        raise UserError(
            f"response_tokens={response_tokens} leaves no room for a prompt in the policy's "
            f"{positions} positions; lower it"
        )
    return budget
