"""Compare reward training and scoring with TRL and with a `transformers` pipeline, run alternately.

    python benchmarks/reward.py [WORK …] [--rounds 5] [--hh PAIRS.jsonl] [--encoder FOLDER]

Each measurement is one work (`WORKS`) on one side (`ours` or `peer`), in its own process. In each round
both sides run, and they alternate which one runs first. The script prints the median over rounds of the
ratio within a round, because the speed of a machine drifts.

`benchmarks/results.json` contains sizes, seconds, real tokens per second, peak memory above that of the
imports, and the fraction of the machine's matrix-multiply rate. Real tokens count each response with its
prompt once, without padding. Both sides train the same model on the same ids in the same steps, and their
loss curves must agree.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from typing import Any

from harness import Round, compare, count_weights, measure_run

WORKS = {  # name -> required ratio
    "rankings-4": 6.0,
    "rankings-9": 12.0,
    "hh-harmless": 3.0,
    "score-encoder": 4.0,
    "best-of-16-256": 3.0,
    "best-of-16-512": 4.0,
}
STEPS = 4  # the first is a warm-up and not timed
PROMPTS_PER_STEP = {"rankings-4": 4, "rankings-9": 1, "hh-harmless": 8}
MAX_LOSS_DIFFERENCE = 2e-3
MIN_SPEARMAN = 0.999
NUM_PROMPTS, RESPONSES_PER_PROMPT = 4, 16  # of best-of-16


def main() -> None:
    """Run the works, or, with `--side`, one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: 5)")
    parser.add_argument("--hh", help="pairs.jsonl of hh-rlhf for hh-harmless, which is skipped without it")
    parser.add_argument(
        "--encoder",
        help="folder of a sentence encoder for score-encoder (default: a BERT of MiniLM's size from scratch)",
    )
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.works) - set(WORKS):
        sys.exit(f"error: no work {', '.join(sorted(unknown))}; expected {', '.join(WORKS)}")
    if args.side:
        print(json.dumps(measure(args.works[0], args.side, args)))
        return

    options = [f"--{name}={value}" for name in ("hh", "encoder") if (value := getattr(args, name))]
    for work in args.works or [work for work in WORKS if work != "hh-harmless" or args.hh]:
        compare(__file__, work, options, args.rounds, WORKS[work], check)


def check(work: str, by_side: Round) -> None:
    """Stop if the two sides disagree: a ratio of speeds means something only for the same computation."""
    ours, peer = by_side["ours"], by_side["peer"]
    if "losses" in ours:
        difference = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
        if difference > MAX_LOSS_DIFFERENCE:
            curves = f"{ours['losses']} and {peer['losses']}"
            sys.exit(f"error: {work}: the loss curves differ by {difference:.4f}: {curves}")
        return

    from scipy.stats import spearmanr

    rho = float(spearmanr(ours["scores"], peer["scores"]).statistic)
    if rho < MIN_SPEARMAN:
        sys.exit(f"error: {work}: the scores have different orders: Spearman {rho:.5f}")
    for measurement in by_side.values():
        del measurement["scores"]
    ours["spearman"] = rho


# One measurement


