"""What `PPOTrainer` is given is checked by name, before anything is computed."""

import math

import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from pipeline import Critic, PPOConfig, PPOTrainer
from pipeline.errors import UserError
from pipeline.models.loading import load_policy

PROMPTS = Dataset.from_list([{"prompt": "Hello."}])


@pytest.fixture
def make(tiny_gpt2, tiny_tokenizer, tmp_path):
    def trainer(**arguments):
        default = {
            "policy": load_policy(str(tiny_gpt2), tiny_tokenizer),
            "reward": lambda prompts, **_: [0.0] * len(prompts),
            "args": PPOConfig(str(tmp_path), report_to="none", use_cpu=True),
            "train_dataset": PROMPTS,
            "processing_class": tiny_tokenizer,
        }
        return PPOTrainer(**default | arguments)

    return trainer


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"policy": None}, "policy: expected a causal language model, its path or its hub id, found None"),
        ({"policy": 3}, "policy: expected a causal language model, its path or its hub id, found a int"),
        ({"reward": None}, "reward: expected a RewardModel, .*, a function or a RewardSource, found None"),
        ({"args": {}}, "args: expected a PPOConfig, found a dict"),
        ({"processing_class": "a"}, "processing_class: expected the policy's tokenizer, .* found a str"),
        ({"train_dataset": None}, "train_dataset: expected a datasets.Dataset, .*, found None"),
        ({"train_dataset": PROMPTS.select([])}, "train_dataset: has no rows"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"]})}, "no column 'prompt'; found text"),
        ({"eval_dataset": PROMPTS.select([])}, "eval_dataset: has no rows"),
        (
            {"eval_dataset": Dataset.from_dict({"prompt": ["a"], "ended": [1]})},
            "eval_dataset: column 'ended': .*; rename or",
        ),
        ({"gold": 3}, "gold: expected a reward function, or None, found a int"),
        ({"scorer": "x:y"}, "scorer: expected a reward function, or None, found a str"),
        ({"policy": nn.Linear(2, 2)}, "policy: expected a causal language model, .*, found a Linear"),
        ({"policy": ""}, "policy: expected a causal language model, its path or its hub id, found a str"),
        ({"keep": "yes"}, "keep: expected True or False, found a str"),
        ({"max_prompt_tokens": "5"}, "max_prompt_tokens='5': expected a whole number above 0"),
        ({"max_prompt_tokens": 2.5}, "max_prompt_tokens=2.5: expected a whole number above 0"),
        ({"max_prompt_tokens": None}, "max_prompt_tokens=None: expected a whole number above 0"),
        ({"overlong": "cut"}, "overlong='cut': expected truncate_left or truncate_right or drop"),
        ({"generate": 3}, "generate: expected a function with the signature of .*, found a int"),
        ({"demonstrations": 3}, "demonstrations: expected a datasets.Dataset, .*, found a int"),
        ({"callbacks": 3}, "callbacks: expected a list of TrainerCallbacks, found a int"),
        ({"callbacks": [TrainerCallback(), "x"]}, r"callbacks\[1\]: expected a TrainerCallback, found a str"),
        ({"callbacks": [int]}, r"callbacks\[0\]: expected a TrainerCallback, found a type"),
        ({"optimizers": 3}, r"optimizers: expected \(an optimizer or None, .*, found a int"),
        ({"optimizers": (None, "cosine")}, r"optimizers\[1\]: expected \(an optimizer or None, .* a str"),
        (
            {"optimizer_cls_and_kwargs": SGD},
            "optimizer_cls_and_kwargs: expected .the class, a dict .* a type",
        ),
        ({"critic": {}}, "critic: expected a pipeline.Critic, found a dict"),
        ({"critic": Critic(lora=3)}, "critic.lora: expected a LoraConfig, or None, found a int"),
        ({"critic": Critic(learning_rate="x")}, "critic.learning_rate='x': expected a finite number above 0"),
        ({"critic": Critic(learning_rate=math.nan)}, "critic.learning_rate=nan: expected a finite number"),
        (
            {"critic": Critic(value_head={"bias": 1})},
            "critic.value_head: expected the keys weight and bias, f",
        ),
        (
            {"critic": Critic("model", model=nn.Linear(2, 2))},
            "critic.model: expected a language model, found",
        ),
    ],
)
def test_an_argument_of_another_kind_is_named(argument, message, make):
    with pytest.raises(UserError, match=f"^ppo: .*{message}"):
        make(**argument)


def test_arguments_of_the_trainer_are_handed_on(make, tiny_gpt2, tiny_tokenizer):
    policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
    optimizer = SGD(policy.parameters(), 0.1)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    trainer = make(policy=policy, callbacks=[TrainerCallback], optimizers=(optimizer, scheduler))
    assert (trainer.optimizer, trainer.lr_scheduler) == (optimizer, scheduler)
    assert any(type(callback) is TrainerCallback for callback in trainer.callback_handler.callbacks)


def test_demonstrations_need_their_columns(make, tmp_path):
    args = PPOConfig(str(tmp_path), report_to="none", use_cpu=True, ptx_coef=1.0)
    with pytest.raises(UserError, match="demonstrations: has no column 'completion'; found prompt"):
        make(args=args, demonstrations=PROMPTS)
    with pytest.raises(UserError, match=r"demonstrations: row 0: completion: expected a string .*, found 3"):
        make(args=args, demonstrations=[{"prompt": "a", "completion": 3}])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "has a PromptTuningConfig"),
        (LoraConfig(init_lora_weights="pissa", task_type="CAUSAL_LM"), "has init_lora_weights=pissa"),
        (LoraConfig(bias="all", task_type="CAUSAL_LM"), "has bias=all"),
    ],
)
def test_a_policy_with_another_adapter_is_refused(adapter, message, make, tiny_gpt2, tiny_tokenizer):
    policy = get_peft_model(load_policy(str(tiny_gpt2), tiny_tokenizer), adapter)
    with pytest.raises(UserError, match=f"ppo: policy: its adapter 'default' {message}"):
        make(policy=policy)


def test_a_generation_config_that_cannot_be_saved_is_repaired(make, tiny_gpt2, tiny_tokenizer, tmp_path):
    policy = load_policy(str(tiny_gpt2), tiny_tokenizer)
    policy.generation_config.temperature = 0.7
    make(policy=policy).publish(tmp_path / "policy")
    assert policy.generation_config.temperature is None
