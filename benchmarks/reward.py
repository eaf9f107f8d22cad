"""This project's reward training and scoring beside its peers', alternately, in one process tree.

    python benchmarks/reward.py [WORK …] [--rounds 5] [--hh PAIRS.jsonl] [--encoder FOLDER]

Each measurement is a process of its own: a work (below), a side (`ours` or `peer`). In a round both sides do each work, in turns first;
what is printed is the median over rounds of the ratios within a round, since a machine's speed drifts. `benchmarks/results.json` keeps all
of it: sizes, seconds, real tokens per second (each answer with its prompt once, without padding), peak memory over what the imports
alone take, and the fraction of the machine's own matrix-multiply rate. Both sides train the same model on the same ids in the same
steps, and the loss curves must agree.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from typing import Any

from harness import compare, measured, weights

WORKS = {  # name -> required ratio
    "rankings-4": 6.0, "rankings-9": 12.0, "hh-harmless": 3.0, "score-encoder": 4.0, "best-of-16-256": 3.0, "best-of-16-512": 4.0,
}  # fmt: skip
STEPS = 4  # the first warms up and is not timed
PROMPTS_PER_STEP = {"rankings-4": 4, "rankings-9": 1}
SAME_LOSS = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hh", help="pairs.jsonl of hh-rlhf, for hh-harmless; left out without")
    parser.add_argument(
        "--encoder", help="a sentence encoder's folder, for score-encoder (default: a BERT of MiniLM's size, made from nothing)"
    )
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.works) - set(WORKS):
        sys.exit(f"error: no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    if args.side:
        print(json.dumps(measure(args.works[0], args.side, args)))
        return
    options = [f"--{name}={value}" for name in ("hh", "encoder") if (value := getattr(args, name))]
    for work in args.works or [work for work in WORKS if work != "hh-harmless" or args.hh]:
        compare(__file__, work, options, args.rounds, WORKS[work], check)


def check(work: str, found: dict[str, dict[str, Any]]) -> None:
    """Speed counts for nothing where the two did not do the same."""
    if "losses" in found["ours"]:
        apart = max(abs(a - b) for a, b in zip(found["ours"]["losses"], found["peer"]["losses"], strict=True))
        if apart > SAME_LOSS:
            sys.exit(f"error: {work}: the loss curves are {apart:.4f} apart: {found['ours']['losses']} and {found['peer']['losses']}")
    else:
        from scipy.stats import spearmanr

        rho = float(spearmanr(found["ours"]["scores"], found["peer"]["scores"]).statistic)
        if rho < 0.999:
            sys.exit(f"error: {work}: the scores rank otherwise: Spearman {rho:.5f}")
        for side in found.values():
            del side["scores"]
        found["ours"]["spearman"] = rho


# One measurement


def measure(work: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    import warnings

    import transformers
    import trl  # noqa: F401 both sides pay for the same imports

    import pipeline.reward.trainer  # noqa: F401

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = train if work in ("rankings-4", "rankings-9", "hh-harmless") else score
    return measured(lambda: run(work, side, args))


def decoder(vocabulary: int) -> Any:
    """A GPT-2 of 6 layers, 384 wide."""
    from transformers import AutoModelForSequenceClassification, GPT2Config

    size = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 2048, "vocab_size": vocabulary}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "num_labels": 1}
    return AutoModelForSequenceClassification.from_config(GPT2Config(**size, **ids))


def count_tokens(model: Any) -> list[int]:
    """How many tokens, padding and all, go through the model's first layer."""
    seen: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].numel()))
    return seen