def measure(work: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one work on one side in this process; return sizes, seconds, rates and memory."""
    import warnings

    import transformers
    import trl  # noqa: F401 both sides pay for the same imports

    import pipeline.reward.trainer  # noqa: F401

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = train if work in PROMPTS_PER_STEP else score
    return measure_run(lambda: run(work, side, args))


def new_decoder(vocabulary: int) -> Any:
    """Build a randomly initialized GPT-2 classifier of 6 layers, 384 wide."""
    from transformers import AutoModelForSequenceClassification, GPT2Config

    config = GPT2Config(
        n_layer=6,
        n_head=6,
        n_embd=384,
        n_positions=2048,
        vocab_size=vocabulary,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        num_labels=1,
    )
    return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def count_tokens(model: Any) -> list[int]:
    """Return a list that grows by the number of tokens, with padding, of each forward pass."""
    counts: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _module, inputs: counts.append(inputs[0].numel()))
    return counts


# Training


def train(work: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a reward model for STEPS steps with this project's trainer or with TRL's."""
    from pipeline.config import Scratch
    from pipeline.models.scratch import train_tokenizer

    tokenizer = train_tokenizer([], Scratch(vocabulary=260), "\n")
    rows, vocabulary = hh_rows(args.hh) if work == "hh-harmless" else ranked_rows(work)
    model = new_decoder(vocabulary)
    counts = count_tokens(model)
    batch_size = PROMPTS_PER_STEP[work]
    real_tokens = sum(len(ids) for row in rows[batch_size:] for ids in row["ids"])

    if side == "peer":
        rows = [pair for row in rows for pair in all_pairs(row["ids"])]
        batch_size = len(rows) // STEPS
    objective = "pairwise" if work == "hh-harmless" else "ranking"
    times, losses = time_steps(side, model, tokenizer, rows, batch_size, objective, counts)
    return {
        "seconds": times[-1] - times[1],
        "real_tokens": real_tokens,
        "losses": losses,
        "flops": 6 * count_weights(model) * sum(counts),
        "model": "GPT-2, 6 layers of 384",
        "prompts_per_step": PROMPTS_PER_STEP[work],
    }


def time_steps(
    side: str,
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    batch_size: int,
    objective: str,
    counts: list[int],
) -> tuple[list[float], list[float]]:
    """Train one epoch; return the time at the start of each step and at the end, and the loss of each step.

    `counts` is cleared after the warm-up.
    """
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from pipeline.reward.trainer import RewardTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(times) == 1:
                counts.clear()
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    settings: dict[str, Any] = {
        "max_length": None,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch_size,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
    }
    options: dict[str, Any] = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer_class: Any = trl.RewardTrainer
    if side == "ours":
        trainer_class = RewardTrainer
        settings["remove_unused_columns"] = False
        options["objective"] = objective

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.RewardConfig(folder, **settings)
        trainer = trainer_class(model, args=arguments, callbacks=[Clock()], **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return times, losses


def ranked_rows(work: str) -> tuple[list[dict[str, Any]], int]:
    """Return rows of K random responses in order of rank, and the vocabulary size.

    Prompts have 40 to 280 tokens, responses 10 to 110.
    """
    rng = random.Random(0)
    num_responses = int(work.rsplit("-", 1)[1])

    def random_ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 5000) for _ in range(rng.randint(low, high))]

    rows = []
    for _ in range(STEPS * PROMPTS_PER_STEP[work]):
        prompt = random_ids(40, 280)
        ids = [prompt + random_ids(10, 110) for _ in range(num_responses)]
        start = [len(prompt)] * num_responses
        rows.append({"ids": ids, "response_start": start, "target": list(range(1, num_responses + 1))})
    return rows, 5000


def hh_rows(path: str | None) -> tuple[list[dict[str, Any]], int]:
    """Return the first pairs of hh-rlhf, encoded by a tokenizer trained on them, and the vocabulary size."""
    from pipeline.config import Scratch, Source
    from pipeline.data.readers import read_source
    from pipeline.models.scratch import train_tokenizer
    from pipeline.reward.encoding import Encoding, encode_response

    if not path:
        sys.exit("error: hh-harmless needs --hh, the pairs.jsonl of hh-rlhf's harmless-base")
    items = read_source(Source(format="dialogues", path=path))
    records = [item.record for item in items if not item.fault]
    texts = [message["content"] for record in records for message in [*record["prompt"], *record["chosen"]]]
    tokenizer = train_tokenizer(texts, Scratch(vocabulary=8000), "\n")

    rows = []
    for record in records[: PROMPTS_PER_STEP["hh-harmless"] * STEPS]:
        encoded = [
            encode_response(tokenizer, Encoding(max_length=1024), record["prompt"], record[side])
            for side in ("chosen", "rejected")
        ]
        rows.append(
            {
                "ids": [each.ids for each in encoded],
                "response_start": [each.response_start for each in encoded],
                "target": [1, 2],
            }
        )
    return rows, len(tokenizer)


def all_pairs(responses: list[list[int]]) -> list[dict[str, Any]]:
    """Return all pairs of ranked responses, best first, as rows of `trl.RewardTrainer`."""
    return [
        {"chosen_ids": chosen, "rejected_ids": rejected}
        for index, chosen in enumerate(responses)
        for rejected in responses[index + 1 :]
    ]


# Scoring


