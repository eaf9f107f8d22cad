"""Reward models on vLLM itself: what its servers send scores as the local model does.

Each model is made from scratch, with heads of 32. What a server is sent depends on `reads` alone, so one
server tests every encoding of its weights.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from pipeline import RewardModel, config
from pipeline.config import Reward
from pipeline.errors import UserError
from pipeline.models.loading import head_config
from pipeline.models.scratch import new_classifier, new_policy
from pipeline.ppo import stage as ppo
from pipeline.reward.encoding import Encoding
from pipeline.reward.functions import load_reward, require_reward
from pipeline.reward.remote import RemoteRewardModel
from pipeline.reward.settings import RewardSettings
from tests.engines.conftest import new_llama, serve

pytestmark = pytest.mark.engines
SIZE = {"layers": 2, "width": 64, "heads": 2, "vocabulary": 700, "positions": 128}
PROMPTS = [
    "What is the capital of France?",
    [{"role": "user", "content": "Hi."}, {"role": "user", "content": "Who?"}],
    "",
    "Name a fruit.",
]
RESPONSES = [
    "Paris.",
    "You fool.",
    "The answer\nis no.",
    " An apple, I think;\nbut a pear will do. " * 9,
]  # the last is over max_length
CHAT = Encoding(max_length=60)
TEXT = Encoding(form="concatenation", max_length=60)
PAIR = Encoding(form="pair", eos=False, max_length=100)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, demo_texts):
    """Random checkpoints without a head, by architecture."""
    models = {}
    for name in ("bert", "roberta"):
        size, head = config.Scratch(architecture=name, **SIZE), head_config(["LABEL_0"], "regression")
        classifier, tokenizer = new_classifier(demo_texts, size, "\n", head)
        models[name] = classifier.base_model, tokenizer
    _, tokenizer = models["gpt2"] = new_policy(demo_texts, config.Scratch(architecture="gpt2", **SIZE), "\n")
    models["llama"] = new_llama(tokenizer), tokenizer
    folders = {}
    for name, parts in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        for part in parts:
            part.save_pretrained(folders[name])
    return folders


def save_reward(base, folder, settings, token_types=False):
    """Write a reward model of the architecture of `base`. Its random weights depend on the head alone.

    They are large, so that another input is another score.
    """
    torch.manual_seed(0)
    model = settings.auto_class.from_pretrained(base, **settings.head)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    tokenizer = AutoTokenizer.from_pretrained(base, model_input_names=names)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(folder)
    return folder


def open_served(url, folder):
    reward = Reward(source=url, reads=str(folder))
    return load_reward(reward, require_reward(reward, "rlhf reward"))


@contextmanager
def served(base, folder, *readings):
    """Serve a reward model; yield the URL and a folder of the same weights for each way to read them."""
    folders = [save_reward(base, folder / str(number), settings) for number, settings in enumerate(readings)]
    with serve(folders[0], "--runner", "pooling") as url:
        yield url, folders


def assert_equal_scores(url, folders):
    for folder in folders:
        local = RewardModel.load(str(folder)).score(PROMPTS, RESPONSES)
        assert open_served(url, folder).score(PROMPTS, RESPONSES) == pytest.approx(local, abs=1e-5)
        assert max(local) - min(local) > 1e-3


def test_a_decoder_scores_chats_and_texts_and_rewards_ppo(bases, tiny_feedback, tmp_path, monkeypatch):
    readings = [RewardSettings(encoding=CHAT), RewardSettings(encoding=TEXT)]
    readings.append(RewardSettings(objective="regression", encoding=CHAT, alpha=2.5, sign=-1))
    with served(bases["gpt2"], tmp_path, *readings) as (url, folders):
        assert_equal_scores(url, folders)
        scored, compute = [], RemoteRewardModel._compute

        def record(model, prompts, responses, *more):
            scored.append((prompts, responses, compute(model, prompts, responses, *more)))
            return scored[-1][-1]

        monkeypatch.setattr(RemoteRewardModel, "_compute", record)
        ppo.run(ppo_stage(bases["gpt2"], tiny_feedback, tmp_path, {"source": url, "reads": str(folders[0])}))
    local = RewardModel.load(str(folders[0]))
    assert [len(logits) for _, _, logits in scored][:2] == [4, 4]  # of each rollout; then an evaluation
    for prompts, responses, logits in scored:
        assert logits.flatten().tolist() == pytest.approx(local.score(prompts, responses), abs=1e-5)


def ppo_stage(policy, records, runs, reward):
    training = {
        "num_rollouts": 2,
        "per_device_train_batch_size": 4,
        "num_mini_batches": 1,
        "response_tokens": 8,
        "eval_strategy": "no",
        "report_to": "none",
    }
    return config.PPOStage(
        run="t", runs=str(runs), policy=str(policy), records=str(records), training=training, reward=reward
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_of_a_classifier_with_several_labels_raw_logits_come_back(bases, tmp_path, multi_label):
    common = RewardSettings("classification", ["no", "yes", "maybe"], CHAT, logit=1, multi_label=multi_label)
    readings = [replace(common, output=output) for output in ("logit", "log_odds", "probability")]
    with served(bases["gpt2"], tmp_path, *readings) as (url, folders):
        assert_equal_scores(url, folders)


def test_an_ensemble_scores_by_all_its_heads(bases, tmp_path):
    ensemble = RewardSettings(
        "pairwise", ["a", "b", "c"], CHAT, output="ensemble", uncertainty_penalty=0.5, alpha=0.5
    )
    with served(bases["gpt2"], tmp_path, ensemble) as (url, folders):
        assert_equal_scores(url, folders)


def test_a_stepwise_model_scores_each_step(bases, tmp_path):
    stepwise = RewardSettings("stepwise", ["wrong", "right"], CHAT, logit=1, output="probability")
    with served(bases["llama"], tmp_path, stepwise) as (url, folders):
        local, remote = RewardModel.load(str(folders[0])), open_served(url, folders[0])
        theirs, ours = (model.score_steps(PROMPTS, RESPONSES) for model in (remote, local))
        assert [len(row) for row in theirs] == [len(row) for row in ours]
        for row, expected in zip(theirs, ours, strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
        assert_equal_scores(url, folders)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_an_encoder_scores_pairs_and_texts_without_token_types(bases, tmp_path, architecture):
    readings = [RewardSettings(encoding=PAIR), RewardSettings(encoding=replace(TEXT, eos=False))]
    with served(bases[architecture], tmp_path, *readings) as (url, folders):
        assert_equal_scores(url, folders)
        if architecture == "bert":
            typed = save_reward(bases["bert"], tmp_path / "typed", readings[0], token_types=True)
            with pytest.raises(UserError, match=r"reads token types, which vLLM does not accept"):
                open_served(url, typed)
