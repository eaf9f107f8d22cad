"""Tidy notebooks, or run them first: `python scripts/notebooks.py [--run] [NOTEBOOK …]`.

Without names, these are all of `notebooks/`. A tidy notebook has a Colab badge, the repository's address,
outputs that are small and free of this machine's paths, and no other metadata. The exit code is 1 if
tidying changed a notebook. `--run` runs them in one scratch folder, in this order, which takes minutes.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
OUTPUT_TYPES = ("image/png", "text/html", "text/markdown", "text/plain")  # the first of an output is kept
BADGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLOURS = 64  # of an image


def read_repository() -> str:
    """Return the address of the repository: `Repository` in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = str(project["urls"]["Repository"])
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        sys.exit(f"pyproject.toml: Repository: {address}: expected https://github.com/OWNER/NAME, for Colab")

    return address


def hash_sources(notebook: NotebookNode) -> str:
    """Return the SHA-256 of the code that the outputs belong to: all cells but the one that installs."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources[1:]).encode()).hexdigest()


def run_notebook(notebook: NotebookNode, folder: str | Path) -> None:
    """Run a notebook in a folder, and record the hash of what was run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute(env=environment)
    notebook.metadata["sources"] = hash_sources(notebook)


def tidy_notebook(notebook: NotebookNode, name: str, folder: str | Path = ROOT) -> None:
    """Tidy a notebook in place; `name` is that of its file, `folder` the one that it ran in."""
    write_address(notebook, name, read_repository())
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    if "sources" in notebook.metadata:
        metadata["sources"] = notebook.metadata["sources"]
    notebook.metadata = nbformat.from_dict(metadata)

    paths = {f"{folder}/": "", f"{ROOT}/": "", f"{Path.home()}/": "~/"}
    paths.pop("//", None)  # a home of /
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = tidy_outputs(cell.outputs, cell.id, paths)


def write_address(notebook: NotebookNode, name: str, repository: str) -> None:
    """Write the repository's address into the badge above the title and into the cell that installs."""
    title, install = notebook.cells[:2]
    colab = repository.replace("https://github.com/", "https://colab.research.google.com/github/")
    text = re.sub(rf"^{re.escape(BADGE)}\(.*\)\n*", "", title.source)
    title.source = f"{BADGE}({colab}/blob/main/notebooks/{name})\n\n{text}"
    install.source = re.sub(r'(?m)^(REPOSITORY =) ".*"$', rf'\1 "{repository}"', install.source)


def tidy_outputs(outputs: list[NotebookNode], cell_id: str, paths: Mapping[str, str]) -> list[NotebookNode]:
    """Return outputs without warnings, bars, paths, and ids that change from run to run.

    What is printed becomes one output up to the next table or image.
    """
    tidied: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            output.text = hide_paths(output.text, paths)
            if tidied and tidied[-1].output_type == "stream":
                tidied[-1].text += output.text
                continue
        elif "data" in output:
            output.data = tidy_data(output.data, f"T_{cell_id}-{len(tidied)}", paths)
            output.metadata = {}
        tidied.append(output)
    return tidied


def tidy_data(data: Mapping[str, str], table_id: str, paths: Mapping[str, str]) -> dict[str, str]:
    """Return the form of an output that code hosts show; `table_id` replaces the id that pandas draws."""
    kind = next(kind for kind in (*OUTPUT_TYPES, *data) if kind in data)
    if kind == "image/png":
        return {kind: compress_png(data[kind])}
    if kind not in OUTPUT_TYPES:
        return dict(data)

    return {kind: re.sub(r"\bT_[0-9a-f]{5}\b|\bT_[0-9a-f]{5}(?=_)", table_id, hide_paths(data[kind], paths))}


def hide_paths(text: str, paths: Mapping[str, str]) -> str:
    """Return text without the folders in `paths` and without addresses in memory."""
    for path, replacement in paths.items():
        text = text.replace(path, replacement)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def compress_png(text: str) -> str:
    """Return a PNG image in base64 with few colours, unless it has a palette already."""
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    if image.mode == "P":
        return text

    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    buffer = io.BytesIO()
    opaque.convert("RGB").quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> int:
    """Tidy or run the notebooks and return the exit code."""
    parser = argparse.ArgumentParser(description="Tidy notebooks, or run them first.")
    parser.add_argument("--run", action="store_true", help="run the notebooks first (minutes)")
    parser.add_argument("notebooks", nargs="*", type=Path)
    arguments = parser.parse_args()

    changed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        for path in arguments.notebooks or sorted(ROOT.glob("notebooks/*.ipynb")):
            before = path.read_text(encoding="utf-8")
            notebook = nbformat.reads(before, as_version=4)
            if arguments.run:
                start = time.monotonic()
                run_notebook(notebook, folder)
                print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)
            tidy_notebook(notebook, path.name, folder)
            after = nbformat.writes(notebook) + "\n"
            if after != before:
                changed = True
                path.write_text(after, encoding="utf-8")
    return int(changed and not arguments.run)


if __name__ == "__main__":
    sys.exit(main())
