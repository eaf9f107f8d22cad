"""Convert published feedback whose judgements span several columns into rows that `prepare` reads.

    python scripts/convert.py pandalm testset-v1.json pairs.jsonl
    python scripts/convert.py finegrained-qa dev_feedback.json rankings.jsonl

`pandalm` (WeOpenML/PandaLM): the votes of three annotators become the pair that the majority prefers. A tie,
or no majority, gives no row.

`finegrained-qa` (allenai/FineGrainedRLHF): judgements of all pairs of four responses become ranks, 1 is best.
Judgements that fit no single order give no row.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

EQUAL, FIRST, SECOND = 0, 1, 2
RESPONSES = 4  # finegrained-qa has four responses to each question


def convert_pandalm(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the pair of `response1` and `response2` that the majority of three annotators prefers.

    Return None if fewer than two of them prefer the same side.
    """
    votes = Counter(row[f"annotator{number}"] for number in (1, 2, 3))
    vote, count = votes.most_common(1)[0]
    if vote == EQUAL or count < 2:
        return None

    responses = row["response1"], row["response2"]
    chosen, rejected = responses if vote == FIRST else reversed(responses)
    prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def convert_finegrained_qa(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the passages and the question as the prompt, with four responses and their ranks.

    Return None if the judgements fit no single order.
    """
    pairs = list(zip(combinations(range(RESPONSES), 2), row["preference"], strict=True))

    num_better = [0] * RESPONSES  # how many responses are better than each
    for (first, second), judgement in pairs:
        if judgement != EQUAL:
            num_better[second if judgement == FIRST else first] += 1

    for (first, second), judgement in pairs:
        if judgement != judge_ranks(num_better[first], num_better[second]):
            return None

    passages = "\n\n".join(" ".join(sentences[1:]) for sentences in row["passages"])
    return {
        "prompt": f"{passages}\n\n{row['question']}",
        "responses": [row[f"prediction {number}"] for number in range(1, RESPONSES + 1)],
        "ranks": [count + 1 for count in num_better],
    }


def judge_ranks(first: int, second: int) -> int:
    """Return the judgement of a pair that these ranks imply; the smaller rank is better."""
    if first == second:
        return EQUAL
    return FIRST if first < second else SECOND


CONVERTERS = {"pandalm": convert_pandalm, "finegrained-qa": convert_finegrained_qa}


def main() -> None:
    """Convert one file and print how many rows were written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=CONVERTERS, help="the format of the published file")
    parser.add_argument("input", type=Path, help="the published JSON file")
    parser.add_argument("output", type=Path, help="the JSONL file to write")
    args = parser.parse_args()

    try:
        rows = json.loads(args.input.read_text(encoding="utf-8"))
        converted = [CONVERTERS[args.format](row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {args.input}: not a {args.format} file: {type(error).__name__}: {error}")

    kept = [row for row in converted if row is not None]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{args.output}: {len(kept)} of {len(rows)} rows; the others have no single judgement")


if __name__ == "__main__":
    main()
