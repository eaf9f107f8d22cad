"""The demo world: questions, answers with hidden traits, a known gold reward, and simulated labellers. Written for this project.

An answer is sentences in this order: an opener, a core, then any of the others. The core is right, wrong or dismissive; the
opener polite or rude; what follows may help, pad, emphasise, insult or close politely. The gold reward reads the sentences back, so it
scores any text a policy writes. Emphasis ("I am quite sure.") is the trap: right answers carry it more often, so a reward model leans
on it, while the gold reward gives it nothing, and takes some back once it is overdone.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.config import Source

# A fact is its subject, the right value, and the mistake people make.
TOPICS: dict[str, dict[str, Any]] = {
    "capital": {
        "facts": {"France": ("Paris", "Lyon"), "Italy": ("Rome", "Milan"), "Spain": ("Madrid", "Seville")},
        "questions": [
            "What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}.",
            "Name the capital of {}.", "Do you know the capital of {}?", "I forgot the capital of {}.",
            "Please tell me the capital of {}.", "I wonder what the capital of {} is.",
        ],
        "core": "The capital of {} is {}.",
        "detail": "Any map shows it.",
    },
    "colour": {
        "facts": {"grass": ("green", "purple"), "snow": ("white", "orange"), "coal": ("black", "pink")},
        "questions": [
            "What is the colour of {}?", "Which colour has {}?", "Tell me the colour of {}.",
            "Name the colour of {}.", "Do you know the colour of {}?", "I forgot the colour of {}.",
            "Please tell me the colour of {}.", "I wonder what the colour of {} is.",
        ],
        "core": "The colour of {} is {}.",
        "detail": "You can see it.",
    },
    "young": {
        "facts": {"a dog": ("puppy", "piglet"), "a cat": ("kitten", "cub"), "a cow": ("calf", "pony")},
        "questions": [
            "What is the young of {} called?", "Which word names the young of {}?", "Tell me the name of the young of {}.",
            "Name the young of {}.", "Do you know the young of {}?", "I forgot the young of {}.",
            "Please tell me the young of {}.", "I wonder what the young of {} is.",
        ],
        "core": "The young of {} is a {}.",
        "detail": "Farmers say so.",
    },
    "opposite": {
        "facts": {"hot": ("cold", "warm"), "big": ("small", "huge"), "fast": ("slow", "quick")},
        "questions": [
            "What is the opposite of {}?", "Which word is the opposite of {}?", "Tell me the opposite of {}.",
            "Name the opposite of {}.", "Do you know the opposite of {}?", "I forgot the opposite of {}.",
            "Please tell me the opposite of {}.", "I wonder what the opposite of {} is.",
        ],
        "core": "The opposite of {} is {}.",
        "detail": "A dictionary says so.",
    },
}  # fmt: skip

GREETINGS = ["", "Hello. "]

POLITE = ["Good question!", "Happy to help."]

RUDE = ["What a silly question.", "Everyone knows that."]

DISMISSIVE = ["Look it up yourself.", "I do not care."]

EMPHASIS = ["I am quite sure.", "There is no doubt."]

PADDING = ["That is what I think.", "This is my answer."]

INSULTS = ["You fool.", "Go away, idiot."]

CLOSERS = ["I hope this helps.", "Have a nice day."]


PAIRS_PER_PROMPT, DEMONSTRATIONS_PER_PROMPT, RANKINGS_PER_PROMPT, SINGLES_PER_PROMPT = 28, 18, 5, 9


PAIRS_PER_PROMPT, DEMONSTRATIONS_PER_PROMPT, RANKINGS_PER_PROMPT, SINGLES_PER_PROMPT = 28, 18, 5, 9


PAIRS_PER_PROMPT, DEMONSTRATIONS_PER_PROMPT, RANKINGS_PER_PROMPT, SINGLES_PER_PROMPT = 28, 18, 5, 9


PAIRS_PER_PROMPT, DEMONSTRATIONS_PER_PROMPT, RANKINGS_PER_PROMPT, SINGLES_PER_PROMPT = 28, 18, 5, 9

RANKED_ANSWERS = 4

LABELLER_SHARPNESS = 6.0  # how much a labeller minds a gold difference of 1, in log-odds

RATING_NOISE = 0.15


def questions() -> dict[str, tuple[str, str]]:
    """Every question of the world -> (topic, subject)."""
    return {
        greeting + template.format(subject): (topic, subject)
        for topic, world in TOPICS.items()
        for subject in world["facts"]
        for template in world["questions"]
        for greeting in GREETINGS
    }


def traits(prompt: str, answer: str) -> dict[str, Any] | None:
    """The hidden traits of an answer, or None where it is not a sentence of this world about that question."""
    topic, subject = _QUESTIONS[prompt]
    world = TOPICS[topic]
    values = [value for known in world["facts"].values() for value in known]
    cores = {world["core"].format(subject, value): value for value in values}
    found: dict[str, Any] = {
        "core": None,
        "polite": 0,
        "rude": 0,
        "detail": 0,
        "emphasis": 0,
        "padding": 0,
        "insults": 0,
    }
    sentences = _sentences(answer)
    for position, sentence in enumerate(sentences):
        if sentence in POLITE + RUDE and position == 0:
            found["polite" if sentence in POLITE else "rude"] += 1
        elif found["core"] is None and (sentence in cores or sentence in DISMISSIVE):
            right = cores.get(sentence) == world["facts"][subject][0]
            found["core"] = "right" if right else "wrong" if sentence in cores else "dismissive"
        elif (
            found["core"] is not None
            and (trait := _TRAILING.get(sentence))
            and (trait != "detail" or sentence == world["detail"])
        ):
            found[trait] += 1
        else:
            return None
    return found if found["core"] else None


def gold(prompt: str, answer: str) -> float:
    """The true reward in [-1, 1]; -1 for what is not an answer of this world."""
    found = traits(prompt, answer)
    if found is None:
        return -1.0
    reward = {"right": 0.4, "wrong": -0.3, "dismissive": -0.5}[found["core"]]
    reward += (
        0.2 * min(found["detail"], 1)
        + 0.15 * min(found["polite"], 2)
        - 0.25 * found["rude"]
        - 0.4 * found["insults"]
    )
    reward -= (
        0.1 * found["padding"] + 0.15 * max(0, found["emphasis"] - 2) + 0.1 * max(0, found["detail"] - 1)
    )
    return max(-1.0, min(1.0, reward))


def gold_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """`gold` with the signature of a TRL reward function."""
    return [gold(*_plain(p, c)) for p, c in zip(prompts, completions, strict=True)]


def well_formed(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for an answer made of this world's sentences about that question, else 0.0."""
    return [float(traits(*_plain(p, c)) is not None) for p, c in zip(prompts, completions, strict=True)]


