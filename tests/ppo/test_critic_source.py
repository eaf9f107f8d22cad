"""The `critic:` section: a critic is published, started from again, and refused where it does not fit."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pipeline import config
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.ppo import stage as ppo
from pipeline.reward import stage as reward
from pipeline.training.arguments import build_arguments

TRAINING = {
    "num_rollouts": 2,
    "num_ppo_epochs": 1,
    "per_device_train_batch_size": 4,
    "response_tokens": 6,
    "learning_rate": 1e-2,
    "eval_strategy": "no",
}
KINDS = ["trunk", "adapter", "model"]


@pytest.fixture(scope="module")
def stage(tiny_records, tiny_llama):
    """Returns a function of (folder, critic section, other keys): the config of a stage."""

    def make(folder, critic, **more):
        given = {"policy": str(tiny_llama), "records": str(tiny_records), "lora": {"r": 2}}
        given |= {"reward": "pipeline.prepare.demo:gold_reward", "training": TRAINING}
        return config.PPOStage(run="t", runs=str(folder), critic=critic, **given | more)

    return make


@pytest.fixture(scope="module")
def published(stage, tmp_path_factory):
    """By the place of the critic: the artifact of a stage that trained it."""
    return {on: ppo.run(stage(tmp_path_factory.mktemp(on), {"on": on})) for on in KINDS}


def started(given, folder):
    """The trainer of a stage, before its first rollout."""
    args = build_arguments(given, ppo.arguments_class(given), folder)
    return ppo.build_trainer(given, ppo.open_all_inputs(given), args)


def plain_values(folder, on, base, ids):
    """What PEFT and transformers compute from the files of a critic, and its value head on that."""
    if on == "model":
        trunk = AutoModel.from_pretrained(folder / "critic")
    else:
        adapter = folder / "critic" if on == "adapter" else folder
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        trunk = model.get_base_model().model
    head = load_file(folder / "critic" / "value_head.safetensors")
    with torch.no_grad():
        return trunk(ids).last_hidden_state @ head["weight"].T + head["bias"]


@pytest.mark.parametrize("on", KINDS)
def test_a_published_critic_is_where_the_next_run_starts(on, published, stage, tiny_llama, tmp_path):
    folder = published[on]
    saved = json.loads((folder / "critic/critic.json").read_text())
    assert (saved["on"], saved["width"]) == (on, 64)
    expected = plain_values(folder, on, tiny_llama, torch.arange(5, 13)[None])[0, 3:7, 0]
    assert expected.std() > 1e-4

    # From the adapter that was trained, since a critic on the trunk reads the policy's states.
    given = stage(tmp_path, {"on": on, "source": str(folder)}, policy=str(folder), lora={})
    trainer = started(given, tmp_path)
    query, response = torch.arange(5, 9)[None], torch.arange(9, 13)[None]
    with torch.no_grad():
        found = trainer.actor(query, torch.ones_like(query), response, torch.ones_like(response), 1.0).values
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on", KINDS)
def test_the_manifest_and_critic_json_say_where_it_came_from(on, published, stage, tmp_path, capsys):
    source = published[on] / "critic"
    folder = ppo.run(stage(tmp_path, {"on": on, "source": str(source)}))
    manifest = json.loads((folder / "manifest.json").read_text())
    origin = json.loads((folder / "critic/critic.json").read_text())["source"]
    assert origin == {"path": str(source), "identity": manifest["inputs"]["critic"]["identity"]}
    assert manifest["inputs"]["critic"]["path"] == str(source)
    assert json.loads((folder / "best/critic/critic.json").read_text())["source"] == origin
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"\ncritic\n  on    {on}\n  from  {source}  {origin['identity']}\n" in shown


def test_a_model_starts_from_a_policy_a_reward_model_or_the_trunk_of_a_critic(
    published, stage, tiny_records, tiny_llama, tmp_path
):
    common = {"run": "r", "runs": str(tmp_path), "records": str(tiny_records), "max_length": 96}
    learned = {
        form: reward.run(
            config.RewardStage(
                model=str(tiny_llama), lora=lora, training={"max_steps": 2}, **common | {"run": form}
            )
        )
        for form, lora in {"full": None, "lora": {"r": 2}}.items()
    }
    for source in (None, str(tiny_llama), *map(str, learned.values()), str(published["trunk"])):
        actor = started(stage(tmp_path, {"on": "model", "source": source}), tmp_path).actor
        key = "layers.0.self_attn.q_proj.weight"
        found = actor.critic.get_parameter(key)
        files = (
            load_file(f"{source or tiny_llama}/model.safetensors")
            if source != str(published["trunk"])
            else {}
        )
        if files:
            assert torch.equal(found, files[f"model.{key}"])
        assert bool(actor.value_head.weight.any()) == (source == str(published["trunk"]))


def test_a_model_starts_from_adapters_merged_into_their_base(
    published, stage, tiny_records, tiny_llama, tmp_path
):
    """The policy's own adapter, and that of a reward model on a quantized base."""
    common = {"run": "r", "runs": str(tmp_path), "records": str(tiny_records), "max_length": 96}
    size = {"lora": {"r": 2}, "quantization": "8bit", "training": {"max_steps": 2, "learning_rate": 1e-2}}
    learned = reward.run(config.RewardStage(model=str(tiny_llama), **size, **common))
    assert (learned / "adapter_config.json").is_file()
    key = "layers.0.self_attn.q_proj"
    base = load_file(tiny_llama / "model.safetensors")[f"model.{key}.weight"]
    for folder, given in (
        (published["trunk"], {"policy": str(published["trunk"]), "lora": {}, "critic": {"on": "model"}}),
        (learned, {"critic": {"on": "model", "source": str(learned)}}),
    ):
        actor = started(stage(tmp_path, given.pop("critic"), **given), tmp_path).actor
        adapter = load_file(folder / "adapter_model.safetensors")
        down, up = (adapter[f"base_model.model.model.{key}.lora_{name}.weight"] for name in "AB")
        scale = json.loads((folder / "adapter_config.json").read_text())
        expected = base + up @ down * scale["lora_alpha"] / scale["r"]
        assert float((expected - base).abs().max()) > 1e-4
        torch.testing.assert_close(actor.critic.get_parameter(f"{key}.weight"), expected)


