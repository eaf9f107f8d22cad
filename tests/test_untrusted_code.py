"""Code that comes with a model never runs, and nothing asks whether to run it, unless the user said so."""

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import RewardModel, cli
from pipeline.errors import UserError
from pipeline.models.chat import prompt_ids
from pipeline.models.loading import load_classifier, load_policy, load_sampler, load_tokenizer

ROOT = Path(__file__).parent.parent
NEEDS_CODE = "needs Python code that comes with it, which is not run; .*set trust_remote_code: true"
LOADERS = ("from_pretrained", "from_config")
CODE = """from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import {names}
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnClassifier(LlamaForSequenceClassification):
    config_class = OwnConfig
"""
NAMES = "LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast"


@pytest.fixture
def foreign(tiny_llama, tmp_path, monkeypatch) -> Path:
    """A model whose config, tokenizer and weights all need its own code, which writes the file `ran`."""

    def refuse(*_):
        pytest.fail("asked on the terminal")

    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_llama, tmp_path / "foreign")
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran"), names=NAMES))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
            "AutoModelForSequenceClassification": "own.OwnClassifier",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return folder


@pytest.fixture
def foreign_adapter(foreign, tmp_path) -> Path:
    """A LoRA adapter whose base needs its own code."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(foreign)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def loads(folder, adapter, tokenizer):
    """Return every way to load a model in Python, by name."""
    return {
        "tokenizer": lambda: load_tokenizer(str(folder)),
        "tokenizer, undecided": lambda: load_tokenizer(str(folder), trust_remote_code=None),
        "tokenizer of a base": lambda: load_tokenizer(str(adapter)),
        "policy": lambda: load_policy(str(folder), tokenizer),
        "policy, undecided": lambda: load_policy(str(folder), tokenizer, trust_remote_code=None),
        "base of an adapter": lambda: load_policy(str(adapter), tokenizer),
        "sampler": lambda: load_sampler(str(folder)),
        "classifier": lambda: load_classifier(str(folder), tokenizer),
        "quantized classifier": lambda: load_classifier(str(folder), tokenizer, quantization="4bit"),
        "reward": lambda: RewardModel.load(folder),
        "reward, undecided": lambda: RewardModel.load(folder, trust_remote_code=None),
    }


def test_no_loader_runs_it_or_asks(foreign, foreign_adapter, tiny_tokenizer, tmp_path):
    for name, load in loads(foreign, foreign_adapter, tiny_tokenizer).items():
        with pytest.raises(UserError, match=f"^{foreign}: {NEEDS_CODE}"):
            print(name, load())
    assert not (tmp_path / "ran").exists()


def test_the_user_may_trust_it(foreign, tmp_path):
    tokenizer = load_tokenizer(str(foreign), trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    assert type(load_policy(str(foreign), tokenizer, trust_remote_code=True)).__name__ == "OwnModel"
    assert (tmp_path / "ran").read_text() == "ran"


def length(prompts, completions, **_):
    return list(map(len, completions))


def commands(folder, policy):
    """Return the commands that read a model, by name; each has the foreign one in another place."""
    files = {name: ["--input", name, "--output", "out.jsonl"] for name in ("rows.jsonl", "prompts.jsonl")}
    ppo = ["ppo", "--config", "stage.yaml", f"policy={folder}", f"reward={__name__}:length"]
    small = ["prompts=1", "best_of=2", "samples_per_prompt=1", "response_tokens=2"]
    evaluate = ["evaluate", "--config", "stage.yaml", *small]
    return {
        "sft": ["sft", "--config", "stage.yaml", f"model={folder}"],
        "reward": ["reward", "--config", "stage.yaml", f"model={folder}"],
        "ppo": ppo,
        "ppo's reward": [*ppo, f"policy={policy}", f"reward={folder}"],
        "rloo": [*ppo, "algorithm=rloo"],
        "evaluate's reward": [*evaluate, f"sft={policy}", f"ppo={policy}", f"reward={folder}"],
        "doctor on sft": ["doctor", "--config", "sft/sft.yaml", f"sft.model={folder}"],
        "doctor on reward": ["doctor", "--config", "reward/reward.yaml", f"reward.model={folder}"],
        "score": ["score", "--reward", str(folder), *files["rows.jsonl"]],
        "compare": ["compare", "--reward", str(folder), "Hi.", "A.", "B."],
        "best-of-n": [
            *("best-of-n", "--reward", str(folder), "--policy", str(policy), *files["prompts.jsonl"]),
        ],
        "generate": ["generate", "--policy", str(folder), *files["prompts.jsonl"]],
    }


def test_no_command_runs_it_or_asks(foreign, tiny_feedback, tiny_gpt2, tmp_path, capfd):
    settings = {"run": "t", "runs": "out", "records": str(tiny_feedback)}
    for name in ("stage.yaml", "sft/sft.yaml", "reward/reward.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(settings))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi.", "response": "Yes."}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi."}\n')
    for name, argv in commands(foreign, tiny_gpt2).items():
        code, told = cli.main(argv), capfd.readouterr()
        assert code == 2, (name, told)
        assert "set trust_remote_code: true" in told.out + told.err, (name, told)
        assert "Traceback" not in told.err, name
    for argv in (["show", str(foreign)], ["push", str(foreign), "--to", "org/name"]):
        assert cli.main(argv) in (0, 2)
    assert not (tmp_path / "ran").exists()


class Spring:
    """A pickle of it writes the file `ran` when it is read."""

    def __reduce__(self):
        return Path("ran").write_text, ("ran",)


def test_pickled_weights_run_nothing(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Spring()}, model / "pytorch_model.bin")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tiny_llama)}
    (adapter / "adapter_config.json").write_text(json.dumps(lora | {"target_modules": ["q_proj"]}))
    torch.save({"weight": Spring()}, adapter / "adapter_model.bin")
    for folder in (model, adapter):
        with pytest.raises(UserError, match=f"^{folder}: its weights are a pickle of more than tensors"):
            load_policy(str(folder), tiny_tokenizer)
    with pytest.raises(UserError, match=f"^{model}: its weights are a pickle of more than tensors"):
        load_classifier(str(model), tiny_tokenizer, head={})
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_is_rendered_in_a_sandbox(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0]['content'] }}"
    (folder / "chat_template.jinja").write_text(escape)
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(UserError, match="access to attribute '__class__' of 'str' object is unsafe"):
        prompt_ids(tokenizer, "Hi.")


def test_each_call_of_a_loader_says_whether_code_is_trusted():
    """transformers asks wherever nothing is said: each call names the option, or passes options on."""
    silent = []
    files = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = ast.unparse(node.func.value)
            if node.func.attr in LOADERS and owner.startswith("Auto"):
                names = [keyword.arg for keyword in node.keywords]
                if "trust_remote_code" not in names and None not in names:
                    silent.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert silent == []
