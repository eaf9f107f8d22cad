"""docs/from-trl.md names arguments that TRL and this project have, as error messages do."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from pipeline import PPOConfig, PPOTrainer
from pipeline.ppo.trl_names import CONFIG_NAMES, TRAINER_NAMES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "from-trl.md").read_text()
# The fields of TRL 1.12's PPOConfig beside those of TrainingArguments, and the arguments of its PPOTrainer.
TRL_1_12_CONFIG = """
dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations
response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path world_size
num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size
reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator
cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation
"""
TRL_1_12_TRAINER = """
args processing_class model ref_model reward_model train_dataset value_model data_collator eval_dataset
optimizers callbacks peft_config
"""


def names_of(cls):
    return {field.name for field in dataclasses.fields(cls)}


def parameters_of(*classes):
    return {name for cls in classes for name in inspect.signature(cls).parameters}


OURS = names_of(PPOConfig)
TRL_CONFIGS = {"GRPO": names_of(GRPOConfig), "RLOO": names_of(RLOOConfig)}


def rows_of(heading):
    """The rows of the table under a heading: the names of TRL, what is behind them, and our name."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`)(?: \((\w+)\))? \| `(\w+)` \|", section, re.M)
    assert len(rows) == section.count("\n|") - 2  # all but the head and the line below it
    return [(name, only, ours) for names, only, ours in rows for name in re.findall(r"`(\w+)`", names)]


def test_the_arguments_of_the_trainers():
    theirs = set(TRL_1_12_TRAINER.split()) | parameters_of(GRPOTrainer, RLOOTrainer)
    rows = rows_of("Arguments of the trainers")
    assert {name for name, _, _ in rows} <= theirs
    assert {ours for _, _, ours in rows} <= parameters_of(PPOTrainer, Trainer)
    mapped = {name for name, _, _ in rows}
    missing = set(TRL_1_12_TRAINER.split()) - mapped
    assert missing == {"ref_model", "data_collator"}  # which the text below the table has
    for name in missing:
        assert f"There is no `{name}`" in PAGE
    accepted = parameters_of(PPOTrainer, Trainer) - TRAINER_NAMES.keys()
    for name, _, ours in rows:
        assert name in accepted or ours in TRAINER_NAMES[name], name


@pytest.mark.parametrize("heading", ["PPO of TRL 1.12", "GRPO and RLOO of TRL 1.16"])
def test_the_fields_of_the_configs(heading):
    for name, only, ours in rows_of(heading):
        if heading.startswith("PPO"):
            assert name in set(TRL_1_12_CONFIG.split()) | names_of(TrainingArguments)
        else:
            configs = [only] if only else list(TRL_CONFIGS)
            assert [config for config in TRL_CONFIGS if name in TRL_CONFIGS[config]] == configs, name
        assert ours in OURS | {"reward_weights"}
        assert (ours == name and name not in CONFIG_NAMES) or ours in CONFIG_NAMES[name], name


def test_each_field_of_the_last_ppo_of_trl_is_ours_or_is_answered():
    assert not set(TRL_1_12_CONFIG.split()) - OURS - CONFIG_NAMES.keys()


def test_what_an_answer_names_exists():
    """A value of the tables begins with a name of ours, unless there is no counterpart."""
    tables = ((TRAINER_NAMES, parameters_of(PPOTrainer)), (CONFIG_NAMES, OURS | parameters_of(PPOTrainer)))
    for table, known in tables:
        for name, value in table.items():
            assert value.startswith("nothing: ") or re.match(r"\w+", value)[0] in known, name
