"""Remove the outputs of notebooks: `python scripts/strip_outputs.py NOTEBOOK …`.

The exit code is 1 if any notebook had outputs.
"""

import sys
from pathlib import Path

import nbformat


def strip_outputs(path: Path) -> bool:
    """Remove the outputs of a notebook and return whether it had any.

    A notebook without outputs stays unchanged, byte for byte.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    executed = [cell for cell in code if cell.outputs or cell.execution_count is not None]

    for cell in executed:
        cell.outputs, cell.execution_count = [], None
    if executed:
        nbformat.write(notebook, path)
    return bool(executed)


if __name__ == "__main__":
    stripped = [strip_outputs(Path(name)) for name in sys.argv[1:]]
    sys.exit(any(stripped))
