"""The report of a run: one self-contained HTML file, for light and dark themes and for any screen."""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.artifacts.manifest import Artifact
from pipeline.config import EvaluateStage
from pipeline.data.schema import Text
from pipeline.evaluate.curves import draw_curves
from pipeline.evaluate.metrics import reward_kl_points
from pipeline.evaluate.overview import policy_table
from pipeline.evaluate.plots import (
    LIGHT,
    draw_calibration,
    draw_lengths,
    draw_reward_kl,
    draw_rewards,
)
from pipeline.evaluate.rewards import describe_rewards
from pipeline.evaluate.strips import draw_strips, last_evaluation, shorten_middle
from pipeline.evaluate.summary import measure_names, summary_rows
from pipeline.formatting.numbers import as_finite, format_number
from pipeline.formatting.tables import metric_tables

MAX_SAMPLES = 40  # prompts whose responses the report shows
MAX_DIFF_WORDS = 1_000  # of texts that are compared word by word
MAX_DIFF_PAIRS = 20_000  # of equal words in two such texts, by which the time of the comparison grows

TEST_PROMPTS = {  # by the format of prepare's source: what training has seen of its test prompts
    "demo": "The test prompts of the demo world are other wordings of facts that training has seen.",
    "sums": "The test prompts of the sums world are expressions that training has not seen.",
}

Words = list[tuple[str, bool]]  # parts of a text, each with whether the other text has other words there


def collect_report(
    config: EvaluateStage,
    inputs: dict[str, Artifact],
    metrics: dict[str, Any],
    samples: dict[str, dict[str, list[Any]]],
    reliability: list[dict[str, float]],
) -> dict[str, Any]:
    """Return the data of `write_report` for an evaluation; `samples` are the columns of each policy."""
    lineage = [_lineage(name, source) for name, source in inputs.items()]
    return {
        "title": config.run,
        "command": config.command,
        "policies": policy_table(metrics),
        "summary": summary_rows(metrics),
        "test_prompts": describe_test_prompts(inputs["records"]),
        "reward": describe_rewards(config),
        "metrics": {name: value for name, value in metrics.items() if name != "rows"},
        "rows": metrics["rows"],
        "records": records_by_split(inputs["records"]),
        "curves": {name: log for name, source in inputs.items() if (log := read_log(source))},
        "reward_kl": reward_kl_points(metrics),
        "measures": measure_names(metrics),
        "fits": metrics["fits"],
        "rewards": {name: samples[name]["reward"] for name in ("sft", "ppo")},
        "lengths": {name: samples[name]["response_tokens"] for name in ("sft", "ppo")},
        "measured": metrics["reward"],
        "calibration": reliability,
        "samples": paired_samples(config, samples),
        "strips": last_evaluation(_read_json_lines(inputs["ppo"], "samples.jsonl")),
        "lineage": [*lineage, _own_lineage(config, inputs)],
    }


def read_log(source: Artifact) -> list[dict[str, float]]:
    """Return the entries of a training log; none if the artifact has no log."""
    return _read_json_lines(source, "log.jsonl")


def _read_json_lines(source: Artifact, name: str) -> list[dict[str, Any]]:
    file = source.path / name
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.is_file() else []


