"""Read judged steps in the forms in which PRM800K and Math-Shepherd are published. Imports no torch.

Out: records of the kind `steps`. Their texts and labels are checked later, by `pipeline.data.validation`.
"""

import re
from typing import Any

from pipeline.data.messages import preview
from pipeline.data.schema import Record, RowError

STEP_TAG = "ки"  # ends each step of Math-Shepherd
FIRST_STEP = re.compile(r"\bstep 1:", re.IGNORECASE)

Step = tuple[str, bool]  # its text, and whether it is right


def parse_tagged_steps(text: Any, labelled: Any) -> Record:
    """Split a solution of Math-Shepherd into its question, its steps and their labels.

    Wang et al. 2024, arXiv 2312.08935. `text` is the question and the steps, with a tag after each step, and
    `labelled` the same with + (right) or - (wrong) in place of the tags. The question ends before `Step 1:`
    or, without it, after the last question mark before the first tag. A few published questions contain a
    tag; it ends no step, so it goes with its label.

    Raises `RowError` if there is no tag, no first step, or if the two texts do not fit each other.
    """
    for name, value in (("input", text), ("label", labelled)):
        if not isinstance(value, str):
            raise RowError("not-text", f"{name}: expected text, found {type(value).__name__}")
    if STEP_TAG not in text:
        raise RowError("no-steps", f"input: the tag {STEP_TAG!r}, which ends a step, never occurs")
    labels = _read_signs(text, labelled)
    start = _find_first_step(text)
    *steps, rest = text[start:].split(STEP_TAG)
    if rest.strip():  # a step without a label, which the checks refuse
        steps.append(rest)
    return {
        "prompt": text[:start].replace(STEP_TAG, " ").strip(),
        "completions": [step.strip() for step in steps],
        "labels": labels[text.count(STEP_TAG, 0, start) :],
    }


def _read_signs(text: str, labelled: str) -> list[str]:
    """Return the + or - that `labelled` has in place of each tag of `text`."""
    *parts, rest = text.split(STEP_TAG)
    signs: list[str] = []
    place = 0
    for number, part in enumerate(parts, 1):
        end = place + len(part)
        sign = labelled[end : end + 1]
        if labelled[place:end] != part or sign not in ("+", "-"):
            raise RowError(
                "tag-mismatch", f"label: is not input with + or - in place of tag {number} of {len(parts)}"
            )
        signs.append(sign)
        place = end + 1
    if labelled[place:].strip() != rest.strip():
        raise RowError("tag-mismatch", f"label: differs from input after the last of {len(parts)} tags")
    return signs


def _find_first_step(text: str) -> int:
    """Return where the first step begins. Raises `RowError`."""
    if match := FIRST_STEP.search(text):
        return match.start()
    mark = text.rfind("?", 0, text.index(STEP_TAG))
    if mark < 0:
        raise RowError("no-steps", "input: neither 'Step 1:' nor a question mark ends the question")
    return mark + 1


def expand_trajectory(question: Any, label: Any) -> list[Record | RowError]:
    """Return the records of a labelled solution of PRM800K, and the reason for each step that is left out.

    Lightman et al. 2023, arXiv 2305.20050. A step has alternatives, of which one is chosen and goes on; each
    other one ends a response that begins with the steps chosen before it. So there is a record for each
    alternative that is not chosen, and one for the chosen path, unless another record begins with all of it.
    Ratings 1 and 0 are right and -1 is wrong: 0 is a step that is correct and makes no progress, and the
    paper counts it as right. A step that a labeller wrote is right. An alternative without a rating, and a
    flagged one, is left out; if it is the chosen one, so is the rest of the path.

    Raises `RowError` if the problem is reported as broken, or if a field is not as it is published.
    """
    if not isinstance(question, dict) or not isinstance(label, dict):
        raise RowError("no-steps", "question and label: expected an object each, as PRM800K has them")
    if label.get("finish_reason") == "bad_problem":
        raise RowError("bad-problem", "label: the labeller reported the problem as broken")
    shared = {"prompt": question.get("problem"), "answer": question.get("ground_truth_answer")}

    responses: list[list[Step] | RowError] = []
    path: list[Step] = []
    path_is_covered = False
    for number, step in enumerate(_read_list(label, "steps", "label"), 1):
        chosen, others = _read_alternatives(step, f"step {number}")
        responses += [other if isinstance(other, RowError) else [*path, other] for other in others]
        path_is_covered = any(not isinstance(other, RowError) for other in others)
        if not isinstance(chosen, tuple):
            responses += [chosen] if chosen else []
            break
        path, path_is_covered = [*path, chosen], False
    if path and not path_is_covered:
        responses.append(path)
    if not responses:
        raise RowError("no-steps", "label: no step has a completion")
    return [
        response if isinstance(response, RowError) else shared | _to_columns(response)
        for response in responses
    ]


def _to_columns(steps: list[Step]) -> Record:
    return {"completions": [text for text, _ in steps], "labels": [label for _, label in steps]}


def _read_alternatives(step: Any, name: str) -> tuple[Step | RowError | None, list[Step | RowError]]:
    """Return the step that goes on, or None without one, and the alternatives to it."""
    if not isinstance(step, dict):
        raise RowError("no-steps", f"{name}: expected an object, found {type(step).__name__}")
    completions = _read_list(step, "completions", name)
    chosen = step.get("chosen_completion")
    if chosen is not None and chosen not in range(len(completions)):
        raise RowError(
            "no-steps", f"{name}: chosen_completion is {preview(chosen)} of {len(completions)} completions"
        )
    read = [_read_rated(item, f"{name}, completion {place}") for place, item in enumerate(completions)]
    if chosen is not None:
        return read.pop(int(chosen)), read
    human = step.get("human_completion")
    human = human.get("text") if isinstance(human, dict) else human
    return None if human is None else (human, True), read


def _read_rated(completion: Any, name: str) -> Step | RowError:
    """Return a completion with its label, or why it is left out. Raises `RowError`."""
    if not isinstance(completion, dict):
        raise RowError("no-steps", f"{name}: expected an object, found {type(completion).__name__}")
    if completion.get("flagged"):
        return RowError("flagged", f"{name}: the labeller could not rate it")
    rating = completion.get("rating")
    if rating is None:
        return RowError("no-rating", f"{name}: its rating is null")
    if isinstance(rating, bool) or rating not in (-1, 0, 1):
        raise RowError("unknown-label", f"{name}: expected a rating of -1, 0 or 1; found {preview(rating)}")
    text: Any = completion.get("text")  # the checks refuse what is no text
    return text, rating >= 0


def _read_list(values: Record, key: str, name: str) -> list[Any]:
    value = values.get(key)
    if value is not None and not isinstance(value, list):
        raise RowError("no-steps", f"{name}: expected a list of {key}, found {type(value).__name__}")
    return value or []
