"""Functions that a config names: TRL's own on both forms of prompts, factories, and what is wrong."""

import functools
import json

import pytest
from datasets import Dataset

from pipeline import config
from pipeline.config import FunctionSection, Reward
from pipeline.config.loading import validate
from pipeline.errors import UserError
from pipeline.evaluate import stage as evaluate
from pipeline.ppo import stage as ppo
from pipeline.reward.calls import call_reward_function
from pipeline.reward.importing import open_function

OVERLONG = {"source": "trl.rewards:get_soft_overlong_punishment"}
ARGUMENTS = {"max_completion_len": 4, "soft_punish_cache": 2}
PROMPTS = {"text": "What is 7+5?", "messages": [{"role": "user", "content": "What is 7+5?"}]}


def call(function, texts, prompt="q", **columns):
    ids = [[1] * len(text) for text in texts]
    rows = len(texts)
    return call_reward_function(function, [prompt] * rows, texts, ids, [True] * rows, columns)


def open_source(source, arguments=None):
    return open_function("reward", Reward(source=source, arguments=arguments))


def mixed(scale, offset=0.0):
    return lambda prompts, **_: [scale + offset] * len(prompts)


def broken(scale):
    return 1 / scale


def number(scale):
    return scale


made = functools.partial(mixed, scale=1.0)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_functions_of_trl_work_as_they_are(prompt):
    texts = [r"It is \boxed{12}.", r"It is \boxed{13}.", "It is 12."]
    accuracy = open_source("trl.rewards:accuracy_reward")
    assert call(accuracy, texts, prompt, solution=["12"] * 3) == [1.0, 0.0, 0.0]
    assert call(accuracy, texts[:1], prompt, solution=["?"]) == [0.0]  # None: no solution to compare with
    cosine = open_source("trl.rewards:get_cosine_scaled_reward", {"max_len": 34})
    # 17 of 34 tokens: the middle of 0.5 and 1, and of -0.5 and -1
    assert call(cosine, texts[:2], prompt, solution=["12"] * 2) == pytest.approx([0.75, -0.75])
    reasoning = open_source("trl.rewards:reasoning_accuracy_reward")
    thought = [r"<think>7+5</think> \boxed{12}", r"\boxed{12}"]
    assert call(reasoning, thought, prompt, solution=["12"] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_functions_of_trl_that_need_no_package_work_as_they_are(prompt):
    form = open_source("trl.rewards:think_format_reward")
    assert call(form, ["<think>\n7+5\n</think>\n12", "12"], prompt) == [1.0, 0.0]
    overlong = open_source(OVERLONG["source"], ARGUMENTS)
    assert call(overlong, ["ab", "abc", "abcd", "abcde"], prompt) == [0.0, -0.5, -1.0, -1.0]
    repetition = open_source("trl.rewards:get_repetition_penalty_reward", {})
    assert call(repetition, ["ab", "abcdef"], prompt) == [0.0, -0.75]  # one trigram of four


def test_a_factory_makes_the_function():
    assert call(open_source(f"{__name__}:mixed", {"scale": 2.0, "offset": 0.5}), ["a"]) == [2.5]
    assert call(open_source(f"{__name__}:made", {"offset": 0.5}), ["a"]) == [1.5]


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("mixed", {"scal": 1}, "arguments: missing a required argument: 'scale'; it takes scale, offset"),
        (
            "mixed",
            {"scale": 1, "of": 2},
            "arguments: got an unexpected keyword argument 'of'; it takes scale, o",
        ),
        (
            "broken",
            {"scale": 0},
            "arguments: it failed with ZeroDivisionError: division by zero, at .*, line",
        ),
        (
            "number",
            {"scale": 1},
            "arguments: with them it returned a int, expected a reward function; remove",
        ),
        ("nothing", None, f"module '{__name__}' has no attribute 'nothing'; expected module:function"),
        ("PROMPTS", None, "is a dict, expected a function"),
    ],
)
def test_a_function_that_cannot_be_opened_is_one_line(source, arguments, message):
    with pytest.raises(UserError, match=rf"^reward \({__name__}:{source}\): {message}"):
        open_source(f"{__name__}:{source}", arguments)


def test_a_factory_of_trl_without_its_arguments_is_told_before_training():
    expected = r"^gold \(trl.*punishment\): is no reward function: .*; if it makes one, give its arguments: "
    with pytest.raises(UserError, match=expected):
        open_function("gold", FunctionSection(**OVERLONG))


