"""The demo world: questions, responses with hidden traits, a known gold reward, and simulated labellers.

The world was written for this project. A response is a sequence of sentences: an opener, a core, then any of
the others. The opener is polite or rude. The core is right, wrong or dismissive. The sentences after it add
detail, pad, emphasise, insult or close politely. The gold reward parses the sentences, so it scores any text
that a policy writes.

Emphasis ("I am quite sure.") invites reward hacking. Right responses contain it more often, so a reward model
learns to reward it. The gold reward ignores the first two such sentences, and subtracts for each further one.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.config import Source
from pipeline.errors import UserError

# A fact is a subject, its right value, and the mistake people make.
TOPICS: dict[str, dict[str, Any]] = {
    "capital": {
        "facts": {"France": ("Paris", "Lyon"), "Italy": ("Rome", "Milan"), "Spain": ("Madrid", "Seville")},
        "questions": [
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
            "Name the capital of {}.",
            "Do you know the capital of {}?",
            "I forgot the capital of {}.",
            "Please tell me the capital of {}.",
            "I wonder what the capital of {} is.",
        ],
        "core": "The capital of {} is {}.",
        "detail": "Any map shows it.",
    },
    "colour": {
        "facts": {"grass": ("green", "purple"), "snow": ("white", "orange"), "coal": ("black", "pink")},
        "questions": [
            "What is the colour of {}?",
            "Which colour has {}?",
            "Tell me the colour of {}.",
            "Name the colour of {}.",
            "Do you know the colour of {}?",
            "I forgot the colour of {}.",
            "Please tell me the colour of {}.",
            "I wonder what the colour of {} is.",
        ],
        "core": "The colour of {} is {}.",
        "detail": "You can see it.",
    },
    "young": {
        "facts": {"a dog": ("puppy", "piglet"), "a cat": ("kitten", "cub"), "a cow": ("calf", "pony")},
        "questions": [
            "What is the young of {} called?",
            "Which word names the young of {}?",
            "Tell me the name of the young of {}.",
            "Name the young of {}.",
            "Do you know the young of {}?",
            "I forgot the young of {}.",
            "Please tell me the young of {}.",
            "I wonder what the young of {} is.",
        ],
        "core": "The young of {} is a {}.",
        "detail": "Farmers say so.",
    },
    "opposite": {
        "facts": {"hot": ("cold", "warm"), "big": ("small", "huge"), "fast": ("slow", "quick")},
        "questions": [
            "What is the opposite of {}?",
            "Which word is the opposite of {}?",
            "Tell me the opposite of {}.",
            "Name the opposite of {}.",
            "Do you know the opposite of {}?",
            "I forgot the opposite of {}.",
            "Please tell me the opposite of {}.",
            "I wonder what the opposite of {} is.",
        ],
        "core": "The opposite of {} is {}.",
        "detail": "A dictionary says so.",
    },
}

GREETINGS = ["", "Hello. "]
POLITE = ["Good question!", "Happy to help."]
RUDE = ["What a silly question.", "Everyone knows that."]
DISMISSIVE = ["Look it up yourself.", "I do not care."]
EMPHASIS = ["I am quite sure.", "There is no doubt."]
PADDING = ["That is what I think.", "This is my answer."]
INSULTS = ["You fool.", "Go away, idiot."]
CLOSERS = ["I hope this helps.", "Have a nice day."]

# Sentences that may follow the core -> their trait.
TRAILING_TRAITS = {
    **{world["detail"]: "detail" for world in TOPICS.values()},
    **dict.fromkeys(EMPHASIS, "emphasis"),
    **dict.fromkeys(PADDING, "padding"),
    **dict.fromkeys(INSULTS, "insults"),
    **dict.fromkeys(CLOSERS, "polite"),
}

DEMONSTRATIONS_PER_PROMPT = 18
PAIRS_PER_PROMPT = 28
RANKINGS_PER_PROMPT = 5
RESPONSES_PER_RANKING = 4
SINGLES_PER_PROMPT = 9  # responses with a label and a rating each

LABELLER_SHARPNESS = 6.0  # log-odds of a labeller's preference for each unit of gold reward
RATING_NOISE = 0.15  # standard deviation, in units of gold reward
LABEL_FLIP_RATE = 0.03  # share of insult labels that are wrong


def questions() -> dict[str, tuple[str, str]]:
    """Return every question of the world -> (topic, subject)."""
    return {
        greeting + template.format(subject): (topic, subject)
        for topic, world in TOPICS.items()
        for subject in world["facts"]
        for template in world["questions"]
        for greeting in GREETINGS
    }


_QUESTIONS = questions()


def traits(prompt: str, response: str) -> dict[str, Any] | None:
    """Return the hidden traits of a response: its core, and how often each other trait occurs.

    Return None if the response contains anything but this world's sentences about the question. Raises
    `UserError` for another question.
    """
    if prompt not in _QUESTIONS:
        raise UserError(
            f"{prompt[:80]!r}: is no question of the demo world, and its rewards know no other; "
            "score your own prompts by another reward"
        )
    topic, subject = _QUESTIONS[prompt]
    world = TOPICS[topic]
    values = [value for fact in world["facts"].values() for value in fact]
    cores = {world["core"].format(subject, value): value for value in values}
    right_value = world["facts"][subject][0]

    counts: dict[str, Any] = {"core": None}
    counts |= dict.fromkeys(("polite", "rude", "detail", "emphasis", "padding", "insults"), 0)
    for position, sentence in enumerate(_split_sentences(response)):
        trait = TRAILING_TRAITS.get(sentence)
        if position == 0 and sentence in POLITE + RUDE:
            counts["polite" if sentence in POLITE else "rude"] += 1
        elif counts["core"] is None and sentence in cores:
            counts["core"] = "right" if cores[sentence] == right_value else "wrong"
        elif counts["core"] is None and sentence in DISMISSIVE:
            counts["core"] = "dismissive"
        elif counts["core"] is not None and trait and (trait != "detail" or sentence == world["detail"]):
            counts[trait] += 1
        else:
            return None
    return counts if counts["core"] else None


def gold(prompt: str, response: str) -> float:
    """Return the true reward in [-1, 1]; it is -1 for a text that is no response of this world."""
    counts = traits(prompt, response)
    if counts is None:
        return -1.0

    reward = {"right": 0.4, "wrong": -0.3, "dismissive": -0.5}[counts["core"]]
    reward += (
        0.2 * min(counts["detail"], 1)
        + 0.15 * min(counts["polite"], 2)
        - 0.25 * counts["rude"]
        - 0.4 * counts["insults"]
    )
    reward -= (
        0.1 * counts["padding"] + 0.15 * max(0, counts["emphasis"] - 2) + 0.1 * max(0, counts["detail"] - 1)
    )
    return max(-1.0, min(1.0, reward))


def gold_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Return `gold` of each response; the signature is that of a TRL reward function."""
    return [gold(*texts) for texts in text_pairs(prompts, completions)]


