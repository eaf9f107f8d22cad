"""`PPOTrainer` takes what TRL's trainers take: each form trains a rollout to the same numbers."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    set_seed,
)

from pipeline import PPOConfig, PPOTrainer, RewardModel
from pipeline.errors import UserError
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.ppo.trl_names import CONFIG_NAMES
from tests.ppo.making import PROMPTS, evenness

ROWS = PROMPTS.to_list()


def brevity(completion_ids, **_):
    return [-len(ids) / 10 for ids in completion_ids]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_tokenizer):
    """A random GPT-2 with a scalar head, as another library saves one."""
    torch.manual_seed(1)
    size = {"vocab_size": len(tiny_tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2ForSequenceClassification(
        GPT2Config(**size, num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id)
    )
    folder = tmp_path_factory.mktemp("classifier")
    model.score.weight.data.mul_(20)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def train(tiny_gpt2, tiny_tokenizer, tmp_path):
    """Train one rollout, and return the log entry and the weights after it."""

    def run(**changes):
        arguments = {
            "policy": str(tiny_gpt2),
            "reward": evenness,
            "train_dataset": PROMPTS,
            "processing_class": tiny_tokenizer,
            "args": PPOConfig(
                str(tmp_path / "out"),
                num_rollouts=1,
                num_ppo_epochs=1,
                per_device_train_batch_size=4,
                response_tokens=5,
                learning_rate=1e-3,
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
            ),
        } | changes
        trainer = PPOTrainer(**{name: value for name, value in arguments.items() if value is not LEFT_OUT})
        trainer.train()
        log = trainer.state.log_history[0]
        numbers = {key: value for key, value in log.items() if not key.startswith(("time/", "tokens_per"))}
        return numbers, trainer.actor.state_dict(), trainer

    return run


LEFT_OUT = object()


def assert_same(first, second):
    assert first[0] == second[0]
    assert first[0]["objective/scores"] != 0
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())


# Policies


@pytest.mark.parametrize("name", ["policy", "model"])
@pytest.mark.parametrize("form", ["path", "text", "in memory"])
def test_a_policy_needs_no_tokenizer(name, form, train, tiny_gpt2, tiny_tokenizer):
    policy = {
        "path": lambda: tiny_gpt2,
        "text": lambda: str(tiny_gpt2),
        "in memory": lambda: AutoModelForCausalLM.from_pretrained(tiny_gpt2),
    }[form]()
    changed = {"policy": LEFT_OUT, name: policy, "processing_class": LEFT_OUT}
    assert_same(train(policy=load_policy(str(tiny_gpt2), tiny_tokenizer)), train(**changed))


def test_a_policy_without_a_name_needs_its_tokenizer(train, tiny_tokenizer):
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"processing_class: the policy was not loaded .*; pass"):
        train(policy=policy, processing_class=LEFT_OUT)


def test_a_tokenizer_in_memory_may_have_no_template(train, tiny_gpt2, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    settled = load_tokenizer(str(tmp_path / "plain"))
    assert_same(train(processing_class=tokenizer), train(processing_class=settled))


def test_the_vocabulary_of_a_policy_in_memory_stays(train, tiny_gpt2, tmp_path):
    """A tokenizer without a pad token pads with its EOS, as in TRL; the masks say which ids are read."""
    folder = shutil.copytree(tiny_gpt2, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(folder)
    _, weights, trainer = train(
        policy=AutoModelForCausalLM.from_pretrained(folder), processing_class=LEFT_OUT
    )
    assert trainer.processing_class.pad_token == trainer.processing_class.eos_token
    assert_same((*train()[:2], None), (train(policy=str(folder))[0], weights, None))


def test_a_peft_config_is_an_adapter_that_the_seed_decides(train, tiny_gpt2, tiny_tokenizer):
    lora = LoraConfig(r=2, target_modules=["c_attn"])
    numbers, weights, trainer = train(peft_config=lora)
    set_seed(42)
    base = load_policy(str(tiny_gpt2), tiny_tokenizer)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    assert_same((numbers, weights, trainer), train(policy=wrapped))
    assert lora.task_type is None  # the caller's is not written into
    assert trainer.actor.reference is None


def test_the_path_of_an_adapter_is_trained_further_and_is_the_reference(
    train, tiny_gpt2, tiny_tokenizer, tmp_path
):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_policy(str(tiny_gpt2), tiny_tokenizer), lora).save_pretrained(tmp_path / "adapter")

    policy = PeftModel.from_pretrained(
        load_policy(str(tiny_gpt2), tiny_tokenizer), tmp_path / "adapter", is_trainable=True
    )
    policy.load_adapter(tmp_path / "adapter", adapter_name="reference")
    policy.set_adapter("default")
    first, second = train(policy=policy), train(policy=tmp_path / "adapter")
    assert_same(first, second)
    assert second[0]["objective/kl"] == 0  # of the first rollout; the bare base is another policy
    with pytest.raises(UserError, match="peft_config: the policy has an adapter already"):
        train(policy=policy, peft_config=lora)


# Rewards


@pytest.mark.parametrize("name", ["reward", "reward_funcs"])
@pytest.mark.parametrize("form", ["path", "text", "in memory", "list", "source"])
def test_a_reward_is_a_classifier_in_any_form(name, form, train, classifier):
    reward = {
        "path": lambda: classifier,
        "text": lambda: str(classifier),
        "in memory": lambda: AutoModelForSequenceClassification.from_pretrained(classifier),
        "list": lambda: [RewardModel.load(classifier)],
        "source": lambda: [str(classifier)],
    }[form]()
    expected = train(reward=RewardModel.load(classifier))
    assert_same(expected, train(**{"reward": LEFT_OUT, name: reward}))


def test_the_artifact_of_a_reward_stage_in_memory_keeps_its_settings(train, classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "reward")
    settings = {"encoding": {"form": "concatenation", "max_length": 64, "eos": True}, "alpha": 2.0}
    (folder / "reward.json").write_text(json.dumps({"outputs": ["reward"], "reward_mean": 0.5} | settings))
    in_memory = AutoModelForSequenceClassification.from_pretrained(folder)
    source = train(reward=in_memory)[2].reward
    assert (source.mean, source.model.settings.encoding.eos) == (1.0, True)
    assert_same(train(reward=RewardModel.load(folder)), train(reward=in_memory))


def test_a_classifier_without_a_name_needs_its_tokenizer(train, classifier):
    nameless = AutoModelForSequenceClassification.from_pretrained(classifier)
    nameless.name_or_path = nameless.config._name_or_path = ""
    with pytest.raises(UserError, match=r"reward: the GPT2ForSequenceClassification .*; pass reward_proc"):
        train(reward=nameless)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    expected = train(reward=classifier)
    assert_same(expected, train(reward=nameless, reward_processing_classes=tokenizer))
    tokenizer.chat_template = None  # as a base model's
    assert_same(expected, train(reward=nameless, reward_processing_classes=[tokenizer]))


def test_several_rewards_are_their_weighted_sum(train, classifier):
    """Each weight is 1 by default, as in TRL."""

    def total(first, second):
        model = RewardModel.load(classifier)

        def score(prompts, completions, completion_ids, **_):
            scores = model.score(prompts, completions)
            return [first * a + second * b for a, b in zip(brevity(completion_ids), scores, strict=True)]

        return train(reward=score)

    assert_same(total(1.0, 1.0), train(reward=LEFT_OUT, reward_funcs=[brevity, str(classifier)]))
    weighted = train(reward=[brevity, classifier], reward_weights=[0.25, 2])
    assert_same(total(0.25, 2.0), weighted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": []}, "reward: expected .*, found an empty list"),
        ({"reward": [evenness, 3]}, "reward: expected a RewardModel, .*, found a int"),
        ({"reward_funcs": evenness}, "reward and reward_funcs are one argument; pass one of them"),
        ({"model": "a"}, "policy and model are one argument; pass one of them"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: expected one for each of the 1 rewards, found 2"),
        ({"reward_weights": ["1"]}, "reward_weights: expected finite numbers, found '1'"),
        ({"reward_weights": 1.0}, "reward_weights: expected a list of numbers, found a float"),
        ({"reward_processing_classes": []}, "reward_processing_classes: expected one for each of the 1"),
        (
            {"reward_processing_classes": "gpt2"},
            "reward_processing_classes: expected tokenizers, found a str",
        ),
        ({"reward": ""}, "reward: expected a RewardModel, .*, found a str"),
        ({"peft_config": {"r": 4}}, "peft_config: expected a peft.LoraConfig, found a dict"),
        ({"reward": "no/such/folder"}, "no/such/folder: cannot be loaded as a tokenizer"),
        ({"policy": "no/such/folder", "processing_class": None}, "no/such/folder: cannot be loaded as a tok"),
    ],
)
def test_a_wrong_input_is_one_line(arguments, message, train):
    with pytest.raises(UserError, match=message) as error:
        train(**arguments)
    assert "\n" not in str(error.value)


def test_a_language_model_is_no_reward(train, tiny_gpt2):
    with pytest.raises(
        UserError, match=r"reward: expected .*, found a GPT2LMHeadModel; load it as an AutoMod"
    ):
        train(reward=AutoModelForCausalLM.from_pretrained(tiny_gpt2))


# Datasets and arguments


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The rows saved in each way that a path or a name may lead to."""
    root = tmp_path_factory.mktemp("rows")
    PROMPTS.save_to_disk(root / "saved")
    other = Dataset.from_list(ROWS[:1])
    DatasetDict(train=PROMPTS, validation=other, test=PROMPTS).save_to_disk(root / "splits")
    (root / "files").mkdir()
    (root / "files" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "files" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return root


@pytest.mark.parametrize("form", ["list", "saved", "splits", "files", "dict"])
def test_prompts_come_in_any_form(form, train, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"list": ROWS, "dict": DatasetDict(train=PROMPTS, test=PROMPTS.select([0]))}.get(form)
    rows = folders / form if rows is None else rows
    held_out = rows if form in ("splits", "files", "dict") else None
    *trained, trainer = train(train_dataset=rows, eval_dataset=held_out)
    assert_same(train(), trained)
    assert trainer.eval_dataset is None if held_out is None else trainer.eval_dataset.to_list() == ROWS[:1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (PROMPTS.to_iterable_dataset(), "found an IterableDataset; load it without streaming"),
        (["Hello."], "row 0: expected a dict such as {'prompt': …}, found a str"),
        ([], "has no rows"),
        ([{"prompt": "a"}, {"prompt": 3}], "column 'prompt': its values are not of one type that a dataset"),
        ([{"prompt": "a", "x": {1: 2}}], "column 'x': its values are not of one type that a dataset"),
        ([{"prompt": "a", 1: 2}], "column 1: expected text as its name"),
        ([{"prompt": 2**70}], "column 'prompt': its values are not of one type"),
        ([{"prompt": 1}], "row 0: prompt: expected a string or a list of messages, found 1; pass text"),
        ([{"prompt": "a"}, {"x": 1}], "row 1: prompt: expected a string or a list of messages, found None"),
        ([{"prompt": ["a"]}], r"row 0: prompt\[0\]: expected a message, a dict .*, found 'a'"),
        ([{"prompt": [{"role": "user"}]}], r"row 0: prompt\[0\]: expected .*, found None as its content"),
        ("", "expected a datasets.Dataset, a list of dicts, a path or a name, found a str"),
        (DatasetDict(test=PROMPTS), "expected a split train, found test; pass one split"),
        ("no/such/dataset", "no/such/dataset: not readable as a dataset: .*; expected a folder"),
        ({"prompt": ["a"]}, "expected a datasets.Dataset, a list of dicts, a path or a name, found a dict"),
    ],
)
def test_rows_of_another_kind_are_named(rows, message, train):
    with pytest.raises(UserError, match=f"^ppo: train_dataset: .*{message}"):
        train(train_dataset=rows)


