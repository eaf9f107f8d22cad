"""Notebooks: each cell by itself, in seconds; all of them from end to end with `make notebooks`."""

import ast
import builtins
import importlib.util
import re
import subprocess
from importlib.metadata import version
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from pipeline.config import RECIPES
from pipeline.errors import UserError

NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((RECIPES.parent / "notebooks").glob("*.ipynb"))}
CELLS = {f"{name}-{i}": cell.source for name, book in NOTEBOOKS.items() for i, cell in enumerate(book.cells) if cell.cell_type == "code"}
INSTALL = next(iter(CELLS.values()))
BEGINNINGS = (INSTALL, 'main(["run"', "demo.rows(")  # cells that need nothing from another


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Where all of them run: a stage that one has made another finds there."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, scratch, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # it has all cores, unlike the other tests
    book = execute(NOTEBOOKS[name], scratch, monkeypatch)
    install, *others = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not install.outputs  # the project is here
    assert all(cell.outputs for cell in others)


def execute(book, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(RECIPES.parent))
    return nbclient.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()


def test_hold_no_output_and_begin_with_the_same_cell():
    assert list(NOTEBOOKS) == ["01_pipeline", "02_reward_models", "03_ppo", "analyse"]
    for book in NOTEBOOKS.values():
        nbformat.validate(book)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in cells)
        assert cells[0].source == INSTALL
    assert re.findall(r'^REPOSITORY = "https://\S+/rlhf-stage"', INSTALL, re.M)


@pytest.mark.parametrize("place", CELLS)
def test_a_cell_defines_nothing_and_needs_no_name_of_another(place):
    nodes = list(ast.walk(ast.parse(CELLS[place])))
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    known = vars(builtins).copy()
    exec(ast.unparse(ast.Module(imports, [])), known)
    names = {context: {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)} for context in (ast.Load, ast.Store)}
    assert names[ast.Load] <= names[ast.Store] | known.keys()


@pytest.mark.parametrize("place", [place for place, source in CELLS.items() if not any(text in source for text in BEGINNINGS)])
def test_a_cell_out_of_order_says_what_is_missing(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; run: |no such file or folder"):
        exec(CELLS[place], {})
    assert not list(tmp_path.iterdir())  # no work was begun


def test_a_mistake_is_one_line_and_stops_the_notebook(tmp_path, monkeypatch):
    wrong = 'from pipeline.cli import main\n\nmain(["run", "--recipe", "dmeo", "--debug"])'
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (wrong, "print('reached')")])
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute(book, tmp_path, monkeypatch)
    (shown,) = [output for output in book.cells[0].outputs if output.output_type == "error"]
    (line,) = shown.traceback
    assert line.startswith("error: --recipe dmeo: no such recipe; did you mean 'demo'?")
    assert "\n" not in line
    assert not book.cells[1].outputs


@pytest.mark.parametrize(("code", "says"), [(0, "^installed: restart the session"), (1, "^not installed")])
def test_what_is_installed_leaves_torch_as_it_is(code, says, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: asked.append(argv) or SimpleNamespace(returncode=code, stdout=""))
    with pytest.raises(SystemExit, match=says):
        exec(INSTALL, {})
    torch, *project = asked[0][5:]
    assert torch == f"torch=={version('torch')}"
    assert project == ["--src", ".", "-e", "git+https://github.com/OWNER/rlhf-stage#egg=rlhf-stage"]
