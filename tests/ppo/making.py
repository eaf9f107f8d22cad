"""Small PPO trainers, their prompts and rewards, and what training changed."""

import torch
from datasets import Dataset

PROMPTS = Dataset.from_list(
    [{"prompt": p} for p in ("Tell me the capital of Italy.", "Name the colour of snow.", "Hello.", "Why?")]
)
SHOWN = Dataset.from_list(
    [
        {"prompt": "Tell me the capital of Italy.", "completion": "Rome."},
        {"prompt": "Hello.", "completion": "Hi."},
    ]
)


def evenness(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def weights(trainer):
    return {name: value.clone() for name, value in trainer.actor.state_dict().items()}


def changed(trainer):
    before = weights(trainer)
    trainer.train()
    return {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}


def scripted(*values):
    """A reward that gives these, rollout after rollout."""
    given = iter(values)
    return lambda prompts, **_: [next(given) for _ in prompts]
