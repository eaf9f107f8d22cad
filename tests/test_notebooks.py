"""Notebooks run from the first cell to the last, in small."""

import os

import nbclient
import nbformat
import pytest

from pipeline.config import RECIPES

NOTEBOOKS = sorted((RECIPES.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    few = ["prepare.source.limit=1400", "sft.training.max_steps=2", "reward.training.max_steps=4", "reward.training.eval_steps=2"]
    few.append("reward.training.logging_steps=1")
    first.source = first.source.replace('"--tiny"]', f'"--tiny", *{few}]')
    assert few[0] in first.source
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert os.path.exists(tmp_path / "runs" / "distilbert-ranked-tiny" / "reward" / "summary.md")
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_define_nothing_and_hold_no_output(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert not {"def", "class"} & set(cell.source.split())
