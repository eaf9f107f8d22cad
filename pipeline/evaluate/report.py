"""The report of a run: one HTML file with everything in it, readable without a network, in light and dark, on a phone and on a wall."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage
from pipeline.data.schema import Text
from pipeline.evaluate.metrics import frontier_points
from pipeline.evaluate.plots import LIGHT, draw_calibration, draw_curves, draw_frontier, draw_lengths
from pipeline.evaluate.summary import summary_rows as summary_rows
from pipeline.formatting.numbers import as_finite, format_number
from pipeline.formatting.tables import metric_tables

if TYPE_CHECKING:
    pass


def collect_report(
    config: EvaluateStage, inputs: dict[str, Artifact], metrics: dict[str, Any], sampled: dict[str, dict[str, list[Any]]],
    reliability: list[dict[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """What the report shows."""
    return {
        "title": config.run,
        "command": config.command,
        "summary": summary_rows(metrics),
        "metrics": {name: value for name, value in metrics.items() if name != "rows"},
        "rows": metrics["rows"],
        "records": records_by_split(inputs["records"]),
        "curves": {name: read_log(source) for name, source in inputs.items() if read_log(source)},
        "frontier": frontier_points(metrics),
        "fits": metrics["fits"],
        "lengths": {name: sampled[name]["response_tokens"] for name in ("sft", "ppo")},
        "measured": metrics["reward"],
        "calibration": reliability,
        "samples": paired_samples(config, sampled),
        "lineage": [
            *(_lineage(name, source) for name, source in inputs.items()),
            _own_lineage(config, inputs),
        ],
    }


def read_log(source: Artifact) -> list[dict[str, float]]:
    file = source.path / "log.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.is_file() else []


def paired_samples(
    config: EvaluateStage, sampled: dict[str, dict[str, list[Any]]], most: int = 40
) -> list[dict[str, Any]]:
    """The first answer of each policy to each prompt, with scores."""
    sft, ppo = sampled["sft"], sampled["ppo"]
    found = []
    for i, j in zip(
        range(0, len(sft["text"]), config.best_of),
        range(0, len(ppo["text"]), config.samples_per_prompt),
        strict=True,
    ):
        row = {"prompt": _prompt_as_text(sft["prompt"][i]), "sft": sft["text"][i], "ppo": ppo["text"][j]}
        for name, columns, k in (("sft", sft, i), ("ppo", ppo, j)):
            row |= {
                f"{name}_reward": columns["reward"][k],
                f"{name}_gold": columns["gold_reward"][k] if "gold_reward" in columns else None,
            }
        found.append(row)
    return found[:most]


def _prompt_as_text(prompt: Text) -> str:
    return (
        prompt
        if isinstance(prompt, str)
        else "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    )


def records_by_split(records: Artifact) -> dict[str, dict[str, int]]:
    """How many of each kind; nothing is known of records that no stage made."""
    found: dict[str, dict[str, int]] = {}
    for key, count in records.manifest.get("metrics", {}).items():
        kind, _, split = key.partition(".")
        found.setdefault(kind, {})[split] = count
    return found


def _own_lineage(config: EvaluateStage, inputs: dict[str, Artifact]) -> dict[str, Any]:
    """Of the evaluation itself, which is not published yet."""
    shown = yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)
    identities = {name: source.identity for name, source in inputs.items()}
    return {"stage": config.stage, "path": str(config.folder), "inputs": identities, "config": shown}


def _lineage(name: str, source: Artifact) -> dict[str, Any]:
    manifest, config = source.manifest, source.path / "config.yaml"
    return {
        "stage": manifest.get("stage", name), "path": str(source.path), "identity": source.identity,
        "created_at": manifest.get("created_at", ""),
        "inputs": {key: value.get("identity", "") for key, value in manifest.get("inputs", {}).items()},
        "config": config.read_text() if config.is_file() else yaml.safe_dump({"foreign": True}),
    }  # fmt: skip


def write_report(path: Path, data: dict[str, Any]) -> None:
    """Write `path`, a self-contained HTML page; the same data gives the same bytes.

    Every key of `data` may be missing or empty, which leaves its section out; a missing, None or NaN number reads "–" and is not drawn.

    title, command: str
    summary: [{name, value, note}], already formatted
    metrics: nested dict, shown with dotted keys
    rows: {read, kept, quarantined: {reason: count}, by_source: {source: {read, kept, quarantined}}, derived: {kind: count}}
    records: {kind: {split: count}}
    curves: {stage: log entries, as `transformers.Trainer` writes them}; a stage that logs `objective/…`, as PPO does, or TRL's
        `raw_reward` is drawn as a policy's
    frontier: [{name, kl (nats), reward, gold_reward, scorer_reward, bound, line}]; bound says that `kl` is an upper bound, points of a line
        are joined, or follow a curve:
    fits: {line: {reward: {start, alpha, beta}}}
    lengths: {name: response tokens, one per answer}
    measured: {kind of records: figures, as the reward stage's metrics.json has them}, first the kind that it learned from
    calibration: [{confidence, accuracy, count}], one per bin
    samples: [{prompt, sft, ppo, sft_reward, ppo_reward, sft_gold, ppo_gold}]
    lineage: [{stage, path, identity, created_at, inputs: {name: identity}, config: YAML text}]
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_format_value, sort_key=as_finite)
    samples = [with_word_diff(sample) for sample in data.get("samples") or []]
    records = data.get("records") or {}
    page = environment.get_template("report.html.j2").render(
        light=LIGHT,
        title=data.get("title") or "run",
        command=data.get("command"),
        summary=data.get("summary"),
        metrics=list(dotted_metrics(data.get("metrics") or {})),
        rows=data.get("rows"),
        records=records,
        splits=list(dict.fromkeys(split for counts in records.values() for split in counts)),
        most=max((sum(counts.values()) for counts in records.values()), default=0) or 1,
        curves={
            stage: plots
            for stage, entries in (data.get("curves") or {}).items()
            if (plots := draw_curves(stage, entries or []))
        },
        frontier=data.get("frontier"),
        held_out=any(
            as_finite(point.get("scorer_reward")) is not None for point in data.get("frontier") or []
        ),
        frontier_plot=draw_frontier(data.get("frontier") or [], data.get("fits") or {}),
        lengths=draw_lengths(data.get("lengths") or {}),
        measured={kind: metric_tables(figures) for kind, figures in (data.get("measured") or {}).items()},
        calibration=draw_calibration(data.get("calibration") or []),
        samples=samples,
        gold=any(
            as_finite(sample.get(key)) is not None for sample in samples for key in ("sft_gold", "ppo_gold")
        ),
        lineage=data.get("lineage"),
        stages={artifact.get("identity"): artifact.get("stage") for artifact in data.get("lineage") or []},
    )
    path.write_bytes(page.encode("utf-8", "replace"))  # a model's bytes can decode to half a surrogate pair


