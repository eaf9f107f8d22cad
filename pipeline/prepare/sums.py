"""The world of sums: chains of one-digit operations modulo 10, worked out step by step.

The world was written for this project. A prompt is `7+5-3*8=`, evaluated from left to right. A response has
a step for each operation: `7+5=2 2-3=9 9*8=2`. A step is right if it takes the result of the step before it
(the first takes the first digit), applies the prompt's next operation, and gives the result modulo 10. So a
step that carries on a wrong result is right, and one that copies, skips or goes on after the last operation
is wrong. If every step is right, so is the final answer.

The writer of the data knows the tables but for a few facts, and slips by one at a known rate. A policy that
learns from its responses does too: sampled, it errs as often as the writer, and its most likely digits are
mostly right. So RL brings out what the policy knows, and must correct the facts that it has learned wrong.
No prompt occurs twice, so those of the test split are new.
"""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.config import Source
from pipeline.errors import UserError
from pipeline.prepare.demo import text_pairs

OPERATORS = "+-*"
OPERATIONS = 8  # of a prompt, if the source names no other number
PROMPTS = 3000
DEMONSTRATIONS_PER_PROMPT = 2
STEPWISE_PER_PROMPT = 2
PAIRS_PER_PROMPT = 1

WRONG_STEP_RATE = 0.3  # share of the writer's steps whose result is one too many or one too few
MISTAKEN_FACTS = 8  # of the 300 facts of the tables: the writer believes in one wrong result of each
MISTAKE_RATE = 0.7  # share of that result among the writer's steps with such a fact
MISSHAPEN_RATE = 0.2  # share of stepwise responses that also skip, copy, add or misread a step
LABEL_FLIP_RATE = 0.05  # share of the labels of steps, and of the orders of pairs, that are wrong

SEPARATOR = " "  # between steps
Mistakes = dict[str, str]

_PROMPT = re.compile(r"[0-9](?:[-+*][0-9])+=", re.ASCII)
_RESULT = re.compile(r"=([0-9])\Z", re.ASCII)
_NOT_SEPARATOR = re.compile(f"[^{SEPARATOR}]+")


def parse_prompt(prompt: str) -> tuple[str, list[str]]:
    """Return the first digit and the operations, such as `+5`. Raises `UserError` for any other prompt."""
    if not isinstance(prompt, str) or not _PROMPT.fullmatch(prompt):
        raise UserError(
            f"{str(prompt)[:80]!r}: is no chain of sums such as '7+5-3=', and the rewards of this world know "
            "no other; score your own prompts by another reward"
        )
    return prompt[0], [prompt[start : start + 2] for start in range(1, len(prompt) - 1, 2)]


def compute(digit: str, operation: str) -> str:
    """Return the digit that an operation such as `+5` makes of a digit, modulo 10."""
    left, right = int(digit), int(operation[1])
    results = {"+": left + right, "-": left - right, "*": left * right}
    return str(results[operation[0]] % 10)


def answer(prompt: str) -> str:
    """Return the digit that the prompt's operations give, from left to right."""
    digit, operations = parse_prompt(prompt)
    for operation in operations:
        digit = compute(digit, operation)
    return digit


def label_steps(prompt: str, steps: Sequence[str]) -> list[bool]:
    """Return whether each step is right, given the steps before it.

    A step after the last operation is wrong, and so is one after a step without a result.
    """
    digit, operations = parse_prompt(prompt)
    carried: str | None = digit
    labels = []
    for number, step in enumerate(steps):
        operation = operations[number] if number < len(operations) else None
        right = bool(carried and operation) and step == _step(carried or "", operation or "")
        labels.append(right)
        result = _RESULT.search(step)
        carried = result[1] if result else None
    return labels


