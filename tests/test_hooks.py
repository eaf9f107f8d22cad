"""What runs before a commit is what is here: nothing is fetched, and notebooks lose their outputs."""

import subprocess
import sys

import nbformat
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


def test_outputs_are_taken_out_and_the_rest_stays(tmp_path):
    ran = nbformat.v4.new_code_cell(
        "1 + 1", execution_count=1, outputs=[nbformat.v4.new_output("stream", text="2")]
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Sum"), ran])
    paths = [tmp_path / "one.ipynb", tmp_path / "other.ipynb"]
    for path in paths:
        nbformat.write(notebook, path)
    strip = [sys.executable, ROOT / "scripts" / "strip_outputs.py", *paths]
    assert subprocess.run(strip).returncode == 1
    for path in paths:
        title, cell = nbformat.read(path, as_version=4).cells
        assert (title.source, cell.source, cell.outputs, cell.execution_count) == ("# Sum", "1 + 1", [], None)
    assert subprocess.run(strip).returncode == 0
