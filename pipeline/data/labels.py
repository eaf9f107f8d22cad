"""Find the classes of labels, and which labels are one class in several spellings. Imports no torch.

`true` and 1, `1` and `1.0`, and `Yes`, ` yes` and `YES` are one class. Two classes that may be meant as one,
such as `yes` and 1, are an error.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from pipeline.config import Source
from pipeline.data.identity import UNSEEN
from pipeline.data.messages import preview
from pipeline.data.schema import RowError
from pipeline.errors import UserError

BOOLEANS = {"false": 0, "true": 1}
INTEGER = re.compile(r"-?[0-9]{1,4000}")  # Python converts no longer ones
NUMBER = re.compile(r"([+-]?[0-9]{1,4000})(?:\.0*)?")

# Pairs of names that say no and yes: two of one column of this table are the same class, or may be.
POLAR = (("false", "true"), ("0", "1"), ("no", "yes"), ("n", "y"), ("f", "t"), ("off", "on"))

# How the verdict on a step is spelled: wrong, right.
VERDICTS = (*POLAR, ("wrong", "right"), ("incorrect", "correct"), ("-", "+"))

# Class -> the counts of its labels, each as (its name, how it is spelled).
Spellings = dict[str, Counter[tuple[str, str]]]


def class_names(sources: list[Source], labels: Iterable[Any]) -> list[str]:
    """Return the classes: those that a source names, else the distinct labels, sorted.

    A class in several spellings has the plainest as its name, or the most frequent one. Raises `UserError` if
    two sources name different classes, or if two labels may be one class or two.
    """
    configured = {tuple(source.classes) for source in sources if source.classes}
    if len(configured) > 1:
        raise UserError(
            f"sources name different classes: {' and '.join(map(str, sorted(configured)))}; "
            "all labels share one list"
        )
    if configured:
        return list(configured.pop())

    spellings = collect_spellings(labels)
    _check_distinct(spellings)
    if spellings.keys() <= BOOLEANS.keys():
        return list(BOOLEANS)
    names = (_class_name(key, counts) for key, counts in spellings.items())
    return sorted(names, key=lambda name: (int(name) if INTEGER.fullmatch(name) else math.inf, name))


def collect_spellings(labels: Iterable[Any]) -> Spellings:
    """Return the spellings of each class, under the key that they share."""
    spellings: Spellings = defaultdict(Counter)
    for label in labels:
        if name := _label_name(label):
            shown = str(label) if isinstance(label, str | float) else name
            spellings[_key(name)][name, shown] += 1
    if spellings.keys() & BOOLEANS.keys():  # beside true and false, 1 and 0 are these
        for name, index in BOOLEANS.items():
            if counts := spellings.pop(str(index), None):
                spellings[name] += counts
    return dict(spellings)


def merged_spellings(labels: Iterable[Any]) -> list[str]:
    """Return a description of each class that has several spellings."""
    lines = []
    for key, counts in sorted(collect_spellings(labels).items()):
        shown: Counter[str] = Counter()
        for (_, spelling), count in counts.items():
            shown[spelling] += count
        if len(shown) > 1:
            spelled = ", ".join(f"{preview(text)} {count:,}" for text, count in sorted(shown.items()))
            lines.append(f"{_class_name(key, counts)} is {spelled}")
    return lines


def parse_label(value: Any, classes: list[str]) -> int:
    """Return the index of the class that a name, an index or a boolean refers to.

    Raises `RowError` if it refers to none, or to one by its meaning and to another by its index.
    """
    name = _label_name(value)
    if name in classes:
        return classes.index(name)
    keys, key = list(map(_key, classes)), _key(name)
    for alias in (key, *_aliases(key)):
        if keys.count(alias) == 1:
            return keys.index(alias)

    index = BOOLEANS.get(key, int(key) if key.isdecimal() and INTEGER.fullmatch(key) else len(classes))
    if index >= len(classes):
        shown = ", ".join(classes)
        raise RowError("unknown-label", f"expected one of {preview_names(shown)}; found {preview(value)}")
    if key in BOOLEANS and (opposite := _polarity(keys[index])) is not None and opposite != index:
        raise RowError(
            "unknown-label",
            f"{preview(value)} may be {classes[index]!r}, class {index}, or its opposite; write the names",
        )
    return index


def parse_verdict(value: Any) -> bool:
    """Return whether a label says right. Raises `RowError` if it says neither right nor wrong."""
    key = _key(_label_name(value))
    for wrong, right in VERDICTS:
        if key in (wrong, right):
            return key == right
    raise RowError("unknown-label", f"expected true (right) or false (wrong); found {preview(value)}")


def preview_names(names: str) -> str:
    """Return a list of names as an error shows it, in at most 200 characters."""
    return names if len(names) <= 200 else names[:200] + "…"


def _label_name(value: Any) -> str:
    """Return a label as the name of a class, or "" if it cannot be one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        name = UNSEEN.sub("", str(value)).strip() if isinstance(value, str | int) else ""
    except ValueError:  # an integer of too many digits
        return ""
    if name.lower() == "nan":  # a missing value, as pandas writes it
        return ""
    return name.lower() if name.lower() in BOOLEANS else name


def _key(name: str) -> str:
    """Return what the names of one class share: the number, or the words without case."""
    if match := NUMBER.fullmatch(name):
        return str(int(match[1]))
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _class_name(key: str, counts: Counter[tuple[str, str]]) -> str:
    """Return the name of a class: its only one, its plainest one, or the most frequent one."""
    names: Counter[str] = Counter()
    for (name, _), count in counts.items():
        names[name] += count
    if key in BOOLEANS or (len(names) > 1 and key in names and NUMBER.fullmatch(key)):
        return key
    return min(names, key=lambda name: (-names[name], name))


def _aliases(key: str) -> list[str]:
    """Return what else a boolean, or 0 or 1, is called."""
    return [other for pair in zip(*POLAR[:2], strict=True) if key in pair for other in pair if other != key]


def _polarity(key: str) -> int | None:
    return next((pair.index(key) for pair in POLAR if key in pair), None)


def _check_distinct(spellings: Spellings) -> None:
    """Raise `UserError` if two labels may be one class or two."""
    names = {key: _class_name(key, counts) for key, counts in spellings.items()}
    for polarity in range(2):
        same = [pair[polarity] for pair in POLAR if pair[polarity] in names]
        if len(same) > 1:
            _refuse(names, same)
    numbers = [key for key in names if INTEGER.fullmatch(key)]
    words = [key for key in names if key not in numbers]
    if numbers and names.keys() & BOOLEANS.keys():
        _refuse(names, [*(key for key in BOOLEANS if key in names), *numbers])
    if len(words) > 1 and numbers and {int(key) for key in numbers} <= set(range(len(words))):
        _refuse(names, [*words, *numbers])  # the numbers may be indices of the words


def _refuse(names: dict[str, str], keys: list[str]) -> None:
    shown = preview_names(", ".join(names[key] for key in keys))
    raise UserError(
        f"labels: {shown} may be one class or several; write one of them everywhere, or name all classes in "
        "their order with 'classes' of the source"
    )
