"""`PPOTrainer`: PPO on `transformers.Trainer`, which trains on the minibatches of one rollout after another.

One Trainer epoch is one rollout: sample responses, score them, then make `num_ppo_epochs` passes over them in
`num_mini_batches` steps each. `pipeline.ppo.rollout` has these steps in order; the loss is in
`pipeline.ppo.loss`. The optimizer, gradient clipping, precision, callbacks, checkpoints and distributed
wrapping are the Trainer's own.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.distributed.sharding import full_state_dict, keep_output_dtype, with_full_params
from pipeline.models.ends import declare_ends, end_token_ids
from pipeline.models.generation import Responses, generate, permuted_index, unknown_ids
from pipeline.models.probes import describe_sampling
from pipeline.models.prompts import fit_prompts
from pipeline.models.truncation import Truncation
from pipeline.ppo.actor_critic import ActorCritic, value_head_from_reward
from pipeline.ppo.arguments import check_arguments, check_critic, check_launch, warn_of_biased_penalty
from pipeline.ppo.callbacks import SkipNonFinite, check_kl, check_ratio
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.critic import Critic, split_learning_rate, write_critic
from pipeline.ppo.demonstrations import demonstration_batches
from pipeline.ppo.functional import next_kl_coef
from pipeline.ppo.inputs import (
    check_keywords,
    choose_one,
    default_arguments,
    prepare_datasets,
    prepare_policy,
)
from pipeline.ppo.loss import ppo_loss
from pipeline.ppo.metrics import mean_over_processes, rollout_metrics
from pipeline.ppo.policy_trainer import GenerationShape, PolicyTrainer, prompt_budget
from pipeline.ppo.push import push_policy
from pipeline.ppo.rollout import Rollout, RolloutDataLoader, collect_rollout
from pipeline.ppo.scores import normalize_scores, stack_rewards
from pipeline.ppo.warmup import describe_end, initial_warmup, next_warmup
from pipeline.reward.coercion import sum_rewards
from pipeline.reward.functions import RewardFunction
from pipeline.reward.token_rewards import total_reward
from pipeline.training.callbacks import use_metrics_bar


class PPOTrainer(PolicyTrainer):
    """PPO on `transformers.Trainer`.

    - `policy`, or `model`: a causal language model, a `PeftModel` around one, or the path or hub id of
      either, which is loaded in fp32. The reference of a `PeftModel` is its adapter named `reference`, or
      else the bare base; that of an adapter's path is the adapter as it was.
    - `reward`, or `reward_funcs`: a `RewardModel`, a sequence classifier, the path or hub id of one, the URL
      of a server, a function of TRL's signature or its `module:function`, a `RewardSource`, or a list of
      these. A list is summed with `reward_weights`, 1 by default.
    - `reward_processing_classes`: the tokenizers of classifiers that are in memory; by default those of the
      folders or hub ids that they were loaded from.
    - `train_dataset`, `eval_dataset`: rows with a `prompt` (text or messages); their other columns go to the
      reward. They are a `Dataset`, a list of dicts, a folder of `save_to_disk`, or what
      `datasets.load_dataset` takes. Of several splits, `train` is trained on, and `validation`, or else
      `test`, evaluated.
    - `processing_class`: the policy's tokenizer; by default that of the policy's folder or hub id.
    - `peft_config`: a `LoraConfig`, of which the policy gets a new adapter.
    - `gold`, `scorer`: optional rewards that are evaluated and never trained on.
    - `keep`: keep the policy of every evaluation.
    - `demonstrations`: rows with `prompt` and `completion`, for `ptx_coef`.
    - `max_prompt_tokens`: the prompt limit. `overlong` is what happens to longer prompts: "truncate_left",
      "truncate_right" or "drop".
    - `generate`: samples the responses, with the signature of `pipeline.models.generation.generate`. If it
      has `update(step, write)`, that is called before each rollout and evaluation; `write(folder)` publishes
      the policy of this step.
    - `critic`: a `pipeline.Critic` with a trunk or an adapter of its own; by default a value head on the
      policy's trunk.

    Raises `UserError` if an argument is of another kind, a dataset is empty, demonstrations are missing, no
    prompt fits the policy, or the policy is an encoder.

    >>> from datasets import load_from_disk
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from pipeline import PPOConfig, PPOTrainer, RewardModel
    >>> policy = AutoModelForCausalLM.from_pretrained("runs/demo/sft")
    >>> tokenizer = AutoTokenizer.from_pretrained("runs/demo/sft")
    >>> reward = RewardModel.load("runs/demo/reward")
    >>> prompts = load_from_disk("runs/demo/prepare/prompts")["train"]
    >>> sizes = {"num_rollouts": 2, "per_device_train_batch_size": 4, "response_tokens": 8}
    >>> args = PPOConfig("out", report_to="none", **sizes)
    >>> trainer = PPOTrainer(policy, reward, args, train_dataset=prompts, processing_class=tokenizer)
    >>> trainer.train().global_step
    8
    >>> trainer.save_model("out/policy")
    >>> tuned = AutoModelForCausalLM.from_pretrained("out/policy")
    """

    args: PPOConfig
    train_dataset: Dataset

    has_critic = True
    _skip_rest = False  # whether `target_kl` was exceeded in this rollout
    _is_warmup = False  # whether this rollout trains the critic alone
    loss_is_scaled_for_ga = True  # the loss is divided by the tokens of the whole minibatch

    def __init__(
        self,
        policy: Any = None,
        reward: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        eval_dataset: Any = None,
        gold: RewardFunction | None = None,
        scorer: RewardFunction | None = None,
        keep: bool = False,
        demonstrations: Any = None,
        max_prompt_tokens: int = 256,
        overlong: str = "truncate_left",
        generate: Callable[..., Responses] = generate,
        critic: Critic | None = None,
        *,
        model: Any = None,
        reward_funcs: Any = None,
        reward_weights: list[float] | None = None,
        reward_processing_classes: Any = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        check_keywords(PPOTrainer, kwargs)
        policy = choose_one("policy", policy, "model", model)
        reward = choose_one("reward", reward, "reward_funcs", reward_funcs)
        args = default_arguments(policy) if args is None else args
        options = {"keep": keep, "max_prompt_tokens": max_prompt_tokens, "overlong": overlong}
        functions = {"gold": gold, "scorer": scorer}
        check_arguments(policy, reward, args, processing_class, functions, options | {"generate": generate})
        train, evaluation, shown = prepare_datasets(args, train_dataset, eval_dataset, demonstrations)
        policy, tokenizer = prepare_policy(policy, processing_class, peft_config, args)
        self.critic = Critic() if critic is None else critic
        check_critic(self.critic, policy, args, tokenizer)
        self.reward = sum_rewards(reward, reward_weights, reward_processing_classes, tokenizer, args.device)
        self.gold, self.scorer, self.keep = gold, scorer, keep
        self.demonstrations, self.overlong, self.generate = shown, overlong, generate
        self._prepare_rollouts(policy, tokenizer, args, max_prompt_tokens)
        actor = self._build_actor(policy, args)
        data = self._fit_prompts(tokenizer, train_dataset=train, eval_dataset=evaluation)
        super().__init__(model=actor, args=args, processing_class=tokenizer, **data, **kwargs)
        self.actor: ActorCritic = self.model
        check_launch(self.critic, self.accelerator)
        keep_output_dtype(self)
        self.add_callback(SkipNonFinite(lambda: self.rollouts.minibatch))
        use_metrics_bar(self)

    def _prepare_rollouts(self, policy: Any, tokenizer: Any, args: PPOConfig, max_prompt_tokens: int) -> None:
        """Decide how responses are sampled, and start the metrics."""
        if self.generate is PolicyTrainer.generate:
            describe_sampling(policy)  # asked before training, and refused before anything is computed
        self.max_prompt_tokens = prompt_budget(policy, args.response_tokens, max_prompt_tokens)
        self.ends = end_token_ids(policy, tokenizer, args.stop_token)
        declare_ends(policy, self.ends)  # whoever samples from the published policy then stops there too
        self.generation = GenerationShape(args.response_tokens, args.eval_samples, args.sampling_params)
        sampled_from = (args.top_k, args.top_p, args.min_response_tokens, tuple(self.ends))
        self.truncation = Truncation(*sampled_from, tuple(unknown_ids(policy, tokenizer)))
        self.running_metrics: dict[str, list[Any]] = defaultdict(list)  # since the last log
        self.function_metrics: dict[str, list[float]] = defaultdict(list)  # by rewards' `log_metric`
        self.clock: dict[str, float] = defaultdict(float)  # seconds and tokens since the last log

    def _fit_prompts(self, tokenizer: Any, **data: Any) -> dict[str, Any]:
        """Return the datasets by name, with the prompts that are kept; a dataset may be None."""
        limits = (self.max_prompt_tokens, self.overlong)
        return {
            name: rows and fit_prompts(tokenizer, rows, *limits, f"ppo: prompts of {name}")
            for name, rows in data.items()
        }

    def _build_actor(self, policy: Any, args: PPOConfig) -> ActorCritic:
        """Return the policy with its critic, whose value head and warm-up begin as `args` says."""
        warn_of_biased_penalty(args)
        actor = ActorCritic(policy, args.kl_coef, self.critic)
        self.critic = self.critic._replace(model=None, weights=None, value_head=None)  # they are in the actor
        if args.value_init == "reward":
            width = actor.value_head.in_features
            state = value_head_from_reward(self.reward, width, args.score_normalization)
            actor.value_head.load_state_dict(state)
        if args.critic_warmup_patience is not None:
            actor.register_buffer("critic_warmup", initial_warmup(args.critic_warmup_rollouts))
        return actor

    # Rollouts

    def get_train_dataloader(self) -> Any:
        """Return the loader that collects rollouts and yields their micro-batches."""
        self.rollouts = RolloutDataLoader(
            self.args,
            collect=self.collect,
            demonstrations=self._load_demonstrations,
            reduce=self._sum_over_ranks,
        )
        return self.rollouts

    def collect(self, number: int) -> Rollout:
        """Collect one rollout, by its absolute number; record its metrics and update the KL coefficient.

        Raises `UserError` if the mean KL to the reference is above `max_kl`.
        """
        self.clock.setdefault("since", time.perf_counter())
        self._skip_rest = False
        self._is_warmup = number < self._warmup_rollouts()
        with self._timed("generate"):
            self.update_sampler()
        rollout = with_full_params(self, self.actor, self.actor.policy, lambda: self._collect(number))

        metrics = rollout_metrics(rollout, float(self.actor.kl_coef), self.args, self.ends)
        if self.args.critic_warmup_patience is not None:
            metrics["val/critic_warmup"] = float(self._is_warmup)
        for name, value in metrics.items():
            self.running_metrics[name].append(value)
        self.clock["tokens"] += float(rollout.mask.sum()) * self.args.world_size

        kl = float(self.accelerator.reduce(rollout.kl.mean(), "mean"))
        check_kl(kl, self.args.max_kl, number, str(self.args.output_dir))
        if self._is_warmup:
            self._update_warmup(number, metrics)
        else:
            self._update_kl_coef(kl)
        return rollout

    def _collect(self, number: int) -> Rollout:
        return collect_rollout(
            self.actor,
            self.args,
            number,
            sample=partial(self._sample_rows, number),
            score=self._score_rows,
            autocast=self.accelerator.autocast,
            is_warmup=self._is_warmup,
            truncation=self.truncation,
        )

    def _prompt_indices(self, rows: list[int]) -> list[int]:
        """Return the prompt of each global row: every pass over the prompts takes them in a new order."""
        size, seed = len(self.train_dataset), self.args.seed
        return [permuted_index(size, seed, "prompts", row) for row in rows]

    def prompts_in_training(self) -> Dataset:
        """Return the rows of the prompts that the rollouts take, each once."""
        rows = range(self.args.num_rollouts * self.args.rollout_rows * self.args.world_size)
        return self.train_dataset.select(dict.fromkeys(self._prompt_indices(list(rows))))

    def _sample_rows(self, number: int, rows: list[int]) -> Responses:
        with self._timed("generate"):
            return self.sample(self.train_dataset, self._prompt_indices(rows), number, rows)

    def _score_rows(self, responses: Responses, rows: list[int]) -> tuple[list[float], Tensor]:
        """Return the raw rewards of the responses, and the (B, T) scores that PPO learns from."""
        with self._timed("score"):
            indices = self._prompt_indices(rows)
            named = {"log_metric": lambda name, value: self.function_metrics[name].append(float(value))}
            rewards = self.score(self.reward.for_training, responses, self.train_dataset, indices, **named)
            mask = responses.response_mask.bool().cpu()
            scores = normalize_scores(
                stack_rewards(rewards, mask),
                mask,
                responses.ended,
                self.args,
                self.reward,
                self.actor.score_sums,
                self._sum_over_ranks,
            )
        return list(map(total_reward, rewards)), scores.to(responses.query_ids.device)

    def _update_kl_coef(self, kl: float) -> None:
        args, responses = self.args, self.args.rollout_rows * self.args.world_size
        coef = next_kl_coef(float(self.actor.kl_coef), kl, args.kl_target, args.kl_horizon, responses)
        self.actor.kl_coef.fill_(coef)

    def _warmup_rollouts(self) -> int:
        """Return how many first rollouts train the critic alone, as far as is decided."""
        if self.args.critic_warmup_patience is None:
            return self.args.critic_warmup_rollouts
        return int(self.actor.critic_warmup[-1])

    def _update_warmup(self, number: int, metrics: dict[str, float]) -> None:
        """Decide whether the warm-up ends with this rollout; all ranks decide alike."""
        patience = self.args.critic_warmup_patience
        if patience is None:
            return
        state = next_warmup(self.actor.critic_warmup, metrics["val/r_squared"], number, patience)
        self.actor.critic_warmup.copy_(state)
        line = describe_end(state, metrics, number, patience)
        if line is not None and self.args.process_index == 0:
            print(f"  {line}", flush=True)

    def _load_demonstrations(self, rollout: int, step: int, count: int) -> tuple[list[Any], dict[str, Any]]:
        """Return the demonstrations of each micro-batch of a minibatch, and their tokens on all ranks.

        Only completion tokens count. Without `ptx_coef` there are no demonstrations.
        """
        if not self.args.ptx_coef or self.demonstrations is None:
            return [None] * self.args.gradient_accumulation_steps, {}
        longest = self.max_prompt_tokens + self.args.response_tokens
        data, tokenizer = self.demonstrations, self.processing_class
        batches, tokens = demonstration_batches(data, tokenizer, self.args, rollout, step, count, longest)
        return batches, {"demonstration_tokens": self._sum_over_ranks(tokens)}

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")

    # Steps

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; the critic's parameters are groups of their own if it has a learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.critic.learning_rate is not None:
            names = self.actor.critic_names()
            parameters = [value for name, value in self.actor.named_parameters() if name in names]
            split_learning_rate(optimizer, parameters, self.critic.learning_rate)
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradient of a micro-batch.

        Once `target_kl` is exceeded, the rest of the rollout adds no gradient, on all ranks.
        """
        if self._skip_rest:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)

        if inputs["last"] and self._is_warmup:
            critic = self.actor.critic_names()
            for name, parameter in self.actor.named_parameters():
                if name not in critic:
                    # Not zeros: Adam would average them in, and weight decay would shrink the weights.
                    parameter.grad = None

        if inputs["last"] and self.args.target_kl is not None:
            kls = self.running_metrics["policy/approxkl_avg"][-self.args.gradient_accumulation_steps :]
            approx_kl = float(self.accelerator.reduce(sum(kls), "mean")) / len(kls)
            self._skip_rest = approx_kl > self.args.target_kl
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of a micro-batch (`pipeline.ppo.loss`), and record its metrics."""
        out = model(
            inputs["query_ids"],
            inputs["query_mask"],
            inputs["response_ids"],
            inputs["response_mask"],
            self.args.temperature,
            demonstrations=inputs["demonstrations"],
            critic_only=self._is_warmup,
        )
        mask = inputs["response_mask"].bool()
        if inputs["first"]:
            check_ratio(out.logprobs, inputs["logprobs"], mask)
        loss, metrics = ppo_loss(out, inputs, self.args, value_only=self._is_warmup)

        # Metrics of micro-batches and ranks add up to a minibatch; the log has the mean over minibatches.
        count = self.args.gradient_accumulation_steps * self.args.world_size
        for name, value in metrics.items():
            self.running_metrics[name].append(value.detach() * count)
        ratio = (out.logprobs.detach() - inputs["logprobs"]).exp()[mask].mean()
        self.running_metrics["val/ratio"].append(ratio)
        return loss * self.args.world_size  # gradients are averaged over ranks

    # Logs, evaluations, files

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means since the last log, over all ranks, and the time metrics of this process."""
        if "loss" in logs and self.running_metrics:
            ratios = torch.stack([ratio.double() for ratio in self.running_metrics["val/ratio"]])
            self.running_metrics["val/ratio_var"] = [ratios.var(correction=0)]
            means = [statistics.fmean(map(float, values)) for values in self.running_metrics.values()]
            reduced = self.accelerator.reduce(torch.tensor(means, device=self.args.device), "mean")
            logs |= dict(zip(self.running_metrics, reduced.tolist(), strict=True))
            logs |= self._clock_metrics()
            logs |= {**mean_over_processes(self.function_metrics), **logs}
            self.running_metrics.clear()
            self.function_metrics.clear()
        logs.pop("train_loss", None)  # a resumed run averages it over its own steps only
        super().log(logs, start_time)

    def _clock_metrics(self) -> dict[str, float]:
        """Return seconds per rollout and response tokens per second since the last log; restart the clock."""
        now, clock = time.perf_counter(), self.clock
        elapsed, rollouts = now - clock.get("since", now), len(self.running_metrics["objective/kl"]) or 1
        metrics = {
            "time/generate": clock["generate"] / rollouts,
            "time/score": clock["score"] / rollouts,
            "time/train": (elapsed - clock["generate"] - clock["score"]) / rollouts,
            "tokens_per_second": clock["tokens"] / elapsed if elapsed else 0.0,
        }
        clock.clear()
        clock["since"] = now
        return metrics

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.clock[name] += time.perf_counter() - start

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `PolicyTrainer` does; the clock of the rollouts stops meanwhile."""
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        if "since" in self.clock:
            self.clock["since"] += time.perf_counter() - start
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy and its critic as `publish` does, or in a checkpoint one file of both."""
        folder = Path(output_dir or str(self.args.output_dir))
        if not _internal_call:
            return self.publish(folder)
        weights = full_state_dict(self)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            weights = self.actor.state_dict() if weights is None else self.actor.trainable_state(weights)
            weights = {name: weight.contiguous() for name, weight in weights.items()}
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **_: Any,
    ) -> Any:
        """Upload the policy with a card to `args.hub_model_id`, as `Trainer.push_to_hub` does.

        Only what `publish` writes is uploaded. Raises `UserError` for an adapter of a local base.
        """
        token = token or self.args.hub_token
        options = {"revision": revision or self.args.hub_revision, "run_as_future": not blocking}
        message = commit_message or "End of training"
        return push_policy(self, message, token=token, private=private, **options)

    def write(self, folder: Path, weights: dict[str, Any] | None) -> None:
        """Write the policy, and the critic in the folder `critic/` of it."""
        super().write(folder, weights)
        write_critic(folder, self.actor, self.processing_class, self.critic.origin, weights)