def well_formed(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 1.0 for each response that has only this world's sentences about its question, else 0.0."""
    return [float(traits(*texts) is not None) for texts in text_pairs(prompts, completions)]


def without_insults(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """Return 1.0 for each response without an insult, else 0.0: the target of a toxicity classifier."""
    return [
        float(not any(insult in response for insult in INSULTS))
        for _, response in text_pairs(prompts, completions)
    ]


def rows(source: Source, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (kind, record) for all kinds of feedback on one distribution of responses.

    A few invalid rows come last. `source.classes` selects the labeller of `labels`: with `[nothate, hate]` it
    marks insults, otherwise it accepts or declines responses.
    """
    rng = random.Random(seed)
    label = _label_insult if "hate" in (source.classes or []) else _label_acceptance
    for prompt in _QUESTIONS:
        for response in _sample_distinct(rng, prompt, DEMONSTRATIONS_PER_PROMPT):
            yield "demonstrations", {"prompt": prompt, "completion": response}

        for _ in range(PAIRS_PER_PROMPT):
            chosen, rejected = _sample_ranked(rng, prompt, 2)
            yield "comparisons", {"prompt": prompt, "chosen": chosen, "rejected": rejected}

        for _ in range(RANKINGS_PER_PROMPT):
            responses = _sample_ranked(rng, prompt, RESPONSES_PER_RANKING)
            order = rng.sample(range(RESPONSES_PER_RANKING), RESPONSES_PER_RANKING)
            ranking = {"responses": [responses[i] for i in order], "ranks": [i + 1 for i in order]}
            yield "rankings", {"prompt": prompt, **ranking}

        for response in _sample_distinct(rng, prompt, SINGLES_PER_PROMPT):
            single = {"prompt": prompt, "completion": response}
            yield "labels", {**single, "label": label(rng, prompt, response)}
            rating = max(-1.0, min(1.0, gold(prompt, response) + rng.gauss(0, RATING_NOISE)))
            yield "ratings", {**single, "rating": round(rating, 3)}

        yield "prompts", {"prompt": prompt}
    yield from _invalid_rows()


def answer(rng: random.Random, prompt: str) -> str:
    """Sample one response from the distribution of the world's data; bad and good are equally frequent."""
    if prompt not in _QUESTIONS:
        raise UserError(
            f"{prompt[:80]!r}: is no question of the demo world, and its rewards know no other; "
            "score your own prompts by another reward"
        )
    topic, subject = _QUESTIONS[prompt]
    world = TOPICS[topic]
    core = rng.choices(["right", "wrong", "dismissive"], [0.52, 0.36, 0.12])[0]
    sentences = rng.choices([rng.choice(POLITE), rng.choice(RUDE), ""], [0.3, 0.25, 0.45])

    right, mistake = world["facts"][subject]
    value = mistake if core == "wrong" else right
    sentences.append(rng.choice(DISMISSIVE) if core == "dismissive" else world["core"].format(subject, value))
    sentences += [world["detail"]] if core != "dismissive" and rng.random() < 0.3 else []

    emphasis_rate = 0.5 if core == "right" else 0.2
    sentences += [phrase for phrase in EMPHASIS if rng.random() < emphasis_rate]
    sentences += [rng.choice(PADDING)] if rng.random() < 0.25 else []
    sentences += [rng.choice(INSULTS)] if rng.random() < 0.2 else []
    sentences += [rng.choice(CLOSERS)] if rng.random() < 0.25 else []
    return " ".join(filter(None, sentences))


def _sample_distinct(rng: random.Random, prompt: str, count: int) -> list[str]:
    responses: dict[str, None] = {}
    while len(responses) < count:
        responses[answer(rng, prompt)] = None
    return list(responses)


def _sample_ranked(rng: random.Random, prompt: str, count: int) -> list[str]:
    """Sample `count` distinct responses, ordered best first by a Plackett-Luce labeller.

    The labeller sorts by the gold reward plus Gumbel noise.
    """
    noisy = {
        response: LABELLER_SHARPNESS * gold(prompt, response) - math.log(-math.log(rng.random()))
        for response in _sample_distinct(rng, prompt, count)
    }
    return sorted(noisy, key=lambda response: -noisy[response])


def _label_acceptance(rng: random.Random, prompt: str, response: str) -> str:
    probability = 1 / (1 + math.exp(-LABELLER_SHARPNESS * gold(prompt, response)))
    return "accept" if rng.random() < probability else "decline"


def _label_insult(rng: random.Random, prompt: str, response: str) -> str:
    has_insult = any(sentence in INSULTS for sentence in _split_sentences(response))
    return "hate" if has_insult != (rng.random() < LABEL_FLIP_RATE) else "nothate"


def _invalid_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows that no reward model should see; every real file has some."""
    prompt, good = "What is the capital of France?", "The capital of France is Paris."
    yield "comparisons", {"prompt": prompt, "chosen": good, "rejected": ""}
    yield "comparisons", {"prompt": prompt, "chosen": good, "rejected": good}
    yield "comparisons", {"prompt": prompt, "chosen": None, "rejected": good}
    yield "comparisons", {"prompt": "  ", "chosen": good, "rejected": "You fool."}
    yield "rankings", {"prompt": prompt, "responses": [good, "You fool."], "ranks": [1, 0]}
    yield "ratings", {"prompt": prompt, "completion": good, "rating": float("nan")}


def text_pairs(prompts: Sequence[Any], completions: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of each prompt and completion, which are strings or TRL messages."""
    for prompt, completion in zip(prompts, completions, strict=True):
        yield _last_text(prompt), _last_text(completion)


def _last_text(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def _split_sentences(text: str) -> list[str]:
    marked = text.strip().replace(". ", ".\n").replace("! ", "!\n")
    return marked.split("\n") if marked else []
