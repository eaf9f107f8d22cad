"""TRL 1.12's PPO trainer on a rollout that is given, and what it makes of it."""

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import GPT2ForSequenceClassification, TrainerCallback

PLAIN = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "num_sample_generations": 0,
}


@dataclass
class Seen:
    """`rows`: of each answer's ids (a tuple, with its EOS), what TRL held for it. `gradients`: their norms at
    each real
    optimizer step. `logs`: as logged."""

    trainer: Any = None
    rows: dict[tuple[int, ...], dict[str, torch.Tensor]] = field(default_factory=dict)
    gradients: list[float] = field(default_factory=list)
    logs: dict[str, float] = field(default_factory=dict)


def update(
    monkeypatch, policy, reference, head, classifier, tokenizer, rollout, folder, batches=1, **settings
) -> Seen:
    """One update of TRL's trainer. `rollout`: pairs of prompt ids and answer ids, all in one batch. `head`:
    the value head, put on the
    policy's own trunk, as this project has it; so the two train the same weights. `classifier`: the reward
    model. `batches`: how often
    the data hold the rollout (in the last batch of its data Accelerate steps at every micro-batch)."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    answers, seen, held = {tuple(query): response for query, response in rollout}, Seen(), defaultdict(list)
    pad, width = (
        tokenizer.pad_token_id,
        settings.setdefault("response_length", max(len(response) for _, response in rollout)),
    )
    args = PPOConfig(str(folder), **PLAIN | {"stop_token": "eos", "total_episodes": len(rollout)} | settings)
    value_model = GPT2ForSequenceClassification(copy.deepcopy(classifier.config))
    value_model.transformer, value_model.score = policy.transformer, head
    get_reward, masked_whiten = ppo_trainer.get_reward, ppo_trainer.masked_whiten

    def batch_generation(model, queries, *_):
        drawn = [answers[tuple(query[query != pad].tolist())] for query in queries]
        held["answers"] = [tuple(answer) for answer in drawn]
        both = torch.cat(
            [queries, torch.tensor([[*answer, *[pad] * (width - len(answer))] for answer in drawn])], 1
        )
        logits = ppo_trainer.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / (args.temperature + 1e-7)

    def rewarded(model, ids, pad_id, context):
        found = get_reward(model, ids, pad_id, context)
        if model is classifier:
            held["scores"] = found[1].clone()
        else:
            held["values"] = found[0][:, context - 1 : -1].squeeze(-1).clone()
        return found

    def whitened(values, mask, shift_mean=True):
        held["advantages"], held["mask"] = values.clone(), mask.clone()
        return masked_whiten(values, mask, shift_mean)

    class Watch(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            seen.logs.update(logs)

    for name, spy in (
        ("batch_generation", batch_generation),
        ("get_reward", rewarded),
        ("masked_whiten", whitened),
    ):
        monkeypatch.setattr(ppo_trainer, name, spy)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    data = Dataset.from_list([{"input_ids": query} for query, _ in rollout * batches])
    trainer = PPOTrainer(
        args,
        tokenizer,
        policy,
        reference,
        classifier,
        data,
        value_model,
        eval_dataset=data,
        callbacks=[Watch()],
    )
    seen.trainer, optimizer = trainer, trainer.optimizer.optimizer
    step = optimizer.step

    def stepped(*given: Any, **more: Any) -> Any:
        norms = [
            parameter.grad.norm()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        seen.gradients.append(float(torch.stack(norms).norm()))
        return step(*given, **more)

    optimizer.step = stepped
    trainer.train()
    for row, answer in enumerate(held["answers"]):
        seen.rows[answer] = {name: held[name][row] for name in ("scores", "values", "advantages", "mask")}
    return seen
