"""What runs before a commit is what is here: nothing is fetched."""

import subprocess

import yaml

from pipeline.config import PACKAGE

ROOT = PACKAGE.parent


def test_the_hooks_are_local_and_hold_what_make_lint_runs():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    entries = [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --fix") for hook in repo["hooks"]]
    linted = subprocess.run(
        ["make", "lint", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(f".venv/bin/{entry}" in linted for entry in entries[:3])
    assert (ROOT / entries[3].removeprefix("python ")).is_file()
