"""The wheel holds what works without the checkout, and nothing of the tests."""

import os
import subprocess
import sys
import textwrap
import zipfile

import pytest

from pipeline import __version__, config

ROOT = config.PACKAGE.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "site")
    return folder / "site"


def listed(folder):
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {file.as_posix() for file in files if "__pycache__" not in file.parts}


def test_it_holds_the_package_and_the_recipes_and_no_more(installed):
    configs = {f"configs/{name}" for name in listed(ROOT / "configs")}
    assert listed(installed / "pipeline") == listed(ROOT / "pipeline") | configs
    some = {"py.typed", "reward/card.md.j2", "configs/toxicity/tiny/reward.yaml", "configs/schemas/ppo.json"}
    assert some <= listed(installed / "pipeline")
    assert {folder.name for folder in installed.iterdir()} == {
        "pipeline",
        f"rlhf_stage-{__version__}.dist-info",
    }
    (about,) = installed.glob("*.dist-info")
    assert (about / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "rlhf = pipeline.cli:entry" in (about / "entry_points.txt").read_text()


def test_recipes_run_outside_the_checkout(installed, tmp_path):
    code = """
        from pipeline import cli, config
        print(config.RECIPES, *config.recipes())
        assert cli.main(["run", "--recipe", "demo", "--dry-run"]) == 0
        assert cli.main(["prepare", "--config", "configs/gpt2-ranked/prepare.yaml"]) == 0
        assert cli.main(["config", "ppo", "training.kl_coef"]) == 0
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    run = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    found, *said = subprocess.run(
        run, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found.split() == [str(installed / "pipeline" / "configs"), *config.recipes()]
    assert said[:5] == [f"{stage}: would write runs/demo/{stage}" for stage in config.STAGES]
    assert "training.kl_coef  (number, default 0.05)" in said
    assert said[6].strip() == "168 of 168 rows kept"  # of the CSV in the recipe's folder, wherever that is
    assert (tmp_path / "runs" / "gpt2-ranked" / "prepare" / "manifest.json").is_file()
