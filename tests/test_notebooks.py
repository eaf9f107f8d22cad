"""Notebooks: each cell by itself, in seconds; all of them from end to end with `make notebooks`."""

import ast
import builtins
import importlib.util
import subprocess
from copy import deepcopy
from importlib.metadata import version
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from pipeline import notebook
from pipeline.config import RECIPES
from pipeline.errors import UserError
from scripts.notebooks import read_repository, run_notebook

FILES = sorted((RECIPES.parent / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in FILES}
CELLS = {
    f"{name}-{number}": cell.source
    for name, book in NOTEBOOKS.items()
    for number, cell in enumerate(book.cells)
    if cell.cell_type == "code"
}
INSTALL = next(iter(CELLS.values()))
FIRST_CELLS = (INSTALL, 'run_rlhf("run"', "demo_records(")  # they need no output of another cell
NEEDY_CELLS = [place for place, source in CELLS.items() if not any(text in source for text in FIRST_CELLS)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """One folder for all notebooks: each finds the stages that another has run."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs(name, scratch, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")  # it has all cores, unlike the other tests
    book = deepcopy(NOTEBOOKS[name])
    run_notebook(book, scratch)
    install, *others = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not install.outputs  # the project is installed
    assert all(cell.outputs for cell in others)


def test_begin_with_the_same_cell():
    assert list(NOTEBOOKS) == ["01_pipeline", "02_reward_models", "03_ppo", "analyse"]
    for book in NOTEBOOKS.values():
        nbformat.validate(book)
        assert next(cell for cell in book.cells if cell.cell_type == "code").source == INSTALL


@pytest.mark.parametrize("place", CELLS)
def test_a_cell_defines_nothing_and_needs_no_name_of_another(place):
    nodes = list(ast.walk(ast.parse(CELLS[place])))
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    assert not [node for node in nodes if isinstance(node, definitions)]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    known = vars(builtins).copy()
    exec(ast.unparse(ast.Module(imports, [])), known)
    loaded, stored = (names_in(nodes, context) for context in (ast.Load, ast.Store))
    assert loaded <= stored | known.keys()


def names_in(nodes, context):
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def test_import_only_the_public_modules_and_only_what_these_export():
    imported = [
        (node.module, name.name)
        for source in CELLS.values()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "pipeline"
        for name in node.names
    ]
    assert {module for module, _ in imported} == {"pipeline", "pipeline.notebook"}
    assert {name for module, name in imported if module == "pipeline.notebook"} == set(notebook.__all__)


@pytest.mark.parametrize("place", NEEDY_CELLS)
def test_a_cell_out_of_order_says_what_is_missing(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; run: |no such file or folder"):
        exec(CELLS[place], {})
    assert not list(tmp_path.iterdir())  # no work was begun


def test_a_folder_that_is_not_a_stage_is_refused():
    with pytest.raises(UserError, match=r"^runs/demo: expected runs/<run>/<stage>, .*; run: the cell above$"):
        notebook.open_artifact("runs/demo", "the cell above")


def test_curves_are_drawn_by_title(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "accuracy": 0.5}\n{"step": 2, "loss": 1.0}\n'
    )
    artifact = SimpleNamespace(path=tmp_path)
    assert notebook.read_log(artifact) == [
        {"step": 1, "loss": 2.0, "accuracy": 0.5},
        {"step": 2, "loss": 1.0},
    ]
    assert [plot.title for plot in notebook.draw_curves(artifact)] == ["Loss", "Accuracy"]
    assert [plot.title for plot in notebook.draw_curves(artifact, "Accuracy", "Loss")] == ["Accuracy", "Loss"]
    with pytest.raises(UserError, match=r"no curve 'KL' in its log; expected one of: Loss, Accuracy$"):
        notebook.draw_curves(artifact, "KL")


def test_a_mistake_is_one_line_and_stops_the_notebook(tmp_path):
    wrong = 'from pipeline.notebook import run_rlhf\n\nrun_rlhf("run", "--recipe", "dmeo")'
    cells = [nbformat.v4.new_code_cell(source) for source in (wrong, "print('reached')")]
    book = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        run_notebook(book, tmp_path)
    (shown,) = [output for output in book.cells[0].outputs if output.output_type == "error"]
    (line,) = shown.traceback
    assert line.startswith("error: --recipe dmeo: no such recipe; did you mean 'demo'?")
    assert "\n" not in line
    assert not book.cells[1].outputs


@pytest.mark.parametrize(
    ("code", "present", "message"),
    [
        (0, {"torchao"}, "^installed: restart the session"),
        (0, set(), "^installed: restart the session"),
        (1, set(), "^not installed"),
    ],
)
def test_the_installation_keeps_torch_and_renews_torchao(code, present, message, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=code, stdout="")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in present or None)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=message):
        exec(INSTALL, {})
    torch = f"torch=={version('torch')}"
    torchao = ["torchao>=0.16"] if present else []  # below it, PEFT raises in every get_peft_model
    project = ["--src", ".", "-e", f"git+{read_repository()}#egg=rlhf-stage"]
    assert commands[0][5:] == [torch, *torchao, *project]
