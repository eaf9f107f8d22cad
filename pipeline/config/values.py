"""Refuse values that no key of a config can have, wherever they come from: a file, an override or a program.

A config is published: it is written into config.yaml, the manifest, the report and the model card. So it is
plain data (text, finite numbers, lists and mappings) and holds no credentials.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

MAX_DEPTH = 16  # of sections and lists inside each other; the deepest key of a recipe has 4
MAX_INTEGER = 2**63 - 1  # what torch, Arrow and JSON readers hold
CREDENTIALS = re.compile(
    r"://[^/\s?#]*@"  # https://user:password@host
    r"|[?&](?i:\w*token|\w*key|password|secret|\w*signature|sig)="
    r"|\b(?:hf_|gh[pousr]_|sk-)[A-Za-z0-9]{30,}"
)


def check_values(values: Any) -> None:
    """Raise `ValueError` for a value that is no plain data, is out of range, or contains credentials.

    The message begins with the dotted key of the value.
    """
    for place, value in _leaves(values, ()):
        if problem := _find_problem(value):
            raise ValueError(f"{'.'.join(place) or 'config'}: {problem}")


def check_server_url(key: str, url: str, server: str) -> str:
    """Return the URL of a server without a slash at its end. Raises `ValueError` if it has more than that.

    `server` begins the names of the environment variables that its key is in.
    """
    parts = urlsplit(url)
    is_http = parts.scheme in ("http", "https")
    if not is_http or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.hostname or ''}…" if is_http else shorten(url)
        raise ValueError(
            f"{key}: {shown}: expected http://host:port alone; "
            f"a key goes into the environment as {server}_API_KEY, and this URL as {server}_API_URL"
        )
    return url.rstrip("/")


def nearest(name: str, known: Any) -> str:
    """Return `; did you mean …?` for an error message, or an empty string if no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def shorten(value: Any, limit: int = 80) -> str:
    """Return the `repr` of a value, at most `limit` characters of it."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def explain_text(key: str, value: Any) -> str:
    """Return the problem of a key that is text and has a value that YAML reads as something else, or ""."""
    if value is not None and not isinstance(value, bool | int | float):
        return ""
    spelled = json.dumps(value)
    return (
        f"{key}={spelled}: expected text, which YAML reads so in quotes: '\"{spelled}\"' on the command line"
    )


def map_text(change: Callable[[str], str], values: Any) -> Any:
    """Return plain data with `change` applied to each text in it, except keys."""
    if isinstance(values, dict):
        return {key: map_text(change, value) for key, value in values.items()}
    if isinstance(values, list):
        return [map_text(change, value) for value in values]
    return change(values) if isinstance(values, str) else values


def _leaves(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each scalar and each key with its place. Sections that are objects already are skipped."""
    if len(place) > MAX_DEPTH:
        raise ValueError(f"{'.'.join(place[:4])}…: more than {MAX_DEPTH} sections inside each other")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{'.'.join((*place, shorten(key)))}: expected text as a key; quote it")
            yield (*place, "a key"), key
            yield from _leaves(inner, (*place, key if key.isprintable() else shorten(key)))
    elif isinstance(value, list | tuple | set | frozenset):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*place, str(index)))
    elif not isinstance(value, BaseModel):
        yield place, value


def _find_problem(value: Any) -> str:
    """Return what is wrong with a scalar, or an empty string."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"found {value}; expected a finite number"
    if isinstance(value, int):
        return "" if abs(value) <= MAX_INTEGER else "found an integer of more than 64 bits; lower it"
    if not isinstance(value, str):
        return f"found a {type(value).__name__}; expected text, a number, true, false, a list or a mapping"
    if "\0" in value or (not value.isprintable() and _has_surrogates(value)):
        return f"{shorten(value)}: not valid Unicode text; write it in UTF-8"
    if CREDENTIALS.search(value):
        return (
            "contains a password or token, which would be written into config.yaml, the manifest and the "
            "model card; remove it: a key goes into the environment as REWARD_API_KEY, a token as HF_TOKEN"
        )
    return ""


def _has_surrogates(value: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in value)
