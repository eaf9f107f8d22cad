"""Take the outputs out of notebooks: `python scripts/strip_outputs.py NOTEBOOK …`. Exit code 1 where there were some."""

import sys
from pathlib import Path

import nbformat


def strip(path: Path) -> bool:
    """Whether anything was taken out; a notebook without outputs is left as it is, to the byte."""
    notebook = nbformat.read(path, as_version=4)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None)]
    for cell in ran:
        cell.outputs, cell.execution_count = [], None
    if ran:
        nbformat.write(notebook, path)
    return bool(ran)


if __name__ == "__main__":
    stripped = [strip(Path(name)) for name in sys.argv[1:]]
    sys.exit(any(stripped))
