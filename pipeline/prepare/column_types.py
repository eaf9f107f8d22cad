"""Find the Arrow types of the columns that only reward functions read. Imports no torch.

The type of a column includes all of its values, as Arrow infers it: whole numbers beside other numbers are
numbers, an object has the keys of all objects, and null fits every type.
"""

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any

from pipeline.data.messages import preview
from pipeline.data.readers import ParsedRecord
from pipeline.data.schema import KINDS
from pipeline.errors import UserError, as_line

ITEMS = "[]"  # the part of a list that has the type of its items
WORDS = {  # for Arrow's types; others are shown as Arrow writes them
    "string": "text",
    "int64": "a whole number",
    "uint64": "a whole number",
    "double": "a number",
    "bool": "true or false",
    "list<item: null>": "a list",
    "struct<>": "an object",
}
NUMBERS = ["int64", "uint64", "double"]  # each includes those before it
# What numbers may be, and beside which other ones no type of number holds them.
CONFLICTS = {"negative": "huge", "huge": "negative", "inexact": "fraction", "fraction": "inexact"}


def column_types(items: Iterable[ParsedRecord]) -> dict[str, Any]:
    """Return the Arrow type of each column that is not of the records' kind, in order of appearance.

    Raises `UserError` if the values of a column have no common type.
    """
    columns: dict[str, _ColumnType] = {}
    for item in items:
        place = f"{item.rows[0].source}:{item.rows[0].line}"
        for name, value in item.record.items():
            if name not in KINDS[item.kind].columns:
                columns.setdefault(name, _ColumnType(name)).include(value, place)
    return {name: column.to_arrow() for name, column in columns.items()}


def values_error(column: str, problem: str, remedy: str = "make the values of {} one type") -> UserError:
    """Build the error for values that a column cannot hold; `{}` in the remedy stands for its name."""
    remedy = remedy.replace("{}", repr(column))
    return UserError(f"{problem}; {remedy}, or pass the column over with ignore: [{column}]")


class _ColumnType:
    """The type of the values of a column, or of a part of them at `path`, and the place of the first one."""

    def __init__(self, column: str, path: str = "") -> None:
        self.column, self.path = column, path
        self.type: Any = None  # of lists and objects it is that of empty ones
        self.place = ""
        self.parts: dict[str, _ColumnType] = {}
        self.numbers: dict[str, tuple[str, str]] = {}  # trait -> the first number with it, and its place

    def include(self, value: Any, place: str) -> None:
        """Widen the type to a value of the row at `place`. Raises `UserError` if they do not fit together."""
        if value is None:
            return
        type_ = self._infer(value, place)
        if self.type is None:
            self.type, self.place = type_, place
        elif self.type != type_:
            self.type = self._unify(type_, place)
        if str(type_) in NUMBERS:
            self._include_number(value, place)
        for key, part in _parts(value):
            if key not in self.parts:
                path = f"{self.path}{key}" if key == ITEMS else f"{self.path}.{key}"
                self.parts[key] = _ColumnType(self.column, path)
            self.parts[key].include(part, place)

    def to_arrow(self) -> Any:
        """Return the Arrow type."""
        import pyarrow

        if self.type is None:
            return pyarrow.null()
        parts = {key: part.to_arrow() for key, part in self.parts.items()}
        if pyarrow.types.is_list(self.type):
            return pyarrow.list_(parts.get(ITEMS, pyarrow.null()))
        return pyarrow.struct(list(parts.items())) if pyarrow.types.is_struct(self.type) else self.type

    def _infer(self, value: Any, place: str) -> Any:
        import pyarrow

        if isinstance(value, list | tuple):
            return pyarrow.list_(pyarrow.null())
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    self._refuse(f"an object with the key {preview(key)}", key, place)
            return pyarrow.struct([])
        if isinstance(value, int) and 2**63 <= value < 2**64:
            return pyarrow.uint64()
        try:
            type_ = pyarrow.scalar(value).type
        except Exception:  # whatever Arrow, or a method of the value that it calls, raises
            type_ = None
        # Sets and arrays are nested, and `datasets` has no types of extensions.
        if type_ is None or pyarrow.types.is_nested(type_) or isinstance(type_, pyarrow.BaseExtensionType):
            self._refuse(preview(value), value, place)
        return type_

    def _refuse(self, what: str, value: Any, place: str) -> None:
        what = f"{as_line(what)}, of type {type(value).__name__}"
        raise values_error(
            self.column,
            f"{place}: {self._name()} is {what}, which no column holds",
            "make {} text, numbers, lists, or objects with text as keys",
        )

    def _include_number(self, value: Any, place: str) -> None:
        """Raise `UserError` if no type holds a number beside those before it."""
        for trait in _traits(value):
            if trait not in self.numbers:
                self.numbers[trait] = preview(value), place
            if conflict := self.numbers.get(CONFLICTS[trait]):
                beside = f"beside {conflict[0]} in {conflict[1]}"
                raise values_error(
                    self.column,
                    f"{place}: {self._name()} is {value}, and no type of number holds it exactly {beside}",
                    "write the values of {} as text",
                )

    def _unify(self, other: Any, place: str) -> Any:
        import pyarrow

        if str(self.type) in NUMBERS and str(other) in NUMBERS:
            return max(self.type, other, key=lambda number: NUMBERS.index(str(number)))
        if self.type.id == other.id:  # decimals and times of different precision
            schemas = [pyarrow.schema([("", one)]) for one in (self.type, other)]
            try:
                return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
            except pyarrow.ArrowException:
                pass
        here, there = (WORDS.get(str(one), str(one)) for one in (other, self.type))
        raise values_error(self.column, f"{place}: {self._name()} is {here}, but {there} in {self.place}")

    def _name(self) -> str:
        return f"column {self.column!r}" + (f" at {self.path.removeprefix('.')}" if self.path else "")


def _traits(number: Any) -> Iterator[str]:
    """Yield what decides which type holds a number, as the keys of `CONFLICTS`."""
    if not isinstance(number, Integral):
        yield "fraction"
        return
    whole = int(number)
    if whole < 0:
        yield "negative"
    if whole >= 2**63:
        yield "huge"
    if abs(whole) > 2**53:
        yield "inexact"


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """Return the items of a list, or the values of an object by their keys."""
    if isinstance(value, dict):
        return value.items()
    return ((ITEMS, item) for item in value) if isinstance(value, list | tuple) else ()