def train(work: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from pipeline.config import Scratch
    from pipeline.models.scratch import train_tokenizer
    from pipeline.reward.trainer import RewardTrainer

    tokenizer = train_tokenizer([], Scratch(vocabulary=260), "\n")
    rows, vocabulary = hh_rows(args.hh) if work == "hh-harmless" else ranked_rows(work)
    model = decoder(vocabulary)
    seen = count_tokens(model)
    batch = 8 if work == "hh-harmless" else PROMPTS_PER_STEP[work]
    real = sum(len(ids) for row in rows[batch:] for ids in row["ids"])
    if side == "peer":
        rows = [pair for row in rows for pair in all_pairs(row["ids"])]
        batch = len(rows) // STEPS
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(times) == 1:
                seen.clear()
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        plain = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
        steps = {"max_steps": STEPS, "per_device_train_batch_size": batch, "logging_steps": 1, "save_strategy": "no"}
        order = {"train_sampling_strategy": "sequential", "learning_rate": 1e-4}
        ours = {"remove_unused_columns": False} if side == "ours" else {}
        options = {"args": trl.RewardConfig(folder, max_length=None, **plain, **steps, **order, **ours), "callbacks": [Clock()]}
        objective = {"objective": "pairwise" if work == "hh-harmless" else "ranking"} if side == "ours" else {}
        cls = RewardTrainer if side == "ours" else trl.RewardTrainer
        trainer = cls(model, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **objective, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": times[-1] - times[1], "real_tokens": real, "losses": losses, "flops": 6 * weights(model) * sum(seen),
        "model": "GPT-2, 6 layers of 384", "prompts_per_step": 8 if work == "hh-harmless" else PROMPTS_PER_STEP[work],
    }  # fmt: skip


def ranked_rows(work: str) -> tuple[list[dict[str, Any]], int]:
    """Prompts of 40 to 280 tokens, each with K answers of 10 to 110, in order of rank."""
    rng = random.Random(0)
    ids = lambda low, high: [rng.randrange(3, 5000) for _ in range(rng.randint(low, high))]  # noqa: E731
    rows = []
    for _ in range(STEPS * PROMPTS_PER_STEP[work]):
        prompt = ids(40, 280)
        answers = [prompt + ids(10, 110) for _ in range(int(work.rsplit("-", 1)[1]))]
        rows.append({"ids": answers, "answer": [len(prompt)] * len(answers), "target": list(range(1, len(answers) + 1))})
    return rows, 5000


def hh_rows(path: str | None) -> tuple[list[dict[str, Any]], int]:
    """The first pairs of hh-rlhf, by a tokenizer trained on them."""
    from pipeline.config import Scratch, Source
    from pipeline.data.readers import read_source
    from pipeline.models.scratch import train_tokenizer
    from pipeline.reward.encoding import Encoding, encode_response

    if not path:
        sys.exit("error: hh-harmless needs --hh, the pairs.jsonl of hh-rlhf's harmless-base")
    found = [item.record for item in read_source(Source(format="dialogues", path=path), 0) if not item.fault]
    texts = [message["content"] for record in found for message in [*record["prompt"], *record["chosen"]]]
    tokenizer = train_tokenizer(texts, Scratch(vocabulary=8000), "\n")
    rows = []
    for record in found[: 8 * STEPS]:
        encoded = [encode_response(tokenizer, Encoding(max_length=1024), record["prompt"], record[side]) for side in ("chosen", "rejected")]
        rows.append({"ids": [each.ids for each in encoded], "answer": [each.answer for each in encoded], "target": [1, 2]})
    return rows, len(tokenizer)


def all_pairs(answers: list[list[int]]) -> list[dict[str, Any]]:
    return [{"chosen_ids": better, "rejected_ids": worse} for i, better in enumerate(answers) for worse in answers[i + 1 :]]


def score(work: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    from transformers import pipeline as hf_pipeline

    from pipeline.config import Scratch
    from pipeline.models.scratch import train_tokenizer
    from pipeline.reward.encoding import Encoding
    from pipeline.reward.model import RewardModel
    from pipeline.reward.settings import RewardSettings

    words = [f"w{n}" for n in range(2000)]
    if work == "score-encoder":
        model, tokenizer = encoder(args.encoder, words)
        if args.encoder:
            words = sorted(token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 2)[:2000]
        prompts, answers = mixed_rows(words)
        how = Encoding("pair", eos=False, max_length=512)
        inputs: list[Any] = [{"text": prompt, "text_pair": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    else:
        tokenizer = train_tokenizer(words, Scratch(vocabulary=2300), "\n")
        model = decoder(len(tokenizer))
        prompts, answers = sixteen_answers(words, tokenizer, int(work.rsplit("-", 1)[1]))
        how = Encoding("concatenation", eos=False, max_length=2048)
        inputs = [prompt + "\n" + answer for prompt, answer in zip(prompts, answers, strict=True)]
    tokenizer.model_max_length = how.max_length
    model.config.pad_token_id = tokenizer.pad_token_id
    seen = count_tokens(model)
    if side == "ours":
        reward = RewardModel(model, tokenizer, RewardSettings(encoding=how))
        run = lambda: reward.score(prompts, answers)  # noqa: E731
    else:
        classify = hf_pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, batch_size=16, function_to_apply="none")
        run = lambda: [row["score"] for row in classify(inputs, truncation=True)]  # noqa: E731
    run_few = reward.score(prompts[:32], answers[:32]) if side == "ours" else classify(inputs[:32], truncation=True)  # warm
    assert len(run_few) == 32
    seen.clear()
    start = time.perf_counter()
    scores = run()
    seconds = time.perf_counter() - start
    lengths = [
        min(len(ids), how.max_length) for ids in tokenizer([" ".join(pair) for pair in zip(prompts, answers, strict=True)])["input_ids"]
    ]
    return {
        "seconds": seconds, "real_tokens": sum(lengths), "scores": scores, "flops": 2 * weights(model) * sum(seen), "rows": len(scores),
        "model": model.config.model_type,
    }  # fmt: skip


def encoder(folder: str | None, words: list[str]) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipeline.config import Scratch
    from pipeline.models.loading import head_config
    from pipeline.models.scratch import new_classifier

    head = head_config(["reward"], "regression")
    if folder:
        return AutoModelForSequenceClassification.from_pretrained(folder, **head), AutoTokenizer.from_pretrained(folder)
    size = Scratch(architecture="bert", layers=6, width=384, heads=12, vocabulary=2300, positions=512)
    return new_classifier(words, size, "\n", head)


def mixed_rows(words: list[str]) -> tuple[list[str], list[str]]:
    """2,000 pairs whose lengths are as uneven as people's: log-normal, the median some 40 words, cut at 200."""
    rng = random.Random(0)
    text = lambda middle: " ".join(rng.choices(words, k=min(200, max(3, int(rng.lognormvariate(middle, 0.8))))))  # noqa: E731
    return [text(2.5) for _ in range(2000)], [text(3.3) for _ in range(2000)]


def sixteen_answers(words: list[str], tokenizer: Any, prompt_tokens: int) -> tuple[list[str], list[str]]:
    """Four prompts of about so many tokens, each with 16 answers of 16 to 64 words."""
    rng = random.Random(0)
    per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)
    prompts = [" ".join(rng.choices(words, k=int(prompt_tokens / per_word))) for _ in range(4)]
    answers = [" ".join(rng.choices(words, k=int(rng.randint(16, 64) / per_word))) for _ in range(64)]
    return [prompt for prompt in prompts for _ in range(16)], answers


if __name__ == "__main__":
    main()
