"""Values on disk instead of in memory. Imports no torch."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

WRITE_BYTES = 2**20
READ_BYTES = 2**16  # values are mostly read in order


class Shelf(Sequence[Any]):
    """A list to append to, in a temporary file without a name, which ends with the process.

    A value is pickled, and is a copy each time it is read. `folder` should be on the disk of the output, as
    the folder for temporary files may be in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._ends = array("q", [0])
        self._buffer = bytearray()  # the end of the file, not yet written
        self._block, self._block_start = b"", 0  # what was read last

    def append(self, value: Any) -> int:
        """Add a value; return its index."""
        data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        if len(self._buffer) + len(data) > WRITE_BYTES:
            self._write()
        self._buffer += data
        self._ends.append(self._ends[-1] + len(data))
        return len(self._ends) - 2

    def _write(self) -> None:
        with memoryview(self._buffer) as view:
            start = 0
            while start < len(view):
                start += self._file.write(view[start:])
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        start, end = self._ends[index], self._ends[index + 1]
        written = self._ends[-1] - len(self._buffer)
        if start >= written:
            return pickle.loads(self._buffer[start - written : end - written])

        if not self._block_start <= start <= end <= self._block_start + len(self._block):
            self._block = os.pread(self._file.fileno(), max(end - start, READ_BYTES), start)
            self._block_start = start
        return pickle.loads(self._block[start - self._block_start : end - self._block_start])


class View(Sequence[Any]):
    """The values that `load` returns for each of `places`; none is kept."""

    def __init__(self, load: Callable[[int], Any], places: Sequence[int]) -> None:
        self._load, self._places = load, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._load(self._places[index])


def shelve(values: Iterable[Any], folder: Path | None = None) -> Shelf:
    """Return a shelf of the values, which are taken one by one."""
    shelf = Shelf(folder)
    for value in values:
        shelf.append(value)
    return shelf