def test_merged_policies_keep_the_critic_as_it_was(published, stage, tiny_llama, tmp_path):
    folder = ppo.run(stage(tmp_path, {"on": "adapter"}, merge=True))
    for name in ("critic/adapter_model.safetensors", "critic/value_head.safetensors"):
        assert (folder / name).read_bytes() == (published["adapter"] / name).read_bytes()
    assert (folder / "model.safetensors").is_file()
    given = stage(tmp_path / "next", {"on": "adapter", "source": str(folder)})
    assert started(given, tmp_path).actor.critic_on == "adapter"
    with pytest.raises(UserError, match="its adapter is for another base than that of"):
        ppo.open_all_inputs(given.model_copy(update={"policy": str(folder)}))


def test_a_critic_in_an_artifact_that_was_altered_is_refused(published, stage, tmp_path):
    folder = shutil.copytree(published["trunk"], tmp_path / "altered")
    save_file(
        {"weight": torch.zeros(1, 64), "bias": torch.zeros(1)}, folder / "critic/value_head.safetensors"
    )
    for source in (folder, folder / "critic"):
        with pytest.raises(UserError, match=r"critic/value_head.safetensors was altered"):
            ppo.open_all_inputs(stage(tmp_path, {"source": str(source)}))


def test_an_artifact_of_before_opens_on_the_trunk(published, stage, tmp_path):
    old = shutil.copytree(published["trunk"], tmp_path / "old")
    (old / "manifest.json").unlink()
    (old / "config.yaml").unlink()
    shutil.move(old / "critic/value_head.safetensors", old / "value_head.safetensors")
    shutil.rmtree(old / "critic")
    actor = started(stage(tmp_path, {"source": str(old)}), tmp_path).actor
    expected = load_file(old / "value_head.safetensors")["weight"]
    assert torch.equal(actor.value_head.weight, expected)
    with pytest.raises(UserError, match=r"is a critic of critic.on: trunk, but critic.on is adapter"):
        ppo.run(stage(tmp_path, {"on": "adapter", "source": str(old)}))


def altered(folder, target, change):
    """A copy of a critic's folder, with its critic.json or a file of tensors changed."""
    copy = shutil.copytree(folder / "critic", target)
    for file in copy.iterdir():
        if file.name == "critic.json":
            file.write_text(json.dumps(change(file.name, json.loads(file.read_text()))))
        elif file.suffix == ".safetensors":
            save_file(change(file.name, load_file(file)), file, metadata={"format": "pt"})
    return copy


def set_first(name, wanted, value):
    def change(file, content):
        if file == wanted:
            key = next(iter(content)) if name is None else name
            content[key] = value(content[key]) if callable(value) else value
        return content

    return change


NAN = lambda tensor: tensor * torch.nan  # noqa: E731
WIDER = lambda tensor: torch.zeros(1, 80)  # noqa: E731


