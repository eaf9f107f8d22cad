"""`PPOTrainer`: rollouts become a stream of minibatches that `transformers.Trainer` trains on.

One Trainer epoch is one rollout: sample answers, score them, then `num_ppo_epochs` passes over them in `num_mini_batches` steps each.
The optimizer, clipping, precision, callbacks, checkpoints and distributed wrapping are the Trainer's own.
Sources: Ziegler et al. 2019; Stiennon et al. 2020; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.distributed.sharding import full_state_dict, keep_output_dtype, with_full_params
from pipeline.errors import UserError
from pipeline.models.generation import Responses, generate, permutation
from pipeline.ppo import functional
from pipeline.ppo.actor_critic import ActorCritic
from pipeline.ppo.callbacks import SkipNonFinite, check_kl
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.policy_trainer import GenerationShape, PolicyTrainer, prompt_budget, submodule_state
from pipeline.ppo.rollout import Rollout, RolloutDataLoader, compute_experience
from pipeline.reward import batching
from pipeline.reward.functions import RewardFunction, RewardSource, reward_from_model
from pipeline.reward.model import RewardModel
from pipeline.training.callbacks import use_metrics_bar

VALUE_HEAD = "value_head.safetensors"


class PPOTrainer(PolicyTrainer):
    """PPO on `transformers.Trainer`.

    `policy`: a causal language model, or a `PeftModel` around one (its reference is then the adapter named `reference`, or the bare base).
    `reward`: a `RewardModel`, a function of TRL's signature, or a `RewardSource`. `train_dataset`, `eval_dataset`: rows with a `prompt`
    (text or messages); their other columns are handed to the reward. `gold`: an optional true reward, evaluated and never trained on.
    `demonstrations`: rows with `prompt` and `completion`, for `ptx_coef`. `generate`: what draws the answers, of the signature of
    `pipeline.models.generation.generate`.

    >>> from datasets import load_from_disk
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from pipeline import PPOConfig, PPOTrainer, RewardModel
    >>> policy, tokenizer = AutoModelForCausalLM.from_pretrained("runs/demo/sft"), AutoTokenizer.from_pretrained("runs/demo/sft")
    >>> prompts = load_from_disk("runs/demo/prepare/prompts")["train"]
    >>> args = PPOConfig("out", num_rollouts=2, per_device_train_batch_size=4, response_tokens=8, report_to="none")
    >>> trainer = PPOTrainer(policy, RewardModel.load("runs/demo/reward"), args, train_dataset=prompts, processing_class=tokenizer)
    >>> trainer.train().global_step
    8
    >>> trainer.save_model("out/policy")
    >>> tuned = AutoModelForCausalLM.from_pretrained("out/policy")
    """

    args: PPOConfig
    train_dataset: Dataset

    loss_is_scaled_for_ga = True  # the loss is divided by the tokens of the whole minibatch

    def __init__(
        self,
        policy: Any,
        reward: RewardModel | RewardSource | RewardFunction,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        gold: RewardFunction | None = None,
        scorer: RewardFunction | None = None,
        keep: bool = False,
        demonstrations: Dataset | None = None,
        max_prompt_tokens: int = 256,
        generate: Callable[..., Responses] = generate,
        **kwargs: Any,
    ) -> None:
        if args.ptx_coef and not demonstrations:
            raise UserError(f"ppo: ptx_coef={args.ptx_coef:g} needs demonstrations to learn from, and there are none")
        if not len(train_dataset) or (eval_dataset is not None and not len(eval_dataset)):
            raise UserError("ppo: train_dataset and eval_dataset need a prompt at least, and one of them has none")
        source = reward_from_model(reward) if isinstance(reward, RewardModel) else reward
        self.reward = source if isinstance(source, RewardSource) else RewardSource(source)
        self.gold, self.scorer, self.keep, self.demonstrations, self.generate = gold, scorer, keep, demonstrations, generate
        self.max_prompt_tokens = prompt_budget(policy, args.response_tokens, max_prompt_tokens)
        self.drawing = GenerationShape(args.response_tokens, args.eval_samples, args.drawing)
        self._figures: dict[str, list[Any]] = defaultdict(list)
        self.clock: dict[str, float] = defaultdict(float)
        self._left_out = False  # the rest of this rollout's minibatches: see `target_kl`
        self.minibatch: tuple[Rollout, list[int]] | None = None  # the one that is trained on: its rows of the rollout
        model = ActorCritic(policy, args.kl_coef)
        if args.value_init == "reward":
            model.value_head.load_state_dict(value_head_from_reward(self.reward, model.value_head.in_features, args.score_normalization))
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model=model, args=args, processing_class=processing_class, **data, **kwargs)
        self.actor: ActorCritic = self.model
        keep_output_dtype(self)
        self.add_callback(SkipNonFinite(self))
        use_metrics_bar(self)

    # The stream of minibatches

    def get_train_dataloader(self) -> Any:
        return RolloutDataLoader(self)

    def collect(self, rollout: int) -> Rollout:
        """Sample and score the answers of one rollout, by its absolute number."""
        return with_full_params(self, self.actor, self.actor.policy, lambda: self._collect(rollout))

    def _collect(self, rollout: int) -> Rollout:
        start = time.perf_counter()
        rows = self._rows(rollout)
        prompts = [self.pick(len(self.train_dataset), "prompts", row) for row in rows]
        answers = self.answer(self.train_dataset, prompts, rollout, rows)
        drawn = time.perf_counter()
        raw = self.call(self.reward.score, answers, self.train_dataset, prompts)
        scores = self._scores(torch.tensor(raw, dtype=torch.float64), answers).to(answers.query_ids.device)
        self.clock["generate"] += drawn - start
        self.clock["score"] += time.perf_counter() - drawn
        experience = compute_experience(self.actor, answers, scores, self.args, rollout, self.accelerator.autocast)
        self._left_out = False
        self._record(experience, raw)
        kl = float(self.accelerator.reduce(experience.kl.mean(), "mean"))
        check_kl(kl, self.args.max_kl, rollout, str(self.args.output_dir))
        self._update_kl_coef(kl)
        return experience

    # What the Trainer calls

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch's gradient; none once `target_kl` is passed: the rest of the rollout is left out, on all ranks."""
        if self._left_out:
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if inputs["last"] and inputs["rollout"] < self.args.critic_warmup_rollouts:
            for name, parameter in self.actor.named_parameters():
                if not name.startswith("value_head."):
                    parameter.grad = None  # no zeros, which Adam would count and weight decay would shrink
        if inputs["last"] and self.args.target_kl is not None:
            parts = self._figures["policy/approxkl_avg"][-self.args.gradient_accumulation_steps :]
            self._left_out = float(self.accelerator.reduce(sum(parts), "mean")) / len(parts) > self.args.target_kl
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """The losses of a micro-batch (see `PPOConfig`), over the minibatch's tokens on all ranks."""
        args, mask, tokens = self.args, inputs["response_mask"].bool(), inputs["num_tokens"]
        warming_up = inputs["rollout"] < args.critic_warmup_rollouts
        answers = (inputs[name] for name in ("query_ids", "query_mask", "response_ids", "response_mask"))
        out = model(*answers, args.temperature, demonstrations=inputs["demonstrations"], value_head_only=warming_up)
        if inputs["first"]:
            self._check_ratio(out.logprobs, inputs["logprobs"], mask)
        clips = (args.clip_low, args.clip_high, args.dual_clip)
        policy = functional.policy_loss(out.logprobs, inputs["logprobs"], inputs["advantages"], mask, *clips, num_tokens=tokens)
        value = functional.value_loss(out.values, inputs["values"], inputs["returns"], mask, args.clip_value, num_tokens=tokens)
        entropy = torch.where(mask, out.entropy, 0.0).sum() / tokens
        loss = policy.loss - args.entropy_coef * entropy if args.entropy_coef else policy.loss
        figures = {
            "loss/policy_avg": policy.loss, "loss/value_avg": value.loss, "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clip_fraction, "policy/entropy_avg": entropy, "val/clipfrac_avg": value.clip_fraction,
        }  # fmt: skip
        if out.demonstrations is not None:
            figures["loss/ptx_avg"] = -out.demonstrations.sum() / inputs["demonstration_tokens"]
            loss = loss + args.ptx_coef * figures["loss/ptx_avg"]
        # Micro-batches, and those of all ranks, add up to a minibatch, whose mean over the logging window is shown.
        parts = args.gradient_accumulation_steps * args.world_size
        for name, figure in figures.items():
            self._figures[name].append(figure.detach() * parts)
        self._figures["val/ratio"].append((out.logprobs.detach() - inputs["logprobs"]).exp()[mask].mean())
        # While the critic warms up nothing but its head has a gradient, though all of the model takes part.
        return ((0.0 if warming_up else 1.0) * loss + args.vf_coef * value.loss) * args.world_size  # gradients are averaged over ranks

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._figures:
            ratios = torch.stack([ratio.double() for ratio in self._figures["val/ratio"]])
            self._figures["val/ratio_var"] = [ratios.var(correction=0)]
            means = torch.tensor([statistics.fmean(map(float, figures)) for figures in self._figures.values()], device=self.args.device)
            logs |= dict(zip(self._figures, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            logs |= self._times()
            self._figures.clear()
        logs.pop("train_loss", None)  # a mean that a resumed run takes over its own steps alone
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        if "since" in self.clock:
            self.clock["since"] += time.perf_counter() - start  # the rollouts' figures are without it
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy and its value head, as `publish` writes them; in a checkpoint all that is trained, as one safetensors file."""
        folder = Path(output_dir or str(self.args.output_dir))
        if not _internal_call:
            return self.publish(folder)
        weights = full_state_dict(self)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            weights = self.actor.state_dict() if weights is None else self.actor.kept(weights)
            save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})

    def write(self, folder: Path, weights: dict[str, Any] | None) -> None:
        super().write(folder, weights)
        save_file(submodule_state(weights, "value_head") or self.actor.value_head.state_dict(), folder / VALUE_HEAD)

    # Parts of a rollout

    def _rows(self, rollout: int) -> list[int]:
        """The global row numbers of this process in a rollout."""
        start = (rollout * self.args.world_size + self.args.process_index) * self.args.rollout_rows
        return list(range(start, start + self.args.rollout_rows))

    def pick(self, size: int, name: str, row: int) -> int:
        """Which of `size` things belongs to a global row: a new permutation for every pass over them."""
        turn, place = divmod(row, size)
        return permutation(size, self.args.seed, name, turn)[place]

    def _scores(self, scores: Tensor, answers: Responses) -> Tensor:
        """(B,) raw scores -> as PPO sees them: normalised, clipped, less the penalty of an answer that did not end."""
        args = self.args
        if args.score_normalization == "reference":
            scores = (scores - self.reward.mean) / (self.reward.std or 1.0)
        if args.score_normalization == "running":
            sums = torch.stack([torch.ones_like(scores), scores, scores.square()]).sum(1)
            self.actor.score_sums += self.accelerator.reduce(sums.to(self.actor.score_sums.device), "sum")
            count, total, squares = self.actor.score_sums.tolist()
            deviation = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
            scores = (scores - total / count) / (deviation or 1.0)
        if args.score_clip is not None:
            scores = scores.clamp(-args.score_clip, args.score_clip)
        return (scores - args.missing_eos_penalty * (1 - torch.tensor(answers.ended).double())).float()

    def _update_kl_coef(self, kl: float) -> None:
        args, coef = self.args, float(self.actor.kl_coef)
        controller = functional.FixedKL(coef) if args.kl_target is None else functional.AdaptiveKL(coef, args.kl_target, args.kl_horizon)
        controller.update(kl, args.rollout_rows * args.world_size)
        self.actor.kl_coef.fill_(controller.coef)

    def _record(self, experience: Rollout, raw: list[float]) -> None:
        """The rollout's figures, over real tokens, under the names TRL's PPO had."""
        mask, answers = experience.mask, experience.answers
        kl = functional.kl_estimate(experience.logprobs, experience.ref_logprobs, self.args.kl_estimator)
        penalty = -float(self.actor.kl_coef) * torch.where(mask, kl, 0.0).sum(1)
        ends = answers.response_ids == self.processing_class.eos_token_id
        figures: dict[str, Tensor | float] = {
            "objective/kl": experience.kl.mean(), "objective/kl_coef": self.actor.kl_coef,
            "objective/entropy": experience.entropy[mask].mean(), "objective/scores": experience.scores.mean(),
            "objective/raw_scores": statistics.fmean(raw), "objective/non_score_reward": penalty.mean(),
            "objective/rlhf_reward": (experience.scores + penalty).mean(), "response/tokens": mask.sum(1).float().mean(),
            "response/ended_fraction": statistics.fmean(answers.ended), "val/num_eos_tokens": (ends & mask).sum() * self.args.world_size,
            "val/explained_variance": functional.explained_variance(experience.values, experience.returns, mask),
        }  # fmt: skip
        for name, figure in figures.items():
            self._figures[name].append(float(figure))
        self.clock["tokens"] += float(mask.sum()) * self.args.world_size

    def _times(self) -> dict[str, float]:
        """Seconds per rollout since the last log, and response tokens per second, whatever they went into."""
        now, clock = time.perf_counter(), self.clock
        elapsed, rollouts = now - clock.get("since", now), len(self._figures["objective/kl"]) or 1
        drawn, scored = clock["generate"], clock["score"]
        found = {"time/generate": drawn, "time/score": scored, "time/train": elapsed - drawn - scored}
        speed = clock["tokens"] / elapsed if elapsed else 0.0
        clock.clear()
        clock["since"] = now
        return {name: seconds / rollouts for name, seconds in found.items()} | {"tokens_per_second": speed}

    def _check_ratio(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> None:
        worst = float(torch.where(mask, logprobs.detach() - old_logprobs, 0.0).abs().max())
        if worst != 0.0 and math.isfinite(worst):  # what is not finite is left to `SkipNonFinite`
            raise UserError(
                f"ppo: on a rollout's first minibatch the log-probabilities are up to {worst:.2g} off those just computed; expected equal "
                "ones: something in the model is random or depends on the mode (dropout, a router's jitter, a patched forward); switch it "
                "off in the model's config"
            )


def value_head_from_reward(reward: RewardSource, width: int, normalization: str) -> dict[str, Tensor]:
    """A value head that starts as the reward model's own, in units of the score that the reference sample normalises.

    Raises `UserError` where it does not fit.
    """
    scorer: Any = batching.score_head(reward.model.model) if reward.model is not None else None
    if hasattr(scorer, "modules_to_save"):  # of an adapter on a quantized base
        scorer = scorer.modules_to_save[scorer.active_adapter]
    if reward.model is None or not isinstance(scorer, torch.nn.Linear) or tuple(scorer.weight.shape) != (1, width):
        raise UserError(
            f"ppo: value_init: reward needs one reward model with a scalar head on states of {width} numbers, as the policy has; "
            "use value_init: zero"
        )
    scale, centre = (reward.std, reward.mean) if normalization == "reference" else (1.0, 0.0)
    weight = reward.model.settings.sign * reward.model.settings.alpha * scorer.weight.detach().cpu().float() / scale
    return {"weight": weight, "bias": torch.tensor([-centre / scale])}
