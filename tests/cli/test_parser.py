"""Help fits on a screen and shows an example that is understood; a shell completes; recipes are found without
a checkout.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import config
from pipeline.cli import main
from pipeline.cli.parser import EXAMPLES, parse


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as left:
        parse([*command, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_is_one_screen_and_its_example_is_understood(command, capsys):
    text = help_of(capsys, command)
    assert len(text.splitlines()) <= 24
    assert text.endswith(f"\n\nexample:\n  {EXAMPLES[command]}\n")
    argv = shlex.split(EXAMPLES[command].split(" > ")[0])
    assert (argv[0], parse(argv[1:]).command) == ("rlhf", command)


def test_the_main_help_is_one_screen_and_names_commands_and_exit_codes(capsys):
    text = help_of(capsys)
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 100
    assert set(re.findall(r"^    (\S+)  ", text, re.M)) == set(EXAMPLES)
    (codes,) = re.findall(r"^exit codes: (.*)", text, re.M)
    assert re.findall(r"\d+", codes) == ["0", "1", "2", "130"]
    for line in re.findall(r"^  (?:rlhf|accelerate launch -m pipeline) (.*)", text, re.M):
        assert parse(shlex.split(line)).command in ("run", "reward")


def test_help_is_torch_free():
    code = (
        "import sys\nfrom pipeline.cli import main\ntry: main(['ppo', '--help'])\nfinally: "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=config.RECIPES.parent
    )
    assert done.stdout.endswith("\nFalse\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["re"], {"reward"}),
        (["best"], {"best-of-n"}),
        (["run", "--recipe", "di"], {"distilbert-ranked"}),
        (["run", "di"], {"distilbert-ranked"}),
        (["run", "--until", "e"], {"evaluate"}),
        (["init", "mine", "--from", "sm"], {"smollm2"}),
        (["ppo", "--conf"], {"--config"}),
        (["ppo", "--config", "mi"], {"mine.yaml"}),
        (["generate", "--prompts", "mi"], {"mine.yaml"}),
        (["show", "ru"], {"runs"}),
        (["show", "runs", "ru"], {"runs"}),
    ],
)
def test_bash_completes(typed, offered, tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "runs").mkdir()
    words = shlex.join(["rlhf", *typed])
    script = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({words}) COMP_CWORD={len(typed)}; _shtab_rlhf; "
        f'printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == offered


def test_zsh_is_offered_the_recipes(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef rlhf\n")
    assert f":recipe:({' '.join(config.recipes())})" in script


def test_configs_are_those_of_the_package_where_there_are_none_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["ppo", "--config", "configs/demo/ppo.yaml"]
    assert parse(argv).config == str(config.RECIPES / "demo" / "ppo.yaml")
    assert Path(parse(["doctor", "--config", "configs/demo"]).config) == config.RECIPES / "demo"
    Path("configs").mkdir()
    assert parse(argv).config == "configs/demo/ppo.yaml"
