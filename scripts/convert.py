"""Published feedback whose judgements are spread over several columns -> rows that `prepare` reads.

    python scripts/convert.py pandalm testset-v1.json pairs.jsonl
    python scripts/convert.py finegrained-qa dev_feedback.json rankings.jsonl

`pandalm` (WeOpenML/PandaLM): three annotators' votes become the pair that most of them saw; a tie, or no majority, becomes no row.
`finegrained-qa` (allenai/FineGrainedRLHF): judgements of all pairs of four answers become ranks, 1 the best, where they fit one order.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

EQUAL, FIRST, SECOND = 0, 1, 2


def pandalm(row: dict[str, Any]) -> dict[str, Any] | None:
    """The pair in `response1` and `response2`, or None where fewer than two of `annotator1` to `annotator3` prefer one side."""
    vote, count = Counter(row[f"annotator{n}"] for n in (1, 2, 3)).most_common(1)[0]
    if vote == EQUAL or count < 2:
        return None
    better, worse = (row["response1"], row["response2"]) if vote == FIRST else (row["response2"], row["response1"])
    return {"prompt": "\n\n".join(filter(None, (row["instruction"], row["input"]))), "chosen": better, "rejected": worse}


def finegrained_qa(row: dict[str, Any]) -> dict[str, Any] | None:
    """The passages and the question with four answers and their ranks, or None where the judgements go round in a circle."""
    better = [0] * 4  # how many answers are better than each
    for (first, second), judgement in zip(combinations(range(4), 2), row["preference"], strict=True):
        if judgement != EQUAL:
            better[second if judgement == FIRST else first] += 1
    for (first, second), judgement in zip(combinations(range(4), 2), row["preference"], strict=True):
        seen = EQUAL if better[first] == better[second] else FIRST if better[first] < better[second] else SECOND
        if seen != judgement:
            return None
    passages = "\n\n".join(" ".join(sentences[1:]) for sentences in row["passages"])
    responses = [row[f"prediction {n}"] for n in (1, 2, 3, 4)]
    return {"prompt": f"{passages}\n\n{row['question']}", "responses": responses, "ranks": [count + 1 for count in better]}


CONVERTERS = {"pandalm": pandalm, "finegrained-qa": finegrained_qa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=CONVERTERS)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    try:
        rows = json.loads(args.input.read_text(encoding="utf-8"))
        found = [CONVERTERS[args.format](row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {args.input}: not a file of {args.format}: {type(error).__name__}: {error}")
    kept = [row for row in found if row is not None]
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    print(f"{args.output}: {len(kept)} of {len(rows)} rows; the others hold no one judgement")


if __name__ == "__main__":
    main()