def paired_samples(config: EvaluateStage, samples: dict[str, dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """Return the first response of SFT and of PPO to each of the first `MAX_SAMPLES` prompts, with scores."""
    sft, ppo = samples["sft"], samples["ppo"]
    pairs = zip(
        range(0, len(sft["text"]), config.best_of),
        range(0, len(ppo["text"]), config.samples_per_prompt),
        strict=True,
    )
    rows = []
    for i, j in pairs:
        row = {"prompt": _prompt_as_text(sft["prompt"][i]), "sft": sft["text"][i], "ppo": ppo["text"][j]}
        for name, columns, k in (("sft", sft, i), ("ppo", ppo, j)):
            row[f"{name}_reward"] = columns["reward"][k]
            row[f"{name}_gold"] = columns["gold_reward"][k] if "gold_reward" in columns else None
        rows.append(row)
    return rows[:MAX_SAMPLES]


def _prompt_as_text(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _shorten_prompt(prompt: Text | None) -> str:
    return shorten_middle(_prompt_as_text(prompt or "–"))


def records_by_split(records: Artifact) -> dict[str, dict[str, int]]:
    """Return the number of records by kind and split; it is unknown for records that no stage made."""
    counts: dict[str, dict[str, int]] = {}
    for key, count in records.manifest.get("metrics", {}).items():
        kind, _, split = key.partition(".")
        counts.setdefault(kind, {})[split] = count
    return counts


def describe_test_prompts(records: Artifact) -> str:
    """Return what training has seen of the test prompts, if prepare made them from a synthetic world."""
    if records.manifest.get("stage") != "prepare":
        return ""
    settings = yaml.safe_load((records.path / "config.yaml").read_text(encoding="utf-8"))
    formats = {source["format"] for source in settings["source"]}
    return " ".join(text for world, text in TEST_PROMPTS.items() if world in formats)


def _own_lineage(config: EvaluateStage, inputs: dict[str, Artifact]) -> dict[str, Any]:
    """Return the lineage of the evaluation itself, which is not published yet."""
    return {
        "stage": config.stage,
        "path": str(config.folder),
        "inputs": {name: source.identity for name, source in inputs.items()},
        "config": yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True),
    }


def _lineage(name: str, source: Artifact) -> dict[str, Any]:
    manifest, config = source.manifest, source.path / "config.yaml"
    return {
        "stage": manifest.get("stage", name),
        "path": str(source.path),
        "identity": source.identity,
        "created_at": manifest.get("created_at", ""),
        "inputs": {key: value.get("identity", "") for key, value in manifest.get("inputs", {}).items()},
        "config": config.read_text() if config.is_file() else yaml.safe_dump({"external": True}),
    }


def write_report(path: Path, data: dict[str, Any]) -> None:
    """Write `path`, a self-contained HTML page; the same data gives the same bytes.

    Every key of `data` may be missing or empty: its section is then left out. A missing, None or NaN number
    is shown as "–" and is not drawn.

    title, command: str
    policies: {columns: [name], rows: [{name, cells: [{value, interval}]}]}, already formatted
    summary: [{name, value, note}], already formatted
    test_prompts: str, what training has seen of the test prompts; shown with the summary
    reward: str, what the reward is; shown with the summary
    metrics: nested dict, shown with dotted keys
    rows: {read, kept, merged, quarantined: {reason: count}, by_source: {source: the same
        counts}, derived: {kind: count}}
    records: {kind: {split: count}}
    curves: {stage: log entries, as `transformers.Trainer` writes them}; a stage is drawn as a policy if it
        logs `objective/…`, as PPO does, or TRL's `raw_reward`
    reward_kl: [{name, kl (nats), reward, gold_reward, scorer_reward, bound, line}]; `bound` says that `kl`
        is an upper bound; the points of a line are joined, or follow a curve of `fits`
    measures: names of more metrics that the points of reward_kl have
    fits: {line: {reward: {start, alpha, beta}}}
    rewards: {name: rewards, one per response}
    lengths: {name: response tokens, one per response}
    measured: {kind of records: metrics, as in the reward stage's metrics.json}, first the kind that it
        learned from
    calibration: [{confidence, accuracy, count}], one per bin
    samples: [{prompt, sft, ppo, sft_reward, ppo_reward, sft_gold, ppo_gold}]
    strips: [{step, prompt, reward, gold_reward, tokens, token_rewards, token_values}], rows of a ppo
        artifact's samples.jsonl; the critic's values are left out if no row has them
    lineage: [{stage, path, identity, created_at, inputs: {name: identity}, config: YAML text}]
    """
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=_format_value, sort_key=as_finite, sha256=_hash_source, prompt_text=_shorten_prompt
    )
    page = environment.get_template("report.html.j2").render(_template_values(data))
    # A model's bytes can decode to half of a surrogate pair, which UTF-8 cannot encode.
    path.write_bytes(page.encode("utf-8", "replace"))


def _template_values(data: dict[str, Any]) -> dict[str, Any]:
    """Return the template's values: the data of `write_report`, with plots drawn and tables laid out."""
    records, points = data.get("records") or {}, data.get("reward_kl") or []
    samples = [with_word_diff(sample) for sample in data.get("samples") or []]
    lineage = data.get("lineage")
    curves = {stage: draw_curves(stage, log or []) for stage, log in (data.get("curves") or {}).items()}
    return {
        "light": LIGHT,
        "title": data.get("title") or "run",
        "command": data.get("command"),
        "policies": data.get("policies"),
        "summary": data.get("summary"),
        "test_prompts": data.get("test_prompts"),
        "reward": data.get("reward"),
        "metrics": list(dotted_metrics(data.get("metrics") or {})),
        "rows": data.get("rows"),
        "records": records,
        "splits": list(dict.fromkeys(split for counts in records.values() for split in counts)),
        "most": max((sum(counts.values()) for counts in records.values()), default=0) or 1,
        "curves": {stage: plots for stage, plots in curves.items() if plots},
        "reward_kl": points,
        "reward_kl_plots": draw_reward_kl(points, data.get("fits") or {}),
        "measures": data.get("measures") or [],
        "has_scorer": _has_number(points, "scorer_reward"),
        "rewards": draw_rewards(data.get("rewards") or {}),
        "lengths": draw_lengths(data.get("lengths") or {}),
        "measured": {kind: metric_tables(metrics) for kind, metrics in (data.get("measured") or {}).items()},
        "calibration": draw_calibration(data.get("calibration") or []),
        "samples": samples,
        "strips": draw_strips(data.get("strips") or []),
        "has_gold": _has_number(samples, "sft_gold", "ppo_gold"),
        "lineage": lineage,
        "stages": {artifact.get("identity"): artifact.get("stage") for artifact in lineage or []},
    }


def _has_number(rows: list[dict[str, Any]], *keys: str) -> bool:
    return any(as_finite(row.get(key)) is not None for row in rows for key in keys)


def _hash_source(text: str) -> str:
    """Return the name by which a Content-Security-Policy allows this script or style, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _format_value(value: object, spec: str = "z.4g") -> str:
    """Format a value for the template; a missing one is undefined there."""
    return format_number(None if isinstance(value, jinja2.Undefined) else value, spec)


def with_word_diff(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the sample with each response as `Words`, and PPO's gains in reward and gold reward."""
    shown = dict(sample)
    shown["sft"], shown["ppo"] = word_diff(sample.get("sft") or "–", sample.get("ppo") or "–")
    for name in ("reward", "gold"):
        before, after = (as_finite(sample.get(f"{policy}_{name}")) for policy in ("sft", "ppo"))
        shown[f"{name}_gain"] = None if before is None or after is None else after - before
    return shown


def word_diff(a: str, b: str) -> tuple[Words, Words]:
    """Split both texts into parts, each with whether the other text has other words there.

    The parts of a text, joined, are the text. Blanks are never marked at the start of a part. What differs in
    long texts may be one part, see `_compare_words`.
    """
    tokens = [re.findall(r"\s*\S+|\s+$", text) for text in (a, b)]
    words_a, words_b = ([token.strip() for token in of_text] for of_text in tokens)
    parts_a: Words = []
    parts_b: Words = []
    for is_changed, a0, a1, b0, b1 in _compare_words(words_a, words_b):
        parts_a += _split_blank("".join(tokens[0][a0:a1]), is_changed)
        parts_b += _split_blank("".join(tokens[1][b0:b1]), is_changed)
    return parts_a, parts_b


def _compare_words(a: list[str], b: list[str]) -> Iterator[tuple[bool, int, int, int, int]]:
    """Yield whether words differ, and their range in `a` and in `b`, in the order of the texts.

    The time of a comparison grows with the square of the words. So of texts that are too long for it, those
    that they begin and end with are matched first; if what is left is still too long, all of it differs.
    """
    start, end = 0, 0
    if _is_long(a, b):
        shortest = min(len(a), len(b))
        start = next((i for i in range(shortest) if a[i] != b[i]), shortest)
        end = next((i for i in range(shortest - start) if a[-1 - i] != b[-1 - i]), shortest - start)
        yield False, 0, start, 0, start
    stop_a, stop_b = len(a) - end, len(b) - end
    middle_a, middle_b = a[start:stop_a], b[start:stop_b]
    if _is_long(middle_a, middle_b):
        yield True, start, stop_a, start, stop_b
    else:
        matcher = difflib.SequenceMatcher(None, middle_a, middle_b, autojunk=False)
        for tag, *bounds in matcher.get_opcodes():
            a0, a1, b0, b1 = (start + bound for bound in bounds)
            yield tag != "equal", a0, a1, b0, b1
    yield False, stop_a, len(a), stop_b, len(b)


def _is_long(a: list[str], b: list[str]) -> bool:
    counts = Counter(b)
    return max(len(a), len(b)) > MAX_DIFF_WORDS or sum(counts[word] for word in a) > MAX_DIFF_PAIRS


def _split_blank(text: str, changed: bool) -> Words:
    """Return the text in two parts, its leading blanks unchanged; empty parts are left out."""
    blanks = len(text) - len(text.lstrip())
    parts = ((text[:blanks], False), (text[blanks:], changed))
    return [(part, is_changed) for part, is_changed in parts if part]


def dotted_metrics(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested dict with their dotted keys."""
    for key, value in metrics.items():
        if isinstance(value, dict):
            yield from dotted_metrics(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
