"""Evaluation: what the reward model knows and what PPO changed, in `metrics.json` and one self-contained `report.html`.

In: the prepare, sft, reward and ppo artifacts, on prompts of the test split; of ppo also the policies on the way, where it kept them.
Out: the two files. Figures that need a gold reward or a `scorer` are there only where the config names one. A wrong input gets one
`UserError`.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline import artifact, encoding, sampling, training
from pipeline.config import EvaluateStage, Reward
from pipeline.errors import UserError
from pipeline.evaluate import frontier
from pipeline.evaluate.report import write_report
from pipeline.evaluate.summary import rows as summary_rows
from pipeline.progress import bar
from pipeline.ranks import is_main_process, spread
from pipeline.reading import read
from pipeline.records import open_records
from pipeline.reward import sources
from pipeline.reward.measure import held_out, measure
from pipeline.reward.metrics import pair_accuracy
from pipeline.reward.model import RewardModel, SharedRewardModel
from pipeline.reward.sources import RewardFunction, from_model, function
from pipeline.sampling import Answers

TEXTS, RENAMED = ("prompt", "text", "ids"), {"ended": "ended_fraction"}
KINDS = {"records": ("records", "prepare"), "sft": ("policy", "sft"), "reward": ("reward", "reward"), "ppo": ("policy", "ppo")}


def check(config: EvaluateStage) -> None:
    """Refuse what is wrong with the config alone. Raises `UserError`."""
    training.check_quantization(config.stage, config.quantization)
    training.resolve_precision(config.precision)
    scorer = config.scorer.source if config.scorer and config.scorer.is_function else None
    for spec in filter(None, (config.gold, config.well_formed, scorer)):
        function(spec)


def run(config: EvaluateStage) -> Path:
    check(config)
    inputs = {name: artifact.require(getattr(config, name), kind, config.make_command(stage)) for name, (kind, stage) in KINDS.items()}
    if config.scorer and not config.scorer.is_function:
        inputs["scorer"] = sources.require(config.scorer, config.make_command("reward"), config.trust_remote_code)
    return artifact.build(
        config, kind="evaluation", inputs=inputs, make=lambda output, work: evaluate(config, inputs, output), on_every_rank=True
    )


def evaluate(config: EvaluateStage, inputs: dict[str, artifact.Artifact], output: Path) -> dict[str, Any]:
    """Measure, and write the files; returns the headline metrics."""
    options: dict[str, Any] = {"revision": inputs["reward"].revision, "trust_remote_code": config.trust_remote_code}
    reward = SharedRewardModel.load(inputs["reward"].path, positive_label=config.positive_label, **options)
    prompts = test_prompts(config, inputs["records"])
    scorers = {name: function(spec) for name, spec in (("gold_reward", config.gold), ("well_formed", config.well_formed)) if spec}
    if config.scorer:
        scorers["scorer_reward"] = looking_on(config, config.scorer, inputs.get("scorer"))
    sampled = sample_policies(config, inputs, prompts)
    for answers in sampled.values():
        answers |= {name: scored(scorer, answers, prompts) for name, scorer in scorers.items()}
        answers["reward"] = reward.score(answers["prompt"], answers["text"])
    metrics: dict[str, Any] = {"reward": reward_metrics(reward, inputs, scorers.get("gold_reward"))}
    reliability = metrics["reward"].get("comparisons", {}).pop("calibration", [])
    if not is_main_process():
        return {}
    metrics |= policy_metrics(config, sampled) | {"rows": inputs["records"].manifest.get("rows", {})}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_report(output / "report.html", report_data(config, inputs, metrics, sampled, reliability))
    return {"metrics": {name: value for name, value in metrics.items() if name != "rows"}}


def scored(scorer: RewardFunction, answers: dict[str, list[Any]], prompts: Dataset) -> list[float]:
    """Called as PPO calls it: by TRL's signature, with the other columns of each prompt's record."""
    repeats = len(answers["text"]) // len(prompts)

    def share(rows: Sequence[int]) -> list[float]:
        records = prompts.select([row // repeats for row in rows])[:]
        texts, ids, ended = ([answers[name][row] for row in rows] for name in ("text", "ids", "ended"))
        given = {"prompts": records.pop("prompt"), "completions": texts, "completion_ids": ids, "ended": ended}
        return list(map(float, scorer(**given, **records)))

    return spread(share, range(len(answers["text"])))


def looking_on(config: EvaluateStage, scorer: Reward, opened: artifact.Artifact | None) -> RewardFunction:
    """The held-out scorer, as a function."""
    if opened is None:
        return function(scorer.source)
    return from_model(sources.load(scorer, opened, trust_remote_code=config.trust_remote_code), scorer.length_penalty).score


def test_prompts(config: EvaluateStage, records: artifact.Artifact) -> Dataset:
    prompts = held_out(open_records(records, "prompts"))
    if not len(prompts):
        raise UserError(f"{records.path}: holds no prompts that were held out; set 'splits.test' of prepare above 0 and run it again")
    return prompts.select(range(min(config.prompts, len(prompts))))


def sample_policies(config: EvaluateStage, inputs: dict[str, artifact.Artifact], prompts: Dataset) -> dict[str, dict[str, list[Any]]]:
    """Answers in columns, a prompt's samples together: `best_of` from SFT, and `samples_per_prompt` with their KL to SFT from PPO: `ppo_N`
    after N steps, then `ppo`."""
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "quantization": config.quantization}
    options["precision"] = training.resolve_precision(config.precision)
    sft, tokenizer = sampling.load(str(inputs["sft"].path), revision=inputs["sft"].revision, **options)
    sampled = {"sft": sample(config, "sft", sft, tokenizer, prompts["prompt"][:], config.best_of)}
    ppo = inputs["ppo"]
    kept = {f"ppo_{int(folder.name.removeprefix('step-'))}": folder for folder in sorted(ppo.path.glob("policies/step-*"))}
    for name, folder in (kept | {"ppo": ppo.path}).items():
        policy, tokenizer = sampling.load(str(folder), revision=ppo.revision, **options)
        sampled[name] = sample(config, name, policy, tokenizer, prompts["prompt"][:], config.samples_per_prompt, reference=sft)
        del policy  # before the next one comes
    return sampled


def sample(
    config: EvaluateStage, name: str, policy: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], per_prompt: int,
    reference: Any = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Columns prompt, text, ids, response_tokens, ended, and kl where there is a `reference`; `per_prompt` rows for each prompt."""
    wanted = [prompt for prompt in prompts for _ in range(per_prompt)]
    given = {name: getattr(config, name) for name in ("seed", "temperature", "response_tokens", "max_prompt_tokens", "batch_size")}

    def share(rows: Sequence[int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for answers in progress(name, len(rows), sampling.sample(policy, tokenizer, [wanted[row] for row in rows], rows, **given)):
            columns = {"text": answers.texts, "ids": answers.token_lists(), "response_tokens": answers.response_mask.sum(1).tolist()}
            columns["ended"] = answers.ended
            if reference is not None:
                columns["kl"] = answer_kl(policy, reference, answers, config.temperature)
            found += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return found

    drawn = spread(share, range(len(wanted)))
    return {"prompt": wanted} | {name: [row[name] for row in drawn] for name in drawn[0]}


def progress(name: str, total: int, batches: Iterable[Answers]) -> Iterator[Answers]:
    """The batches, with a bar of this process's answers and tokens on the terminal of rank 0."""
    tokens = 0
    with bar(name, "answers", total=total) as shown:
        for answers in batches:
            yield answers
            tokens += int(answers.response_mask.sum())
            shown.update(len(answers.texts))
            if elapsed := shown.format_dict["elapsed"]:
                shown.set_postfix({"tokens/s": f"{tokens / elapsed:,.0f}"})


@torch.inference_mode()
def answer_kl(policy: Any, reference: Any, answers: Answers, temperature: float) -> list[float]:
    """log p − log q summed over each answer: a sample of KL(policy ‖ reference) in nats."""
    tensors = (answers.query_ids, answers.query_mask, answers.response_ids, answers.response_mask)
    of_policy, of_reference = (read(model, *tensors, temperature).logprobs for model in (policy, reference))
    return (of_policy - of_reference).sum(1).tolist()


def reward_metrics(reward: RewardModel, inputs: dict[str, artifact.Artifact], gold: RewardFunction | None) -> dict[str, Any]:
    """By kind of records, as the reward stage measured it, or measured now on pairs where the model is foreign; with a gold reward also
    the ceiling: the accuracy of the gold ordering on the same noisy pairs."""
    folder = inputs["records"].path / "comparisons"
    pairs = {"comparisons": held_out(open_records(inputs["records"], "comparisons"))} if folder.is_dir() else {}
    published = inputs["reward"].path / "metrics.json"
    found = json.loads(published.read_text()) if published.is_file() else measure(reward, pairs)
    if gold is not None and "comparisons" in found and pairs:
        rows = pairs["comparisons"]
        records = rows.remove_columns(["chosen", "rejected"])
        texts = [list(map(encoding.plain, rows[side])) for side in ("chosen", "rejected")]
        sides = [{"text": side, "ids": reward.tokenizer(side)["input_ids"], "ended": [True] * len(side)} for side in texts]
        found["comparisons"]["accuracy_ceiling"] = pair_accuracy(*(scored(gold, side, records) for side in sides))
    return found


def policy_metrics(config: EvaluateStage, sampled: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    """Sections sft, best_of_2, best_of_4, …, ppo_N of PPO after N steps, and ppo: means over answers; then `fits`. A win rate sets each PPO
    answer against one of SFT's."""
    sft, ppo = sampled["sft"], sampled["ppo"]
    figures = {name: column for name, column in sft.items() if name not in TEXTS}
    metrics: dict[str, Any] = {"sft": means(sft)}
    for n in sorted({config.best_of, *(2**k for k in range(1, config.best_of.bit_length()))}):
        found = frontier.best_of_n(sft["reward"], figures, config.best_of, n)
        found["kl_bound"] = frontier.kl_bound(n)
        metrics[f"best_of_{n}"] = {RENAMED.get(name, name): figure for name, figure in found.items()}
    metrics |= {name: means(columns) for name, columns in sampled.items() if name.startswith("ppo")}
    for name, columns, samples in (("sft", sft, config.best_of), ("ppo", ppo, config.samples_per_prompt)):
        correlation = frontier.length_correlation(columns["reward"], columns["response_tokens"], samples)
        metrics[name] |= {} if correlation is None else {"reward_length_correlation": correlation}
    rivals = [
        i // config.samples_per_prompt * config.best_of + i % config.samples_per_prompt % config.best_of for i in range(len(ppo["text"]))
    ]
    of_rivals = lambda name: [sft[name][i] for i in rivals]  # noqa: E731
    for column, name in (("reward", "win_rate"), ("gold_reward", "win_rate_gold"), ("scorer_reward", "win_rate_scorer")):
        if column in ppo:
            won = frontier.win_rate(ppo[column], of_rivals(column), ppo["response_tokens"], of_rivals("response_tokens"))
            metrics["ppo"] |= {name if key == "rate" else f"{name}_{key}": value for key, value in won.items()}
    return metrics | {"fits": frontier.fits(points(metrics))}


def means(columns: dict[str, list[Any]]) -> dict[str, float]:
    """Over all answers: each figure, and how varied the answers are."""
    figures = {RENAMED.get(name, name): statistics.fmean(map(float, column)) for name, column in columns.items() if name not in TEXTS}
    return figures | {f"distinct_{n}": frontier.distinct(columns["text"], n) for n in (1, 2)}


def report_data(
    config: EvaluateStage, inputs: dict[str, artifact.Artifact], metrics: dict[str, Any], sampled: dict[str, dict[str, list[Any]]],
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
        "curves": {name: log(source) for name, source in inputs.items() if log(source)},
        "frontier": points(metrics),
        "fits": metrics["fits"],
        "lengths": {name: sampled[name]["response_tokens"] for name in ("sft", "ppo")},
        "measured": metrics["reward"],
        "calibration": reliability,
        "samples": before_and_after(config, sampled),
        "lineage": [*(lineage(name, source) for name, source in inputs.items()), own_lineage(config, inputs)],
    }


def points(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What the frontier's plot shows: SFT, best-of-n for each n, PPO as it went on where it kept its policies, PPO as it is."""
    found = [{"name": "SFT", "kl": 0.0} | metrics["sft"]]
    found += [{"name": n.replace("_", "-"), "kl": of_n["kl_bound"], "bound": True, "line": "best-of-n"} | of_n
              for n, of_n in metrics.items() if n.startswith("best_of_")]  # fmt: skip
    found += [{"name": f"PPO, step {name.removeprefix('ppo_')}", "line": "PPO"} | of_step
              for name, of_step in metrics.items() if name.startswith("ppo_")]  # fmt: skip
    found.append({"name": "PPO"} | metrics["ppo"])
    return [{key: point.get(key) for key in ("name", "kl", "reward", "gold_reward", "scorer_reward", "bound", "line")} for point in found]


def log(source: artifact.Artifact) -> list[dict[str, float]]:
    file = source.path / "log.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.is_file() else []


def before_and_after(config: EvaluateStage, sampled: dict[str, dict[str, list[Any]]], most: int = 40) -> list[dict[str, Any]]:
    """The first answer of each policy to each prompt, with scores."""
    sft, ppo = sampled["sft"], sampled["ppo"]
    found = []
    for i, j in zip(range(0, len(sft["text"]), config.best_of), range(0, len(ppo["text"]), config.samples_per_prompt), strict=True):
        row = {"prompt": shown(sft["prompt"][i]), "sft": sft["text"][i], "ppo": ppo["text"][j]}
        for name, columns, k in (("sft", sft, i), ("ppo", ppo, j)):
            row |= {f"{name}_reward": columns["reward"][k], f"{name}_gold": columns["gold_reward"][k] if "gold_reward" in columns else None}
        found.append(row)
    return found[:most]


def shown(prompt: encoding.Text) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def records_by_split(records: artifact.Artifact) -> dict[str, dict[str, int]]:
    """How many of each kind; nothing is known of records that no stage made."""
    found: dict[str, dict[str, int]] = {}
    for key, count in records.manifest.get("metrics", {}).items():
        kind, _, split = key.partition(".")
        found.setdefault(kind, {})[split] = count
    return found


def own_lineage(config: EvaluateStage, inputs: dict[str, artifact.Artifact]) -> dict[str, Any]:
    """Of the evaluation itself, which is not published yet."""
    shown = yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)
    identities = {name: source.identity for name, source in inputs.items()}
    return {"stage": config.stage, "path": str(config.folder), "inputs": identities, "config": shown}


def lineage(name: str, source: artifact.Artifact) -> dict[str, Any]:
    manifest, config = source.manifest, source.path / "config.yaml"
    return {
        "stage": manifest.get("stage", name), "path": str(source.path), "identity": source.identity,
        "created_at": manifest.get("created_at", ""),
        "inputs": {key: value.get("identity", "") for key, value in manifest.get("inputs", {}).items()},
        "config": config.read_text() if config.is_file() else yaml.safe_dump({"foreign": True}),
    }  # fmt: skip