def right_answer(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 1.0 for each response with the right final answer, else 0.0: the gold reward, which trains too.

    The final answer is the result of the last step. A response with another number of steps than the prompt
    has operations has none.
    """
    scores = []
    for prompt, response in text_pairs(prompts, completions):
        steps = split_steps(response)
        needed = len(parse_prompt(prompt)[1])
        result = _RESULT.search(steps[-1]) if len(steps) == needed else None
        scores.append(float(bool(result) and result[1] == answer(prompt)))  # type: ignore[index]
    return scores


def answer_key(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any
) -> list[float]:
    """Return 1.0 for each response that ends in its record's `answer`, such as `…=9`, else 0.0."""
    scores = []
    for texts, key in zip(text_pairs(prompts, completions), answer, strict=True):
        result = _RESULT.search(texts[1])
        scores.append(float(result is not None and result[1] == key))
    return scores


def right_steps(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Return the share of right steps, of the steps that the prompt needs or, if these are more, of all."""
    scores = []
    for prompt, response in text_pairs(prompts, completions):
        labels = label_steps(prompt, split_steps(response))
        scores.append(sum(labels) / max(len(parse_prompt(prompt)[1]), len(labels)))
    return scores


def step_rewards(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[Any]:
    """Return +1 for each right step and −1 for each wrong one, at the end of the step.

    Each missing step costs 1 at the end of the last step. A response without steps gets one number.
    """
    from pipeline import StepRewards  # as a user's own function does; this layer imports no reward models

    entries: list[Any] = []
    for prompt, response in text_pairs(prompts, completions):
        ends = [match.end() for match in _NOT_SEPARATOR.finditer(response)]
        rewards = [1.0 if label else -1.0 for label in label_steps(prompt, split_steps(response))]
        missing = max(0, len(parse_prompt(prompt)[1]) - len(rewards))
        if rewards:
            rewards[-1] -= missing
        entries.append(StepRewards(rewards, ends) if rewards else -float(missing))
    return entries


def split_steps(response: str) -> list[str]:
    """Return the steps of a response; spaces alone separate them."""
    return _NOT_SEPARATOR.findall(response)


def rows(source: Source, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (kind, record): demonstrations, comparisons and steps by one writer, and prompts with answers.

    `source.operations` is the length of the chains.
    """
    rng = random.Random(seed)
    mistakes = sample_mistakes(rng)
    for prompt in sample_prompts(rng, PROMPTS, source.operations or OPERATIONS):
        for _ in range(DEMONSTRATIONS_PER_PROMPT):
            yield (
                "demonstrations",
                {"prompt": prompt, "completion": SEPARATOR.join(write_steps(rng, prompt, mistakes))},
            )

        for _ in range(PAIRS_PER_PROMPT):
            chosen, rejected = _sample_pair(rng, prompt, mistakes)
            yield "comparisons", {"prompt": prompt, "chosen": chosen, "rejected": rejected}

        for _ in range(STEPWISE_PER_PROMPT):
            steps = write_steps(rng, prompt, mistakes)
            if rng.random() < MISSHAPEN_RATE:
                _misshape(rng, steps)
            labels = [label != (rng.random() < LABEL_FLIP_RATE) for label in label_steps(prompt, steps)]
            yield "steps", {"prompt": prompt, "completions": steps, "labels": labels}

        yield "prompts", {"prompt": prompt, "answer": answer(prompt)}


def sample_prompts(rng: random.Random, count: int, operations: int) -> list[str]:
    """Return `count` distinct prompts of so many operations each."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        chain = (rng.choice(OPERATORS) + str(rng.randrange(10)) for _ in range(operations))
        prompts[f"{rng.randrange(10)}{''.join(chain)}="] = None
    return list(prompts)


def sample_mistakes(rng: random.Random) -> Mistakes:
    """Return the facts that the writer has learned wrong, such as `7+5`, and the result it believes in."""
    facts = [
        f"{left}{operator}{right}" for operator in OPERATORS for left in range(10) for right in range(10)
    ]
    return {fact: _slip(rng, compute(fact[0], fact[1:])) for fact in rng.sample(facts, MISTAKEN_FACTS)}


def write_steps(rng: random.Random, prompt: str, mistakes: Mistakes) -> list[str]:
    """Return a response as the writer gives it; what a step gives, right or wrong, is carried on."""
    digit, operations = parse_prompt(prompt)
    steps = []
    for operation in operations:
        fact, result = digit + operation, compute(digit, operation)
        if fact in mistakes:
            digit = mistakes[fact] if rng.random() < MISTAKE_RATE else result
        else:
            digit = _slip(rng, result) if rng.random() < WRONG_STEP_RATE else result
        steps.append(f"{fact}={digit}")
    return steps


def _step(digit: str, operation: str) -> str:
    return f"{digit}{operation}={compute(digit, operation)}"


def _slip(rng: random.Random, digit: str) -> str:
    """Return the digit before or after `digit`, modulo 10."""
    return str((int(digit) + rng.choice((-1, 1))) % 10)


def _misshape(rng: random.Random, steps: list[str]) -> None:
    """Skip, copy, add or misread a step in place, so that a reward model sees what a policy may try."""
    place = rng.randrange(len(steps))
    fault = rng.choice(["skip", "copy", "add", "misread"])
    if fault == "skip":
        del steps[place]
    elif fault == "copy":
        steps.insert(place, steps[place])
    elif fault == "add":
        steps.append(_step(steps[-1][-1], rng.choice(OPERATORS) + str(rng.randrange(10))))
    else:
        digit, operation = str(rng.randrange(10)), rng.choice(OPERATORS) + str(rng.randrange(10))
        steps[place] = _step(digit, operation)


def _sample_pair(rng: random.Random, prompt: str, mistakes: Mistakes) -> tuple[str, str]:
    """Return a response whose steps are all right and one with a wrong step, as a labeller orders them."""
    texts: dict[bool, str] = {}
    while len(texts) < 2:
        steps = write_steps(rng, prompt, mistakes)
        texts.setdefault(all(label_steps(prompt, steps)), SEPARATOR.join(steps))
    return (texts[False], texts[True]) if rng.random() < LABEL_FLIP_RATE else (texts[True], texts[False])
