"""Exports of the labelling tools Label Studio and Argilla. Imports no torch.

A task is a prompt and responses, which are known by the beginnings of their names: `answer1` and `answer2`.
Each verdict of an annotator gives a record: a comparison, a ranking or a rating.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.data.messages import preview
from pipeline.data.schema import Record, RowError
from pipeline.data.shapes.fields import Part, compare, read_list, read_object, read_objects

PROMPTS = ("prompt", "instruction", "question", "context")
RESPONSES = ("answer", "response", "completion", "output", "reply", "summary", "text", "generation")
SIDES = {"left": "a", "right": "b"}  # of Label Studio's Pairwise; left is the first response by name
TIES = ("tie", "equal", "same")
NOT_JUDGED = RowError("not-judged", "no annotator compared, ranked or rated a response")


def read_label_studio(row: Record) -> list[Part]:
    """Read a task of Label Studio's JSON or JSON_MIN, with the tags Pairwise, Ranker and Rating."""
    task = read_object(row, "data") if "annotations" in row else row
    parts: list[Part] = []
    rated: set[str] = set()
    for question, verdict in _label_studio_verdicts(row):
        if "selected" in verdict:
            parts.append(_compare_sides(task, verdict["selected"]))
        elif "ranker" in verdict:
            parts.append(_rank_items(task, verdict["ranker"]))
        elif "rating" in verdict:
            rated.add(question)
            parts.append(_rate(task, verdict["rating"], rated))
    return parts or [NOT_JUDGED]


def _label_studio_verdicts(row: Record) -> Iterator[tuple[str, Record]]:
    """Yield (tag, value) of each result: JSON has a list of annotations, JSON_MIN a column for each tag."""
    if "annotations" in row:
        for annotation in read_objects(row, "annotations"):
            for result in read_objects(annotation, "result") if not annotation.get("was_cancelled") else ():
                yield str(result.get("from_name")), read_object(result, "value")
        return
    for name, values in row.items():
        for value in values if isinstance(values, list) else ():
            if isinstance(value, dict) and "id" not in value:  # not an item to rank
                yield name, value


def read_argilla(row: Record) -> list[Part]:
    """Read a record of Argilla, nested (`to_json`) or flat (`to_datasets`).

    A number is a rating, a list a ranking, and the name of a field the preferred one of two.
    """
    task = read_object(row, "fields") if "fields" in row else row
    parts: list[Part] = []
    rated: set[str] = set()
    for question, verdict in _argilla_verdicts(row):
        if isinstance(verdict, int | float) and not isinstance(verdict, bool):
            rated.add(question)
            parts.append(_rate(task, verdict, rated))
        elif isinstance(verdict, list):
            names = [item.get("value") if isinstance(item, dict) else item for item in verdict]
            parts.append(_rank(task, [_read_field(task, name) for name in names]))
        elif isinstance(verdict, str) and verdict in task and verdict.startswith(RESPONSES):
            parts.append(_compare_fields(task, verdict))
        elif isinstance(verdict, str) and verdict.strip().lower() in TIES:
            parts.append(_compare_fields(task, None))
    return parts or [NOT_JUDGED]


def _argilla_verdicts(row: Record) -> Iterator[tuple[str, Any]]:
    """Yield (question, value) of each response that its annotator submitted."""
    if "fields" in row:
        questions = read_object(row, "responses")
        for question in questions:
            for response in read_objects(questions, question):
                if response.get("status") in (None, "submitted"):
                    yield question, response.get("value")
        return
    for name in row:
        if name.endswith(".responses") and row[name] is not None:
            values = read_list(row, name)
            statuses = row.get(f"{name}.status") or ["submitted"] * len(values)
            for value, status in zip(values, statuses, strict=False):
                if status in (None, "submitted"):
                    yield name, value


def _find_prompt(task: Record) -> Any:
    names = [name for name in PROMPTS if task.get(name) is not None]
    if not names:
        raise RowError(
            "wrong-shape", f"expected a field {' or '.join(PROMPTS)}, found {', '.join(task)[:80]}"
        )
    return task[names[0]]


def _find_responses(task: Record, count: int) -> list[str]:
    """Return the names of the fields that hold the responses, in order."""
    names = sorted(name for name in task if name.startswith(RESPONSES) and isinstance(task[name], str | list))
    names = [name for name in names if ".responses" not in name and ".suggestion" not in name]
    if len(names) != count:
        raise RowError(
            "wrong-shape",
            f"expected {count} response{'s' * (count > 1)} by the names of the fields "
            f"({', '.join(RESPONSES)}), found {', '.join(names) or 'none'}",
        )
    return names


def _read_field(task: Record, name: Any) -> Any:
    if not isinstance(name, str) or name not in task:
        raise RowError("wrong-shape", f"a ranking has {preview(name)}, which is the name of no field")
    return task[name]


def _compare_fields(task: Record, winner: str | None) -> Part:
    """Return the comparison of the task's two responses; `winner` is the field of one, or None for a tie."""
    a, b = _find_responses(task, 2)
    return compare(_find_prompt(task), task[a], task[b], {a: "a", b: "b"}.get(str(winner), "tie"))


def _compare_sides(task: Record, side: Any) -> Part:
    if not isinstance(side, str) or side not in SIDES:
        raise RowError("no-winner", f"selected: expected left or right, found {preview(side)}")
    a, b = _find_responses(task, 2)
    return compare(_find_prompt(task), task[a], task[b], SIDES[side])


def _rank_items(task: Record, order: Any) -> Part:
    """Return the ranking of a task's items by their ids. Buckets have no order."""
    if isinstance(order, dict):
        lists = [ids for name, ids in order.items() if name != "_"]
        order = lists[0] if len(lists) == 1 else None
    if not isinstance(order, list):
        raise RowError("wrong-shape", "ranker: expected one ranked list; buckets are not ordered")
    lists = [value for value in task.values() if isinstance(value, list)]
    items = [item for value in lists for item in value if isinstance(item, dict)]
    texts = {
        str(item["id"]): item.get("body") or item.get("html") or item.get("title")
        for item in items
        if "id" in item
    }
    return _rank(task, [_read_field(texts, str(identity)) for identity in order])


def _rank(task: Record, responses: list[Any]) -> Part:
    ranks = list(range(1, len(responses) + 1))
    return {"prompt": _find_prompt(task), "responses": responses, "ranks": ranks}


def _rate(task: Record, rating: Any, questions: set[str]) -> Part:
    """Return the rating of the task's one response. Two questions have ratings that cannot be one."""
    if len(questions) > 1:
        raise RowError("wrong-shape", f"expected one rating, found those of {', '.join(sorted(questions))}")
    (name,) = _find_responses(task, 1)
    return {"prompt": _find_prompt(task), "completion": task[name], "rating": rating}