def _format_value(value: object, spec: str = "z.4g") -> str:
    """Format a value for the template, in which a missing one is undefined."""
    return format_number(None if isinstance(value, jinja2.Undefined) else value, spec)


def with_word_diff(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample with what PPO gained, and each answer as [(words, whether the other answer has others there)]."""
    shown = dict(sample)
    shown["sft"], shown["ppo"] = word_diff(sample.get("sft") or "–", sample.get("ppo") or "–")
    for name in ("reward", "gold"):
        before, after = (as_finite(sample.get(f"{policy}_{name}")) for policy in ("sft", "ppo"))
        shown[f"{name}_gain"] = None if before is None or after is None else after - before
    return shown


def word_diff(a: str, b: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in parts, each with whether the other has other words there; joined, the parts are the text."""
    words = [re.findall(r"\s*\S+|\s+$", text) for text in (a, b)]
    plain_a, plain_b = ([word.strip() for word in of_text] for of_text in words)
    parts_a: list[tuple[str, bool]] = []
    parts_b: list[tuple[str, bool]] = []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, plain_a, plain_b, autojunk=False).get_opcodes():
        for parts, found in ((parts_a, words[0][a0:a1]), (parts_b, words[1][b0:b1])):
            text = "".join(found)
            blank = len(text) - len(text.lstrip())
            parts += [
                (part, changed)
                for part, changed in ((text[:blank], False), (text[blank:], tag != "equal"))
                if part
            ]
    return parts_a, parts_b


def dotted_metrics(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from dotted_metrics(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
