"""Reward models on people's own feedback, held out by prompt, beside "longer wins" and `trl.RewardTrainer`.

    python benchmarks/real_data.py DATA [NAME …] [--models minilm smollm2] [--peer]

DATA holds the published files (see `SETS`). Each row is two commands, which are printed as they run; what is done already is reused.
`--peer` also trains TRL's trainer on the same pairs in the same steps, where it can run at all. Ends with a table, and
`benchmarks/real_data.json`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "real_data.json"
COLUMNS = "columns: {prompt: [instruction, input]}"
LABELS = ["objective=classification", "training.center_rewards_coefficient=0"]
SETS = {  # name -> (source, {DATA} its folder and {CONVERTED} what scripts/convert.py made; overrides of the reward stage)
    "rasbt": (f"{{format: comparisons, path: {{DATA}}/rasbt/instruction-data-with-preference.json, {COLUMNS}}}", []),
    "hh-harmless": ("{format: dialogues, path: {DATA}/hh-harmless/pairs.jsonl}", ["training.num_train_epochs=1"]),
    "pandalm": ("{format: comparisons, path: {CONVERTED}/pandalm.jsonl}", []),
    "finegrained-qa": (
        "{format: rankings, path: {CONVERTED}/finegrained-qa.jsonl}",
        ["objective=ranking", "training.num_train_epochs=1"],
    ),
    "surge-toxicity": (
        "{format: labels, path: {DATA}/surge-toxicity/toxicity_en.csv, columns: {label: is_toxic}, classes: [Toxic, Not Toxic]}",
        [*LABELS, "positive_label=Not Toxic", "encoding.form=concatenation"],
    ),
    "kto-demo": ("{format: labels, path: {DATA}/kto-demo/kto_en_demo.json}", [*LABELS, "positive_label='true'"]),
}
RAW = {"pandalm": "testset-v1.json", "finegrained-qa": "dev_feedback.json"}
SPLITS = ["splits.validation=0.05", "splits.test=0.2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETS))
    parser.add_argument("--models", nargs="*", default=["minilm", "smollm2"], help="recipes whose reward.yaml is used")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SETS):
        sys.exit(f"error: no such set: {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    converted = Path("runs/real-data")
    converted.mkdir(parents=True, exist_ok=True)
    for name, raw in RAW.items():
        run("scripts/convert.py", name, str(args.data / name / raw), str(converted / f"{name}.jsonl"))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.names or SETS:
        for model in args.models:
            results[f"{name} {model}"] = measured(name, model, args.data, converted, args.peer) | {"name": name, "model": model}
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def run(*arguments: str) -> None:
    print(f"$ python {shlex.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


def measured(name: str, model: str, data: Path, converted: Path, peer: bool) -> dict[str, Any]:
    source, overrides = SETS[name]
    source = source.replace("{DATA}", str(data)).replace("{CONVERTED}", str(converted))
    folder = Path("runs") / f"{name}-{model}"
    local = [f"model=models/{model}"] if Path(f"models/{model}").is_dir() else []
    run("-m", "pipeline", "prepare", "--config", "configs/smollm2/prepare.yaml", "--run", folder.name, f"source={source}", *SPLITS)
    run("-m", "pipeline", "reward", "--config", f"configs/{model}/reward.yaml", "--run", folder.name, *local, *overrides)
    found = {"metrics": json.loads((folder / "reward" / "metrics.json").read_text())}
    return found | ({"peer": trl_accuracy(folder)} if peer else {})


def trl_accuracy(folder: Path) -> dict[str, float] | str:
    """TRL's trainer as it comes: the same model, pairs, LoRA and steps, its own tokenisation; accuracy over the test pairs it does not drop
    for their length, and how many these are; or why there is none."""
    import torch
    import trl
    import yaml
    from datasets import load_from_disk
    from peft import LoraConfig

    pairs = load_from_disk(str(folder / "prepare" / "comparisons")) if (folder / "prepare" / "comparisons").is_dir() else None
    config = yaml.safe_load((folder / "reward" / "config.yaml").read_text())
    if pairs is None or config["objective"] != "pairwise":
        return "pairs only"
    if isinstance(pairs["train"][0]["prompt"], str):  # a chat model reads messages
        turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
        sides = lambda row: {side: turn("assistant", row[side]) for side in ("chosen", "rejected")}  # noqa: E731
        pairs = pairs.map(lambda row: {"prompt": turn("user", row["prompt"]), **sides(row)})
    plain = {
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    args = trl.RewardConfig(str(folder / "trl"), max_length=config["max_length"], **config["training"] | plain)
    lora = LoraConfig(task_type="SEQ_CLS", **config["lora"]) if config["lora"] else None
    try:
        trainer = trl.RewardTrainer(config["model"], args=args, train_dataset=pairs["train"], peft_config=lora)
        trainer.train()
        rows = trainer._prepare_dataset(pairs["test"], trainer.processing_class, args, "test")
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    model: Any = trainer.model.eval()
    with torch.inference_mode():
        reward = lambda ids: model(input_ids=torch.tensor([ids])).logits.item()  # noqa: E731
        wins = [reward(row["chosen_ids"]) > reward(row["rejected_ids"]) for row in rows]
    return {"accuracy": sum(wins) / len(wins), "rows": len(wins)} if wins else "every pair is over max_length"


def table(results: dict[str, Any]) -> str:
    lines = ["| data | model | held out | result | longer wins | TRL |", "| --- | --- | --- | --- | --- | --- |"]
    for result in results.values():
        kind, figures = next(iter(result["metrics"].items()))
        count = next(iter(figures.values()))
        low, high = figures["accuracy_interval"]
        pairs = result["metrics"].get("comparisons", {})
        extra = {"labels": "auroc", "rankings": "kendall_tau"}.get(kind)
        shown = f"accuracy {figures['accuracy']:.3f} [{low:.3f}, {high:.3f}]" + (f", {extra} {figures[extra]:.3f}" if extra else "")
        longer = f"{pairs['accuracy_longer']:.3f}" if pairs else "–"
        peer = result.get("peer", "–")
        peer = f"{peer['accuracy']:.3f} of {peer['rows']}" if isinstance(peer, dict) else peer
        lines.append(f"| {result['name']} | {result['model']} | {count} {kind} | {shown} | {longer} | {peer} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
