"""Modules that say "Imports no torch" do not import it, in an interpreter of their own."""

import ast
import subprocess
import sys

import pytest

from pipeline.config import PACKAGE

CLAIM = "Imports no torch"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets")


def claiming_modules() -> list[str]:
    """Return the names of the modules whose docstring makes the claim."""
    return [
        ".".join(["pipeline", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in sorted(PACKAGE.rglob("*.py"))
        if CLAIM in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    ]


@pytest.mark.parametrize("module", claiming_modules())
def test_it_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_some_modules_make_the_claim() -> None:
    assert {"pipeline.data.schema", "pipeline.formatting.tables"} <= set(claiming_modules())