def score(work: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Score the rows of a work with `RewardModel` or with a `transformers` pipeline."""
    model, tokenizer, encoding, prompts, responses = scoring_inputs(work, args.encoder)
    tokenizer.model_max_length = encoding.max_length
    model.config.pad_token_id = tokenizer.pad_token_id
    counts = count_tokens(model)

    make_scorer = our_scorer if side == "ours" else peer_scorer
    score_rows = make_scorer(model, tokenizer, encoding, prompts, responses)
    assert len(score_rows(32)) == 32  # warm-up
    counts.clear()
    start = time.perf_counter()
    scores = score_rows(len(prompts))
    seconds = time.perf_counter() - start

    texts = [" ".join(pair) for pair in zip(prompts, responses, strict=True)]
    lengths = [min(len(ids), encoding.max_length) for ids in tokenizer(texts)["input_ids"]]
    return {
        "seconds": seconds,
        "real_tokens": sum(lengths),
        "scores": scores,
        "flops": 2 * count_weights(model) * sum(counts),
        "rows": len(scores),
        "model": model.config.model_type,
    }


def scoring_inputs(work: str, folder: str | None) -> tuple[Any, Any, Any, list[str], list[str]]:
    """Return (model, tokenizer, encoding, prompts, responses); `folder` is that of the encoder, if any."""
    from pipeline.config import Scratch
    from pipeline.models.scratch import train_tokenizer
    from pipeline.reward.encoding import Encoding

    words = [f"w{number}" for number in range(2000)]
    if work == "score-encoder":
        model, tokenizer = load_encoder(folder, words)
        if folder:
            vocabulary = tokenizer.get_vocab()
            words = sorted(token for token in vocabulary if token.isalpha() and len(token) > 2)[:2000]
        return model, tokenizer, Encoding("pair", eos=False, max_length=512), *uneven_rows(words)

    tokenizer = train_tokenizer(words, Scratch(vocabulary=2300), "\n")
    model = new_decoder(len(tokenizer))
    rows = best_of_rows(words, tokenizer, int(work.rsplit("-", 1)[1]))
    return model, tokenizer, Encoding("concatenation", eos=False, max_length=2048), *rows


def our_scorer(model: Any, tokenizer: Any, encoding: Any, prompts: list[str], responses: list[str]) -> Any:
    """Return a function that scores the first so many rows with `RewardModel`."""
    from pipeline.reward.model import RewardModel
    from pipeline.reward.settings import RewardSettings

    reward = RewardModel(model, tokenizer, RewardSettings(encoding=encoding))
    return lambda count: reward.score(prompts[:count], responses[:count])


def peer_scorer(model: Any, tokenizer: Any, encoding: Any, prompts: list[str], responses: list[str]) -> Any:
    """Return a function that scores the first so many rows with a `transformers` pipeline."""
    from transformers import pipeline

    classify = pipeline(
        "text-classification",
        model=model.eval(),
        tokenizer=tokenizer,
        batch_size=16,
        function_to_apply="none",
    )
    rows = zip(prompts, responses, strict=True)
    inputs: list[Any]
    if encoding.form == "pair":
        inputs = [{"text": prompt, "text_pair": response} for prompt, response in rows]
    else:
        inputs = [prompt + "\n" + response for prompt, response in rows]
    return lambda count: [row["score"] for row in classify(inputs[:count], truncation=True)]


def load_encoder(folder: str | None, words: list[str]) -> tuple[Any, Any]:
    """Load (model, tokenizer) of an encoder from `folder`, or build a BERT of MiniLM's size from scratch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from pipeline.config import Scratch
    from pipeline.models.loading import head_config
    from pipeline.models.scratch import new_classifier

    head = head_config(["reward"], "regression")
    if folder:
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False, **head)
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    size = Scratch(architecture="bert", layers=6, width=384, heads=12, vocabulary=2300, positions=512)
    return new_classifier(words, size, "\n", head)


def uneven_rows(words: list[str]) -> tuple[list[str], list[str]]:
    """Return 2,000 prompts and responses whose lengths are as uneven as those of real data.

    Lengths are log-normal, at most 200 words; the median pair has about 40.
    """
    rng = random.Random(0)

    def random_text(log_median: float) -> str:
        length = min(200, max(3, int(rng.lognormvariate(log_median, 0.8))))
        return " ".join(rng.choices(words, k=length))

    return [random_text(2.5) for _ in range(2000)], [random_text(3.3) for _ in range(2000)]


def best_of_rows(words: list[str], tokenizer: Any, prompt_tokens: int) -> tuple[list[str], list[str]]:
    """Return four prompts of about `prompt_tokens` tokens, each with 16 responses of 16 to 64 tokens."""
    rng = random.Random(0)
    tokens_per_word = len(tokenizer(" ".join(words))["input_ids"]) / len(words)

    def random_text(tokens: int) -> str:
        return " ".join(rng.choices(words, k=int(tokens / tokens_per_word)))

    prompts = [random_text(prompt_tokens) for _ in range(NUM_PROMPTS)]
    responses = [random_text(rng.randint(16, 64)) for _ in range(NUM_PROMPTS * RESPONSES_PER_PROMPT)]
    return [prompt for prompt in prompts for _ in range(RESPONSES_PER_PROMPT)], responses


if __name__ == "__main__":
    main()
