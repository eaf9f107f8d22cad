"""Train reward models on public preference data; compare with "longer wins" and with `trl.RewardTrainer`.

    python benchmarks/real_data.py DATA [NAME …] [--models minilm smollm2] [--peer]

DATA contains the published files (see `DATASETS`). The test prompts are held out. Each row of the result
takes two commands, which are printed as they run. Complete stages are reused. `--peer` also trains TRL's
trainer on the same pairs for the same steps, if it can train on them at all. The script prints a table and
writes `benchmarks/real_data.json`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "real_data.json"
COLUMNS = "columns: {prompt: [instruction, input]}"
LABELS = ["objective=classification", "training.center_rewards_coefficient=0"]


class Dataset(NamedTuple):
    """A published data set: the source of `prepare`, and overrides of the reward stage.

    In the source, {DATA} is the folder of the published files, and {CONVERTED} the folder of the files that
    scripts/convert.py wrote.
    """

    source: str
    overrides: list[str]


DATASETS = {
    "rasbt": Dataset(
        f"{{format: comparisons, path: {{DATA}}/rasbt/instruction-data-with-preference.json, {COLUMNS}}}", []
    ),
    "hh-harmless": Dataset(
        "{format: dialogues, path: {DATA}/hh-harmless/pairs.jsonl}", ["training.num_train_epochs=1"]
    ),
    "pandalm": Dataset("{format: comparisons, path: {CONVERTED}/pandalm.jsonl}", []),
    "finegrained-qa": Dataset(
        "{format: rankings, path: {CONVERTED}/finegrained-qa.jsonl}",
        ["objective=ranking", "training.num_train_epochs=1"],
    ),
    "surge-toxicity": Dataset(
        "{format: labels, path: {DATA}/surge-toxicity/toxicity_en.csv, "
        "columns: {label: is_toxic}, classes: [Toxic, Not Toxic]}",
        [*LABELS, "positive_label=Not Toxic", "encoding.form=concatenation"],
    ),
    "kto-demo": Dataset(
        "{format: labels, path: {DATA}/kto-demo/kto_en_demo.json}", [*LABELS, "positive_label='true'"]
    ),
}
TO_CONVERT = {"pandalm": "testset-v1.json", "finegrained-qa": "dev_feedback.json"}
SPLITS = ["splits.validation=0.05", "splits.test=0.2"]


def main() -> None:
    """Train and evaluate on each data set with each model, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the published files")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument(
        "--models", nargs="*", default=["minilm", "smollm2"], help="recipes whose reward.yaml is used"
    )
    parser.add_argument("--peer", action="store_true", help="also train trl.RewardTrainer")
    args = parser.parse_args()
    if unknown := set(args.names) - set(DATASETS):
        sys.exit(f"error: no data set {', '.join(sorted(unknown))}; expected {', '.join(DATASETS)}")

    converted = Path("runs/real-data")
    converted.mkdir(parents=True, exist_ok=True)
    for name, file in TO_CONVERT.items():
        run_python("scripts/convert.py", name, str(args.data / name / file), str(converted / f"{name}.jsonl"))

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.names or DATASETS:
        for model in args.models:
            result = train_and_evaluate(name, model, args.data, converted, args.peer)
            results[f"{name} {model}"] = result | {"name": name, "model": model}
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(format_table(results))


def run_python(*arguments: str) -> None:
    """Print and run `python ARGUMENTS`. Raises `CalledProcessError` if it fails."""
    print(f"$ python {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def train_and_evaluate(name: str, model: str, data: Path, converted: Path, peer: bool) -> dict[str, Any]:
    """Run prepare and reward; return the reward model's metrics and, with `peer`, the accuracy of TRL's."""
    source = DATASETS[name].source.replace("{DATA}", str(data)).replace("{CONVERTED}", str(converted))
    overrides = DATASETS[name].overrides
    folder = Path("runs") / f"{name}-{model}"
    run = ["--run", folder.name]
    local_model = [f"model=models/{model}"] if Path(f"models/{model}").is_dir() else []

    prepare = ["prepare", "--config", "configs/smollm2/prepare.yaml", *run, f"source={source}", *SPLITS]
    run_python("-m", "pipeline", *prepare)
    reward = ["reward", "--config", f"configs/{model}/reward.yaml", *run, *local_model, *overrides]
    run_python("-m", "pipeline", *reward)

    result = {"metrics": json.loads((folder / "reward" / "metrics.json").read_text())}
    return result | ({"peer": trl_accuracy(folder)} if peer else {})


def trl_accuracy(folder: Path) -> dict[str, float] | str:
    """Train `trl.RewardTrainer` with the same model, pairs, LoRA and steps, and its own tokenization.

    Return its accuracy on the test pairs that it does not drop for their length, and their number; or the
    reason why there is none.
    """
    import torch
    import trl
    import yaml
    from peft import LoraConfig

    config = yaml.safe_load((folder / "reward" / "config.yaml").read_text())
    if config["objective"] != "pairwise" or not (folder / "prepare" / "comparisons").is_dir():
        return "pairs only"

    pairs = pairs_as_messages(folder / "prepare" / "comparisons")
    settings = {
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    settings = config["training"] | settings
    args = trl.RewardConfig(str(folder / "trl"), max_length=config["max_length"], **settings)
    lora = LoraConfig(task_type="SEQ_CLS", **config["lora"]) if config["lora"] else None
    try:
        trainer = trl.RewardTrainer(
            config["model"], args=args, train_dataset=pairs["train"], peft_config=lora
        )
        trainer.train()
        rows = trainer._prepare_dataset(pairs["test"], trainer.processing_class, args, "test")
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"

    model: Any = trainer.model.eval()

    def score(ids: list[int]) -> float:
        return model(input_ids=torch.tensor([ids])).logits.item()

    with torch.inference_mode():
        wins = [score(row["chosen_ids"]) > score(row["rejected_ids"]) for row in rows]
    return {"accuracy": sum(wins) / len(wins), "rows": len(wins)} if wins else "every pair is over max_length"


def pairs_as_messages(folder: Path) -> Any:
    """Load the pairs in `folder` with texts as messages, the form in which TRL applies a chat template."""
    from datasets import load_from_disk

    def as_messages(row: dict[str, Any]) -> dict[str, Any]:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {column: [{"role": role, "content": row[column]}] for column, role in roles.items()}

    pairs = load_from_disk(str(folder))
    return pairs.map(as_messages) if isinstance(pairs["train"][0]["prompt"], str) else pairs


def format_table(results: dict[str, Any]) -> str:
    """Return a Markdown table with one row for each data set and model."""
    lines = [
        "| data | model | held out | result | longer wins | TRL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results.values():
        kind, metrics = next(iter(result["metrics"].items()))
        count = next(iter(metrics.values()))
        low, high = metrics["accuracy_interval"]
        accuracy = f"accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        if name := {"labels": "auroc", "rankings": "kendall_tau"}.get(kind):
            accuracy += f", {name} {metrics[name]:.3f}"

        pairs = result["metrics"].get("comparisons")
        longer = f"{pairs['accuracy_longer']:.3f}" if pairs else "–"
        peer = result.get("peer", "–")
        if isinstance(peer, dict):
            peer = f"{peer['accuracy']:.3f} of {peer['rows']}"
        cells = (result["name"], result["model"], f"{count} {kind}", accuracy, longer, peer)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