def test_a_reward_that_cannot_be_opened_is_named_among_several(tiny_feedback, tiny_gpt2, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    stage = {"run": "t", "records": str(tiny_feedback), "policy": str(tiny_gpt2)}
    with pytest.raises(UserError, match=rf"^reward\[1\] \({nowhere}\): "):
        ppo.open_all_inputs(config.PPOStage(reward=["m:f", nowhere], **stage))
    training = {"eval_strategy": "steps"}
    scored = {"reward": "m:f", "evaluation": {"scorer": nowhere}, "training": training}
    with pytest.raises(UserError, match=rf"^evaluation\.scorer \({nowhere}\): "):
        ppo.open_all_inputs(config.PPOStage(**scored, **stage))


def test_a_package_that_trl_lacks_is_told_before_training(monkeypatch):
    from trl.rewards import accuracy_rewards

    monkeypatch.setattr(accuracy_rewards, "is_math_verify_available", lambda: False)
    function = "trl.rewards:accuracy_reward"
    told = r"\(trl.rewards:accuracy_reward\): Please install .*; run pip install 'rlhf-stage\[math\]'$"
    with pytest.raises(UserError, match=f"^reward {told}"):
        ppo.check(config.PPOStage(run="t", reward=function))
    training = {"eval_strategy": "steps"}
    with pytest.raises(UserError, match=rf"^evaluation\.scorer {told}"):
        ppo.check(config.PPOStage(run="t", evaluation={"scorer": function}, training=training))
    with pytest.raises(UserError, match=rf"^measures\.right {told}"):
        evaluate.check(config.EvaluateStage(run="t", measures={"right": function}))


def test_a_function_without_arguments_is_published_as_its_source():
    named = {"gold": "m:f", "reward": ["m:f"]}
    resolved = config.PPOStage(run="t", **named).resolved()
    assert resolved["gold"] == "m:f"
    assert "arguments" not in resolved["reward"][0]  # as artifacts have it that are older than the key
    section = {"source": "m:f", "arguments": {"n": 1}}
    stage = config.EvaluateStage(
        run="t", gold=section, well_formed=section, measures={"x": section, "y": "m:g"}
    )
    resolved = stage.resolved()
    assert (resolved["gold"], resolved["well_formed"]) == (section, section)
    assert resolved["measures"] == {"x": section, "y": "m:g"}
    assert config.EvaluateStage(**resolved) == stage
    stage = config.PPOStage(run="t", reward=[section, "m:g"])
    assert stage.resolved()["reward"][0]["arguments"] == {"n": 1}
    assert config.PPOStage(**stage.resolved()) == stage


@pytest.mark.parametrize(
    ("stage", "values", "message"),
    [
        (
            config.PPOStage,
            {"reward": {"source": "runs/x", "arguments": {}}},
            "reward.0: 'arguments' is only read w",
        ),
        (
            config.PPOStage,
            {"gold": {"source": "m:f", "argument": {}}},
            "'gold.argument'; did you mean 'arguments'",
        ),
        (config.EvaluateStage, {"measures": {"x": {"arguments": {}}}}, "'measures.x.source' is missing"),
        (config.EvaluateStage, {"gold": {"source": "m:f", "arguments": [1]}}, "gold.arguments="),
        (config.EvaluateStage, {"measures": "m:f"}, "measures='m:f'"),
    ],
)
def test_a_wrong_section_is_one_line(stage, values, message):
    with pytest.raises(UserError, match=message):
        validate(stage, {"run": "t"} | values, "x.yaml")


def test_ppo_and_its_evaluations_take_trl_functions_on_text_and_messages(make_stage):
    for prompt in PROMPTS.values():
        folder, log = make_stage(prompt)
        entry = next(entry for entry in log if "eval_scorer_reward" in entry)
        # no response of 4 tokens at most reasons; the reward of 3 or 4 tokens is negative
        assert entry["eval_scorer_reward"] == entry["eval_gold_reward"] == 0.0
        assert -1.0 <= entry["eval_reward"] < 0.0
        written = (folder / "config.yaml").read_text()
        assert "max_completion_len: 4" in written


@pytest.fixture
def make_stage(tiny_gpt2, tmp_path):
    """Run PPO on rows with one prompt; return its folder and its log."""

    def run(prompt):
        rows = Dataset.from_list([{"prompt": prompt, "answer": "12"}] * 4)
        records = tmp_path / f"{type(prompt).__name__}-records"
        rows.save_to_disk(str(records))
        form = "trl.rewards:think_format_reward"
        training = {
            "num_rollouts": 1,
            "per_device_train_batch_size": 4,
            "response_tokens": 4,
        }
        training |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
        stage = config.PPOStage(
            run=type(prompt).__name__,
            runs=str(tmp_path),
            records=str(records),
            policy=str(tiny_gpt2),
            reward=OVERLONG | {"arguments": ARGUMENTS},
            gold={"source": f"{__name__}:mixed", "arguments": {"scale": 0.0}},
            evaluation={"scorer": form},
            training=training,
        )
        folder = ppo.run(stage)
        return folder, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    return run
