"""Open a file of text: decompress it, find its encoding, and bound its lines. Imports no torch.

The first bytes of a file decide, not its name: gzip, bzip2, xz or zstd, and a byte order mark of UTF-8,
UTF-16 or UTF-32. Text without a mark is UTF-8; a byte that is not becomes a lone surrogate, which the
validation finds.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import UserError, one_line

MAX_CHARS = 2**26  # of one line or row; a longer one is no text to learn from, and never held as a whole
PREVIEW_CHARS = 10_000
HEAD = 4096  # bytes or characters that tell what a file is


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


# First bytes -> how to open the file.
DECOMPRESSORS: dict[bytes, Callable[[Path], Any]] = {
    rb"\x1f\x8b\x08": gzip.open,
    rb"BZh[1-9]1AY&SY": bz2.open,
    rb"\xfd7zXZ\x00": lzma.open,
    rb"\x28\xb5\x2f\xfd": _open_zstd,
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

NOT_TEXT = {
    b"PK\x03\x04": "a ZIP archive, as an Excel workbook is; unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; save it as CSV",
    b"PAR1": "Parquet; give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"%PDF-": "a PDF; save its rows as CSV",
}

# The mark of UTF-32 starts with that of UTF-16, so it comes first.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file as text; `newline` is that of `open`. Raises `UserError` if it is no text, or damaged."""
    with path.open("rb") as file:
        start = file.read(HEAD)
    decompress = next((opener for magic, opener in DECOMPRESSORS.items() if re.match(magic, start)), None)
    try:
        with io.BufferedReader(decompress(path) if decompress else path.open("rb")) as data:
            encoding = _find_encoding(path, data.peek(HEAD)[:HEAD])
            errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
            yield io.TextIOWrapper(data, encoding, errors, newline)
    except (EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        raise UserError(f"{path}: is damaged or cut: {one_line(error)}; copy it again") from None
    except OSError as error:
        if error.errno is not None:  # the machine's, not the file's
            raise
        raise UserError(f"{path}: is damaged or cut: {one_line(error)}; copy it again") from None


def _find_encoding(path: Path, start: bytes) -> str:
    """Return the encoding that the first bytes tell. Raises `UserError` if they are not those of a text."""
    for magic, what in NOT_TEXT.items():
        if start.startswith(magic):
            raise UserError(f"{path}: expected text, found {what}")
    for mark, encoding in ENCODINGS.items():
        if start.startswith(mark):
            return encoding
    if start.count(0) > len(start) / 10:
        raise UserError(
            f"{path}: expected UTF-8, found zero bytes, as UTF-16 without a byte order mark has; "
            "save it as UTF-8"
        )
    return "utf-8"


def read_start(path: Path) -> str:
    """Return the first characters of a file, without blanks and byte order marks before them."""
    with open_text(path) as text:
        while start := text.read(HEAD):
            if start := start.lstrip("\ufeff \t\r\n"):
                return start
    return ""


def iter_lines(text: TextIO) -> Iterator[str]:
    """Yield each line, without the byte order mark that joined files have in the middle.

    Of a line over `MAX_CHARS` only the start is yielded, one character longer than that.
    """
    while line := text.readline(MAX_CHARS + 1):
        rest = line
        while len(rest) > MAX_CHARS and not rest.endswith(("\n", "\r")):
            rest = text.readline(MAX_CHARS + 1)
        yield line.removeprefix("\ufeff")


def preview(text: str) -> str:
    """Return a text as quarantine.jsonl holds it: a long one is cut."""
    text = text.rstrip("\r\n")
    return text if len(text) <= PREVIEW_CHARS else text[:PREVIEW_CHARS] + "…"