def test_a_column_that_the_first_row_lacks_reaches_the_reward(train):
    seen = []

    def reward(prompts, answer, **_):
        seen.extend(zip(prompts, answer, strict=True))
        return [1.0] * len(prompts)

    train(reward=reward, train_dataset=[{"prompt": "Hello."}, {"prompt": "Why?", "answer": 4}])
    assert set(seen) == {("Hello.", None), ("Why?", 4)}


def test_arguments_have_defaults_and_an_output_folder_with_the_name_of_the_policy(
    tiny_gpt2, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trainer = PPOTrainer(tiny_gpt2, evenness, train_dataset=ROWS)
    assert trainer.args.to_dict() == PPOConfig(f"{tiny_gpt2.name}-PPO").to_dict()


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward_model", "has no 'reward_model'; TRL's reward_model is reward here"),
        ("ref_model", "has no 'ref_model'; remove it: the reference is a frozen copy"),
        ("value_model", r"TRL's value_model is critic=Critic\('model', model=…\) here"),
        ("tokenizer", "TRL's tokenizer is processing_class here"),
        ("model_init", "has no 'model_init'; TRL's model_init is policy here"),
        ("data_collator", "has no 'data_collator'; remove it: the trainer makes its own"),
        ("reward_func", "has no 'reward_func'; did you mean 'reward_funcs'?"),
        ("nonsense", "has no 'nonsense'$"),
    ],
)
def test_a_keyword_of_another_trainer_is_named(name, message, train):
    with pytest.raises(UserError, match=f"^ppo: PPOTrainer .*{message}"):
        train(**{name: None})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beta", "PPOConfig has no 'beta'; TRL's beta is kl_coef here"),
        ("total_episodes", "TRL's total_episodes is num_rollouts, times the responses of a rollout, here"),
        ("num_generations", "PPOConfig has no 'num_generations'; remove it: a critic replaces"),
        ("learnin_rate", "PPOConfig has no 'learnin_rate'; did you mean 'learning_rate'?"),
    ],
)
def test_a_name_of_another_config_is_named(name, message):
    with pytest.raises(TypeError, match=message):
        PPOConfig("out", **{name: 1})


def test_no_name_of_another_config_is_one_of_ours():
    assert not CONFIG_NAMES.keys() & PPOConfig.__dataclass_fields__.keys()
