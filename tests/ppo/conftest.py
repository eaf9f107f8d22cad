"""Fixtures of the tests of PPO."""

import pytest
import torch

from pipeline.models.loading import load_policy
from pipeline.ppo.config import PPOConfig
from pipeline.ppo.trainer import PPOTrainer
from tests.ppo.making import PROMPTS, evenness


@pytest.fixture
def make(tiny_gpt2, tiny_tokenizer, tmp_path):
    def trainer(reward=evenness, policy=None, data=PROMPTS, **more):
        parts = {
            name: more.pop(name)
            for name in ("demonstrations", "generate", "max_prompt_tokens", "overlong")
            if name in more
        }
        settings = {
            "num_rollouts": 1,
            "num_ppo_epochs": 1,
            "per_device_train_batch_size": 4,
            "response_tokens": 6,
            "learning_rate": 1e-3,
            "score_normalization": "none",
            "missing_eos_penalty": 0.0,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        args = PPOConfig(output_dir=str(tmp_path / "work"), **settings | more)
        torch.manual_seed(0)
        policy = policy or load_policy(str(tiny_gpt2), tiny_tokenizer)
        return PPOTrainer(policy, reward, args, data, tiny_tokenizer, eval_dataset=data, **parts)

    return trainer
