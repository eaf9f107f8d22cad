"""Every command of the README parses, and its three lines of data are enough. (Its Python runs in test_pipeline.)"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipeline import config
from pipeline.cli import main
from pipeline.cli.parser import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines() if line]
TOOLS = ("score", "compare", "best-of-n", "doctor", "push")
INLINE = re.findall(r"`(make [^`]+)`", README)


def argv_of(command):
    """What the command hands to `pipeline.cli`."""
    words = shlex.split(command)
    return words[words.index("pipeline") + 1 :] if words[0] == "accelerate" else words[1:]


STAGES = [command for command in COMMANDS if command.split()[0] in ("rlhf", "accelerate") and command.split()[1] not in TOOLS]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[1] in TOOLS])
def test_the_tools_are_understood(command):
    assert parse(argv_of(command)).command == command.split()[1]


@pytest.mark.parametrize("command", STAGES)
def test_the_stages_are_understood(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*argv_of(command), "--dry-run"]) == 0
    assert "would write runs/" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS + INLINE if c.startswith("make ") and "/" not in c])
def test_the_make_targets_exist(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_a_bare_make_lists_the_targets():
    listed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in ("setup", "run", "prepare|sft|reward|ppo|evaluate", "test", "test-gpu", "lint", "models/smollm2", "clean"):
        assert re.search(rf"^{re.escape(target)} ", listed, re.M), target


def test_three_lines_are_enough_to_prepare(tmp_path):
    from pipeline.prepare import stage as prepare

    rows = next(text for language, text in BLOCKS if language == "json")
    (tmp_path / "pairs.jsonl").write_text(rows)
    given = [f"source.path={tmp_path / 'pairs.jsonl'}", f"runs={tmp_path}"]
    folder = prepare.run(config.load("prepare", ROOT / "configs/smollm2/prepare.yaml", given))
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"comparisons", "demonstrations", "prompts"}


def test_the_formats_named_are_those_there_are():
    named = re.search(r"picks the reader: (.*)\.", README).group(1)
    formats = config.Source.model_fields["format"].annotation.__args__
    assert set(re.findall(r"`(\w+)`", named)) == set(formats)


def test_the_ppo_example_runs(tiny_gpt2, tiny_tokenizer, tmp_path, monkeypatch):
    from datasets import Dataset

    from pipeline.models.loading import load_policy

    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "PPOTrainer" in block]
    for given, small in (("num_rollouts=50", "num_rollouts=1"), ("batch_size=16", "batch_size=2"), ("tokens=48", "tokens=4")):
        assert given in code
        code = code.replace(given, small)
    known = {"policy": load_policy(str(tiny_gpt2), tiny_tokenizer), "tokenizer": tiny_tokenizer}
    exec(code, known | {"prompts": Dataset.from_list([{"prompt": "Hello."}] * 2)})
    assert (tmp_path / "out").is_dir()
