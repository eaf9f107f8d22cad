"""The outputs in notebooks/: of the sources that are there, small, and of no machine; and how they get so."""

import base64
import io
import re
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from pipeline.config import PACKAGE
from scripts import notebooks
from scripts.notebooks import hash_sources, read_repository, tidy_notebook, write_address

ROOT = PACKAGE.parent
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("notebooks/*.ipynb"))}
BOOKS = {name: nbformat.reads(text, as_version=4) for name, text in FILES.items()}
BYTES = 300_000  # of a notebook
# An absolute path, or a user at a host. `</td>`, `text/html` and https:// are none.
OF_A_MACHINE = re.compile(r"(?<![\w.:/<~])/[\w.-]+/|\b[A-Z]:\\|\w@\w")


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", BOOKS)
def test_are_of_the_sources_that_are_there(name):
    book = BOOKS[name]
    is_current = book.metadata.get("sources") == hash_sources(book)
    assert is_current, f"the code of {name} changed since its run; run: make write-notebooks"
    install, *others = code_cells(book)
    assert not install.outputs  # the project is installed
    assert all(cell.outputs for cell in others)
    assert [cell.execution_count for cell in code_cells(book)] == list(range(1, len(others) + 2))


@pytest.mark.parametrize("name", BOOKS)
def test_are_tidy_small_and_of_no_machine(name):
    book = deepcopy(BOOKS[name])
    tidy_notebook(book, name)
    assert nbformat.writes(book) + "\n" == FILES[name], f"python scripts/notebooks.py notebooks/{name}"
    assert len(FILES[name].encode()) < BYTES
    for cell in code_cells(book):
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result")
            texts = output.get("data", {"text/plain": output.get("text")})
            assert len(texts) == 1
            for kind, text in texts.items():
                if kind != "image/png":
                    assert not OF_A_MACHINE.search(text), (cell.id, OF_A_MACHINE.search(text))
                    assert not re.search(r"\r|Warning:|\dit/s", text)


@pytest.mark.parametrize(
    ("text", "is_of_a_machine"),
    [
        ("report: /home/ann/runs/demo", True),
        ("'/tmp/x.json'", True),
        ("(C:\\Users\\ann)", True),
        ("ann@host:~", True),
        ("</td></tr> text/html, SFT/PPO, 3 / 4, ~/runs/demo", False),
        ("report: runs/demo/evaluate/report.html, https://github.com/a/b", False),
    ],
)
def test_what_is_taken_for_a_path_of_a_machine(text, is_of_a_machine):
    assert bool(OF_A_MACHINE.search(text)) == is_of_a_machine


def test_every_address_is_the_one_of_pyproject():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert read_repository() == address
    project = address.removeprefix("https://github.com/")
    for name, book in BOOKS.items():
        badge = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        link = f"https://colab.research.google.com/github/{project}/blob/main/notebooks/{name}"
        assert book.cells[0].source.startswith(f"{badge}({link})\n\n# ")
        assert re.findall(r'^REPOSITORY = "(.*)"$', book.cells[1].source, re.M) == [address]
        assert set(re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)", FILES[name])) == {project}


def test_a_new_address_replaces_the_old_one_and_asks_for_no_run():
    book = deepcopy(BOOKS["analyse.ipynb"])
    write_address(book, "analyse.ipynb", "https://github.com/ann/x")
    assert book.cells[0].source.count("colab-badge.svg") == 1
    assert (
        "(https://colab.research.google.com/github/ann/x/blob/main/notebooks/analyse.ipynb)\n\n# A rew"
        in (book.cells[0].source)
    )
    assert '\nREPOSITORY = "https://github.com/ann/x"\n' in book.cells[1].source
    assert hash_sources(book) == hash_sources(BOOKS["analyse.ipynb"])
    code_cells(book)[-1].source += "\n"
    assert hash_sources(book) != hash_sources(BOOKS["analyse.ipynb"])


def png(size=(8, 8)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGBA").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def shown(**data):
    return nbformat.v4.new_output("display_data", data={key.replace("_", "/"): data[key] for key in data})


def tidied(*outputs):
    """What is left of the outputs of a cell that ran in /scratch."""
    install = nbformat.v4.new_code_cell(
        'REPOSITORY = ""', metadata={"execution": {"iopub.status.busy": "now"}}
    )
    cell = nbformat.v4.new_code_cell("1", id="cell-2", outputs=list(outputs), execution_count=2)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), install, cell])
    book.metadata = nbformat.from_dict({"language_info": {"version": "3.11.2"}, "sources": "abc"})
    tidy_notebook(book, "t.ipynb", "/scratch")
    assert set(book.metadata) == {"kernelspec", "language_info", "sources"}
    assert book.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in book.cells)
    return book.cells[-1].outputs


def test_what_is_printed_is_one_output_without_warnings_and_paths():
    home = Path.home()
    first, image, last = tidied(
        stream("reward: /scratch/runs/demo\n"),
        stream("UserWarning: no\n 50%|#####  | 3/6", "stderr"),
        stream(f"{ROOT}/configs and {home}/x\n"),
        shown(image_png=png(), text_plain="<Figure size 640x480>"),
        stream("<X at 0x7f091c0c2150>\n"),
    )
    assert first == stream("reward: runs/demo\nconfigs and ~/x\n")
    assert list(image.data) == ["image/png"]
    assert last == stream("<X>\n")


def test_an_output_keeps_one_form_and_a_table_one_id():
    table = '<style>#T_5de16 td {} #T_5de16_row0_col0 {}</style><table id="T_5de16">'
    one, other = tidied(
        shown(text_plain="<Styler at 0x7f>", text_html=table), shown(text_html=table, text_plain="")
    )
    assert one.data == {"text/html": table.replace("T_5de16", "T_cell-2-0")}
    assert other.data == {"text/html": table.replace("T_5de16", "T_cell-2-1")}
    assert tidied(one, other) == [one, other]
    assert tidied(shown(application_json={"a": 1}))[0].data == {"application/json": {"a": 1}}


def test_an_image_has_a_palette_and_is_compressed_once():
    original = png((200, 200))
    (image,) = tidied(shown(image_png=original))
    compressed = image.data["image/png"]
    assert len(compressed) < len(original)
    assert Image.open(io.BytesIO(base64.b64decode(compressed))).mode == "P"
    assert tidied(shown(image_png=compressed))[0].data == {"image/png": compressed}


def test_tidying_a_file_exits_with_1_until_nothing_changes(tmp_path, monkeypatch):
    path = tmp_path / "analyse.ipynb"
    book = deepcopy(BOOKS["analyse.ipynb"])
    book.cells[1].metadata["collapsed"] = True
    nbformat.write(book, path)
    monkeypatch.setattr(sys, "argv", ["notebooks.py", str(path)])
    assert notebooks.main() == 1
    text = path.read_text(encoding="utf-8")
    assert "collapsed" not in text
    assert notebooks.main() == 0
    assert path.read_text(encoding="utf-8") == text


def test_an_address_that_colab_cannot_open_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://example.org/x"\n')
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"https://example.org/x: expected https://github.com/OWNER/NAME"):
        read_repository()