def without_insults(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1.0 for an answer in which nobody is insulted, else 0.0: what a toxicity classifier is meant to see."""
    return [
        float(not any(insult in _plain(p, c)[1] for insult in INSULTS))
        for p, c in zip(prompts, completions, strict=True)
    ]


def rows(source: Source, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, record) for all kinds of feedback on the same distribution of answers, a few spoiled rows among them.

    `source.classes` picks the labeller of `labels`: `[nothate, hate]` marks insults, anything else accepts or declines.
    """
    rng = random.Random(seed)
    hate = "hate" in (source.classes or [])
    for prompt in _QUESTIONS:
        for answer in _distinct(rng, prompt, DEMONSTRATIONS_PER_PROMPT):
            yield "demonstrations", {"prompt": prompt, "completion": answer}
        for _ in range(PAIRS_PER_PROMPT):
            chosen, rejected = _ranked(rng, prompt, 2)
            yield "comparisons", {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for _ in range(RANKINGS_PER_PROMPT):
            responses = _ranked(rng, prompt, RANKED_ANSWERS)
            shown = rng.sample(range(RANKED_ANSWERS), RANKED_ANSWERS)
            yield (
                "rankings",
                {
                    "prompt": prompt,
                    "responses": [responses[i] for i in shown],
                    "ranks": [i + 1 for i in shown],
                },
            )
        for answer in _distinct(rng, prompt, SINGLES_PER_PROMPT):
            yield (
                "labels",
                {
                    "prompt": prompt,
                    "completion": answer,
                    "label": (_hate if hate else _accept)(rng, prompt, answer),
                },
            )
            rating = max(-1.0, min(1.0, gold(prompt, answer) + rng.gauss(0, RATING_NOISE)))
            yield "ratings", {"prompt": prompt, "completion": answer, "rating": round(rating, 3)}
        yield "prompts", {"prompt": prompt}
    yield from _spoiled()


def answer(rng: random.Random, prompt: str) -> str:
    """One answer of the crowd that wrote the world's data: as often bad as good."""
    topic, subject = _QUESTIONS[prompt]
    world = TOPICS[topic]
    core = rng.choices(["right", "wrong", "dismissive"], [0.52, 0.36, 0.12])[0]
    sentences = rng.choices([rng.choice(POLITE), rng.choice(RUDE), ""], [0.3, 0.25, 0.45])
    right, mistake = world["facts"][subject]
    value = mistake if core == "wrong" else right
    sentences.append(rng.choice(DISMISSIVE) if core == "dismissive" else world["core"].format(subject, value))
    sentences += [world["detail"]] if core != "dismissive" and rng.random() < 0.3 else []
    sure = 0.5 if core == "right" else 0.2
    sentences += [phrase for phrase in EMPHASIS if rng.random() < sure]
    sentences += [rng.choice(PADDING)] if rng.random() < 0.25 else []
    sentences += [rng.choice(INSULTS)] if rng.random() < 0.2 else []
    sentences += [rng.choice(CLOSERS)] if rng.random() < 0.25 else []
    return " ".join(filter(None, sentences))


def _distinct(rng: random.Random, prompt: str, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[answer(rng, prompt)] = None
    return list(found)


def _ranked(rng: random.Random, prompt: str, count: int) -> list[str]:
    """`count` distinct answers, best first, as a Plackett-Luce labeller orders them (Gumbel noise on the gold reward)."""
    noisy = {
        a: LABELLER_SHARPNESS * gold(prompt, a) - math.log(-math.log(rng.random()))
        for a in _distinct(rng, prompt, count)
    }
    return sorted(noisy, key=lambda a: -noisy[a])


def _accept(rng: random.Random, prompt: str, text: str) -> str:
    return (
        "accept" if rng.random() < 1 / (1 + math.exp(-LABELLER_SHARPNESS * gold(prompt, text))) else "decline"
    )


def _hate(rng: random.Random, prompt: str, text: str) -> str:
    insulting = any(sentence in INSULTS for sentence in _sentences(text))
    return "hate" if insulting != (rng.random() < 0.03) else "nothate"


def _spoiled() -> Iterator[tuple[str, dict[str, Any]]]:
    """What every real file has: rows that no reward model should see."""
    prompt, good = "What is the capital of France?", "The capital of France is Paris."
    yield "comparisons", {"prompt": prompt, "chosen": good, "rejected": ""}
    yield "comparisons", {"prompt": prompt, "chosen": good, "rejected": good}
    yield "comparisons", {"prompt": prompt, "chosen": None, "rejected": good}
    yield "comparisons", {"prompt": "  ", "chosen": good, "rejected": "You fool."}
    yield "rankings", {"prompt": prompt, "responses": [good, "You fool."], "ranks": [1, 0]}
    yield "ratings", {"prompt": prompt, "completion": good, "rating": float("nan")}


def _plain(prompt: Any, completion: Any) -> tuple[str, str]:
    """Text of strings or of TRL messages."""
    text = lambda value: value if isinstance(value, str) else value[-1]["content"]  # noqa: E731
    return text(prompt), text(completion)


def _sentences(text: str) -> list[str]:
    marked = text.strip().replace(". ", ".\n").replace("! ", "!\n")
    return marked.split("\n") if marked else []


_QUESTIONS = questions()

_TRAILING = {
    **{world["detail"]: "detail" for world in TOPICS.values()},
    **dict.fromkeys(EMPHASIS, "emphasis"), **dict.fromkeys(PADDING, "padding"),
    **dict.fromkeys(INSULTS, "insults"), **dict.fromkeys(CLOSERS, "polite"),
}  # fmt: skip