@pytest.mark.parametrize(
    ("on", "change", "message"),
    [
        ("trunk", set_first("weight", "value_head.safetensors", NAN), "its weight weight is not finite"),
        (
            "trunk",
            set_first("weight", "value_head.safetensors", WIDER),
            "states of 80 numbers, and .* have 64",
        ),
        ("trunk", set_first("vocabulary", "critic.json", "0" * 64), "its vocabulary is another than that of"),
        ("trunk", set_first("on", "critic.json", "nowhere"), "critic.json: on: Input should be 'trunk'"),
        ("adapter", set_first("base", "critic.json", "0" * 64), "its adapter is for another base than that"),
        ("adapter", set_first(None, "adapter_model.safetensors", NAN), "its weight .* is not finite"),
        ("model", set_first(None, "model.safetensors", NAN), "its weight .* is not finite"),
    ],
)
def test_a_critic_that_does_not_fit_is_refused(on, change, message, published, stage, tmp_path):
    source = altered(published[on], tmp_path / "source", change)
    with pytest.raises(UserError, match=message):
        started(stage(tmp_path, {"on": on, "source": str(source)}), tmp_path)


@pytest.mark.parametrize("on", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_it_is_opened_where_it_was_saved(on, saved, published, stage, tmp_path):
    given = stage(tmp_path, {"on": on, "source": str(published[saved] / "critic")})
    if on == saved:
        assert ppo.open_all_inputs(given)["critic"].path == published[saved] / "critic"
        return
    with pytest.raises(UserError, match=f"is a critic of critic.on: {saved}, but critic.on is {on}; set"):
        ppo.open_all_inputs(given)


@pytest.mark.parametrize(
    ("on", "file"),
    [
        ("trunk", "value_head.safetensors"),
        ("adapter", "adapter_model.safetensors"),
        ("adapter", "adapter_config.json"),
        ("model", "model.safetensors"),
        ("model", "config.json"),
    ],
)
def test_a_file_that_is_missing_is_named(on, file, published, stage, tmp_path):
    source = shutil.copytree(published[on] / "critic", tmp_path / "source")
    (source / file).unlink()
    with pytest.raises(UserError, match=file.partition(".")[0]):
        started(stage(tmp_path, {"on": on, "source": str(source)}), tmp_path)


def test_a_model_of_another_vocabulary_and_a_folder_without_critic_are_refused(stage, tiny_llama, tmp_path):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tokenizer = load_tokenizer(str(other))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    assert len(AutoTokenizer.from_pretrained(other)) == len(tokenizer)
    with pytest.raises(UserError, match="its vocabulary is another than that of"):
        ppo.run(stage(tmp_path, {"on": "model", "source": str(other)}))
    save_file({"weight": torch.ones(1, 64), "bias": torch.ones(1)}, other / "value_head.safetensors")
    with pytest.raises(UserError, match="its vocabulary is another than that of"):  # as older artifacts were
        ppo.run(stage(tmp_path, {"on": "trunk", "source": str(other)}))
    with pytest.raises(
        UserError, match="has no critic; expected the artifact of a ppo stage, or its critic/"
    ):
        ppo.run(stage(tmp_path, {"on": "trunk", "source": str(tiny_llama)}))
    with pytest.raises(UserError, match="nowhere: does not exist"):
        ppo.run(stage(tmp_path, {"source": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize(
    ("critic", "more", "message"),
    [
        ({"on": "adapter"}, {"lora": None}, "critic.on: adapter needs a policy that is trained with LoRA"),
        ({"on": "model", "lora": {}}, {}, "critic.lora is only read with critic.on: adapter"),
        ({"on": "adapter", "lora": {}, "source": "x"}, {}, "critic.lora is not read with a critic.source"),
        (
            {"on": "model"},
            {"algorithm": "rloo", "training": {}},
            "only read with algorithm: ppo; rloo has no",
        ),
        (
            {"source": "x"},
            {"training": {"value_init": "reward"}},
            "value_init: reward is only for a critic on",
        ),
        ({"learning_rate": 0}, {}, "greater than 0"),
    ],
)
def test_sections_that_contradict_are_refused(critic, more, message, stage, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage(tmp_path, critic, **more)


def test_its_lora_is_checked_as_the_policys_is(stage, tmp_path):
    with pytest.raises(UserError, match=r"ppo: critic.lora.rank: LoraConfig has no such key"):
        ppo.check(stage(tmp_path, {"on": "adapter", "lora": {"rank": 4}}))
    with pytest.raises(UserError, match=r"the critic's adapter has bias=all|critic.lora.bias=all"):
        ppo.check(stage(tmp_path, {"on": "adapter", "lora": {"bias": "all"}}))
    given = stage(tmp_path, {"on": "adapter", "lora": {"r": 3}})
    actor = started(given, tmp_path).actor
    assert actor.policy.peft_config["critic"].r == 3
    assert actor.policy.peft_config["default"].r == 2


def test_the_section_left_out_leaves_the_config_as_it_was(stage, tmp_path):
    assert "critic" not in stage(tmp_path, {}).resolved()
    assert stage(tmp_path, {"on": "model"}).resolved()["critic"]["on"] == "model"
