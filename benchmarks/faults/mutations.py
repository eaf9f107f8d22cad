"""Tables of mutations: values that do not belong where they are put, and changes of the bytes of a file."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Random = random.Random
Place = tuple[str | int, ...]  # keys and indices from the root of a JSON value

# Text that `to_json` writes as it is, where `json.dumps` would refuse or escape it.
RAW = {
    "deep": "[" * 600 + "]" * 600,
    "deeper": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits": "9" * 5000,
    "exponent": "1e99999",
    "nan": "NaN",
    "infinity": "-Infinity",
    "twice": '{"role": "user", "role": "assistant", "content": "one", "content": "two"}',
    "surrogate": '"\\ud800 alone"',
}
MESSAGES = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "An apple."}]
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "fraction": 0.5,
    "large": 10**30,
    "largest double": 1.7e308,
    "empty text": "",
    "blank": " \t\n",
    "text": "x",
    "number as text": "1.0",
    "path up": "../../etc/passwd",
    "empty list": [],
    "list": [1, "a", None],
    "lists": [[[1]], [[2]]],
    "empty object": {},
    "object": {"a": {"b": [1]}},
    "messages": MESSAGES,
    "message without content": [{"role": "user"}],
    "content of another type": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    "role of another type": [{"role": 5, "content": "x"}],
    **{name: f"@{name}@" for name in RAW},
}
# Texts in which there is nothing to learn, or of which no reader can say what they mean.
NOT_TEXT = {
    "invisible": "\u200b\u200d\u2060\ufeff",
    "controls": "\x00\x07\x1b[2J"[:2],
    "messages as Python": str(MESSAGES),
    "messages as JSON": json.dumps(MESSAGES),
    "messages as numpy": "[{'role': 'user', 'content': 'Fruit?'}\n {'role': 'assistant', 'content': 'Kiwi'}]",
}
ByteChange = Callable[[bytes, Random], bytes]


def to_json(value: Any) -> str:
    """Return the JSON of a value, with raw text in place of its names."""
    text = json.dumps(value, ensure_ascii=False)
    for name, raw in RAW.items():
        text = text.replace(f'"@{name}@"', raw)
    return text


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Yield the place of each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def mutate_value(value: Any, rng: Random, values: dict[str, Any] | None = None) -> tuple[Any, str]:
    """Return a copy of a JSON object with one value replaced, removed or renamed, and what was done."""
    candidates = list(places(value))
    if not candidates:
        return {"added": 1}, "a key added"
    changed, place = copy.deepcopy(value), rng.choice(candidates)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    name = ".".join(map(str, place))
    how = rng.choice(["replace"] * 6 + ["remove", "rename"])
    if how == "replace":
        kind, new = rng.choice(list((values or VALUES).items()))
        parent[place[-1]] = copy.deepcopy(new)
        return changed, f"{name} is {kind}"
    old = parent.pop(place[-1])
    if how == "rename" and isinstance(parent, dict):
        parent[f" {place[-1]}"] = old
    return changed, f"{name} {how}d"


def _at(change: Callable[[bytes, int, Random], bytes]) -> ByteChange:
    """Return a change at a random byte; an empty file becomes a byte."""
    return lambda data, rng: change(data, rng.randrange(len(data)), rng) if data else b"\0"


BYTE_CHANGES: dict[str, ByteChange] = {
    "flip": _at(lambda data, at, rng: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]),
    "cut": _at(lambda data, at, _: data[:at]),
    "cut last byte": _at(lambda data, *_: data[:-1]),
    "delete": _at(lambda data, at, rng: data[:at] + data[at + rng.randint(1, 40) :]),
    "repeat": _at(lambda data, at, rng: data[:at] + data[max(0, at - rng.randint(1, 200)) :]),
    "NUL": _at(lambda data, at, _: data[:at] + b"\0" + data[at:]),
    "not UTF-8": _at(lambda data, at, _: data[:at] + b"\xff\xfe" + data[at:]),
    "quote": _at(lambda data, at, _: data[:at] + b'"' + data[at:]),
    "blank lines": _at(lambda data, at, _: data[:at] + b"\n\n\r\n" + data[at:]),
    "empty": lambda data, _: b"" if data else b"\n",
}


def change_bytes(data: bytes, rng: Random, how: str | None = None) -> tuple[bytes, str]:
    """Return other bytes than `data`, and what was done."""
    name = how or rng.choice(list(BYTE_CHANGES))
    for _ in range(20):
        changed = BYTE_CHANGES[name](data, rng)
        if changed != data:
            return changed, name
    return data + b"\0", "NUL"
