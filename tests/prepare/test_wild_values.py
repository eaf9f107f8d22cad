"""Whatever a column holds, `prepare` keeps or quarantines its row, or says in one line what to do."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import PrepareStage
from pipeline.data.columns import FORMATS, kind_of_format
from pipeline.data.schema import KINDS
from pipeline.errors import UserError
from pipeline.prepare.stage import _build_records

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}
GOOD: dict[str, Any] = {
    "prompt": "Q", "completion": "a", "chosen": "a", "rejected": "b", "response": "a", "text": "a",
    "messages": [USER, ANSWER], "responses": ["a", "b"], "ranks": [1, 2], "rank": 1, "rating": 1.5,
    "label": "yes", "label_shares": [0.25, 0.75], "completions": ["a", "b"], "labels": [True, False],
    "margin": 1, "source": "web", "preference": 0.75, "votes": 2, "answer": "7", "question": {}, "input": "a",
    "level": 1, "meta": {"a": 1},
}  # fmt: skip
NUMBERS = [2**31, 2**53 + 1, 9e18, 2**63, 2**64, -1, 1e39, 1e308, 10**400, 0.5, 1.0, float("nan")]
TEXTS = ["Q", "a", "", "1", "1.0", "no", "true", "\udc80", "[0.5, 0.5]", "[{'role': 'user', 'content': 'Q'}]"]
LISTS = [[0.5, 0.5], [1, 0], [0.75, 0.25], [2, 1], ["b", "a"], [USER], [ANSWER]]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=2)
WILD = st.recursive(
    LEAVES | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.sampled_from(LISTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "a", ""]), inner),
    max_leaves=5,
)
# What the user has to decide: no row can be kept, the types of a column, which labels are one class.
ONE_LINE = re.compile(r"none can be kept|ignore: \[|labels: ")


@st.composite
def sources(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]]]:
    """Draw a format and rows of it, each with wild values in some of its columns."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    columns = draw(st.sampled_from(FORMATS[format]))
    kind = KINDS[kind_of_format(format)]
    names = [*columns, *kind.optional, *(("answer", "level", "meta") if kind.keeps_columns else ())]
    rows = [{name: GOOD[name] for name in columns}]
    for _ in range(draw(st.integers(1, 5))):
        wild = draw(st.dictionaries(st.sampled_from(names), WILD, max_size=2))
        rows.append(rows[0] | {name: GOOD[name] for name in draw(st.sets(st.sampled_from(names)))} | wild)
    return format, rows


@settings(max_examples=60)
@given(sources(), st.sampled_from(["drop", "keep"]))
def test_every_row_is_kept_merged_or_quarantined(source: tuple[str, list[Any]], ties: str) -> None:
    format, rows = source
    with TemporaryDirectory() as folder:
        path, output = Path(folder, "a.jsonl"), Path(folder, "out")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        output.mkdir()
        config = PrepareStage(
            run="t",
            runs=folder,
            source=[{"format": format, "path": str(path)}],
            splits={"validation": 0, "test": 0},
            ties=ties,
        )
        try:
            counts = _build_records(config, output)["rows"]
        except UserError as error:
            if ONE_LINE.search(str(error)):
                return
            raise
        quarantined = sum(counts["quarantined"].values())
        assert counts["kept"] + counts["merged"] + quarantined == counts["read"] == len(rows)
        lines = (output / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == quarantined
        assert len(load_from_disk(str(output / kind_of_format(format)))["train"]) > 0
