"""Compare PPO with the last PPO of TRL (1.12, `trl.experimental.ppo`), run alternately.

    python benchmarks/ppo.py [WORK …] --trl FOLDER [--rounds 3]

FOLDER contains TRL 1.12, which is not in the environment: `make build/trl-1.12`. Both sides get the same
GPT-2 (6 layers of 256) as policy and reward model; TRL gets it as value model and reference too. Both get the
same prompts of 8 to 64 tokens. An update is 64 responses of 48 tokens and 4 PPO epochs of one optimizer step.
The first update is a warm-up and not timed.

In `ppo-lora`, policy, reference, value head and reward model share one backbone here; TRL has a LoRA policy,
a value model and a reward model. In `ppo-uneven`, responses have at most 96 tokens, and each token is the
last with probability 1/24, so that their lengths are geometric. `ppo-length` runs this project alone, with
responses of 24 to 96 tokens.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import Round, compare, count_weights, measure_run, run_side, save_result


class Work(NamedTuple):
    """A setting of both sides, and the required ratio of their speeds.

    Responses have `tokens` tokens; with `mean_tokens` they are uneven, and have at most `tokens`.
    """

    required: float
    activation: str
    micro_batch: int
    with_lora: bool = False
    tokens: int = 48
    mean_tokens: int | None = None


WORKS = {
    "ppo-fused": Work(1.8, "gelu_pytorch_tanh", 64),
    "ppo-shipped": Work(2.3, "gelu_new", 64),
    "ppo-best": Work(2.0, "gelu_pytorch_tanh", 16),
    "ppo-lora": Work(1.0, "gelu_pytorch_tanh", 16, with_lora=True),
    "ppo-uneven": Work(2.5, "gelu_pytorch_tanh", 16, tokens=96, mean_tokens=24),
}
LENGTH_WORK = "ppo-length"
LENGTHS = (24, 48, 96)  # response tokens in ppo-length
UPDATES = 3  # the first is a warm-up and not timed
BATCH = 64  # responses per update
EPOCHS = 4
MAX_TOKEN_DIFFERENCE = 0.03
MAX_UNEVEN_DIFFERENCE = 0.3  # 128 geometric lengths: three standard deviations of the difference are 0.38
WORDS = [f"w{number}" for number in range(2000)]
COMMON_ARGS = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 3e-6,
    "num_ppo_epochs": EPOCHS,
}


def main() -> None:
    """Run the works, or, with `--side`, one measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join([*WORKS, LENGTH_WORK]))
    parser.add_argument("--trl", required=True, metavar="FOLDER", help="folder with TRL 1.12")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side (default: 3)")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()

    works = [*WORKS, LENGTH_WORK]
    if unknown := set(args.works) - set(works):
        sys.exit(f"error: no work {', '.join(sorted(unknown))}; expected {', '.join(works)}")
    if args.side:
        work = WORKS[args.works[0]]
        print(json.dumps(measure(work._replace(tokens=args.tokens or work.tokens), args.side)))
        return

    options = [f"--trl={args.trl}"]
    for work in args.works or works:
        if work == LENGTH_WORK:
            measure_lengths(options)
        else:
            compare(__file__, work, options, args.rounds, WORKS[work].required, check, peer_path=args.trl)


def check(work: str, by_side: Round) -> None:
    """Stop if the two sides sampled different numbers of tokens, except for the few early ends.

    Uneven lengths are sampled by each side, so their sums differ more.
    """
    ours, peer = (by_side[side]["real_tokens"] for side in ("ours", "peer"))
    tolerance = MAX_UNEVEN_DIFFERENCE if WORKS[work].mean_tokens else MAX_TOKEN_DIFFERENCE
    if abs(ours - peer) > tolerance * peer:
        sys.exit(f"error: {work}: {ours} and {peer} tokens were sampled and trained on; expected as many")


def measure_lengths(options: list[str]) -> None:
    """Measure seconds per update and per token for responses of several lengths."""
    rows = []
    for tokens in LENGTHS:
        measurement = run_side(__file__, "ppo-fused", "ours", [*options, f"--tokens={tokens}"])
        rows.append(
            {
                "answer_tokens": tokens,
                "seconds": measurement["seconds"] / (UPDATES - 1),
                "tokens": measurement["all_tokens"],
            }
        )
    save_result(LENGTH_WORK, {"rows": rows})

    for row in rows:
        microseconds = 1e6 * row["seconds"] / row["tokens"]
        print(
            f"{LENGTH_WORK} {row['answer_tokens']:>4} tokens  {row['seconds']:6.2f} s per update"
            f"  {microseconds:6.1f} µs per token of prompt and response"
        )


def measure(work: Work, side: str) -> dict[str, Any]:
    """Run one work on one side in this process; return seconds, tokens, rates and memory."""
    import os
    import warnings

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import transformers

    # The peak memory counts from here on, so imports come first.
    if side == "ours":
        import pipeline.ppo.trainer  # noqa: F401
    else:
        import trl.experimental.ppo  # noqa: F401

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    run = run_ours if side == "ours" else run_peer
    return measure_run(lambda: run(work))


def new_models(work: Work) -> tuple[Any, Any, Any]:
    """Build (policy, classifier, tokenizer) from scratch, the same on both sides."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from pipeline.config import Scratch
    from pipeline.models.scratch import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)], Scratch(vocabulary=5000, positions=256), "\n")
    config = {
        "n_layer": 6,
        "n_head": 4,
        "n_embd": 256,
        "n_positions": 256,
        "vocab_size": 5000,
        "activation_function": work.activation,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(**config))
    if work.mean_tokens:
        end_at_random(policy, tokenizer, work.mean_tokens)
    return policy, GPT2ForSequenceClassification(GPT2Config(**config, num_labels=1)), tokenizer


def end_at_random(policy: Any, tokenizer: Any, mean_tokens: int) -> None:
    """Let GPT-2 sample its end token with probability 1 / mean_tokens at every step.

    The first number of its last hidden state becomes 1, so the end token can have a constant logit. Ids that
    the tokenizer does not have, of which TRL would sample, get no probability.
    """
    import torch

    end, known, constant = tokenizer.eos_token_id, len(tokenizer), 0
    weights, norm = policy.transformer.wte.weight, policy.transformer.ln_f
    with torch.no_grad():
        norm.weight[constant], norm.bias[constant] = 0.0, 1.0
        weights[:, constant] = 0.0
        weights[known:, constant] = -1e4
        weights[end] = 0.0
        logits = policy(torch.arange(64)[None]).logits[0]
        logits[:, end] = -torch.inf
        weights[end, constant] = logits.logsumexp(-1).mean() - math.log(mean_tokens - 1)


def new_prompts(tokenizer: Any) -> list[str]:
    """Return UPDATES × BATCH random prompts of 8 to 64 tokens."""
    from pipeline.models.chat import prompt_ids

    rng = random.Random(0)
    prompts: list[str] = []
    while len(prompts) < UPDATES * BATCH:
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)))
        if 8 <= len(prompt_ids(tokenizer, text)) <= 64:
            prompts.append(text)
    return prompts


def lora_config(task: str) -> Any:
    """Return the LoRA configuration of both sides."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


def share_backbone(
    policy: Any, classifier: Any, tokenizer: Any, settings: Any, folder: str
) -> tuple[Any, Any]:
    """Return a policy with an adapter, and a reward on its backbone.

    The classifier is saved to `folder` as a reward artifact: an adapter of the same base.
    """
    from peft import get_peft_model

    from pipeline.artifacts.inputs import open_external
    from pipeline.ppo.backbone import attach_reward_adapter

    get_peft_model(classifier, lora_config("SEQ_CLS")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(Path(folder))
    policy = get_peft_model(policy, lora_config("CAUSAL_LM"))
    return policy, attach_reward_adapter(policy, open_external(folder, "reward"), "reward_0")


def run_ours(work: Work) -> dict[str, Any]:
    """Train with this project's `PPOTrainer`."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from pipeline import PPOConfig, PPOTrainer, RewardModel
    from pipeline.reward.encoding import Encoding
    from pipeline.reward.functions import reward_from_model
    from pipeline.reward.settings import RewardSettings

    policy, classifier, tokenizer = new_models(work)
    settings = RewardSettings(encoding=Encoding("chat", eos=True, max_length=256))
    data = Dataset.from_list([{"prompt": text} for text in new_prompts(tokenizer)])
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder,
            **COMMON_ARGS,
            num_rollouts=UPDATES,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=BATCH // work.micro_batch,
            response_tokens=work.tokens,
            generation_batch_size=BATCH,
            max_kl=None,
        )
        if work.with_lora:
            policy, reward = share_backbone(policy, classifier, tokenizer, settings, folder)
            del classifier
        else:
            reward = reward_from_model(RewardModel(classifier, tokenizer, settings))
        clock = update_clock("on_epoch_end", times)
        trainer = PPOTrainer(policy, reward, args, data, tokenizer, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        counts = count_sampled_tokens(trainer)
        trainer.train()
    return summarize(policy, times, [response for response, _ in counts], list(map(sum, counts)))


def run_peer(work: Work) -> dict[str, Any]:
    """Train with TRL's `PPOTrainer`."""
    import copy

    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from pipeline.models.chat import prompt_ids

    policy, classifier, tokenizer = new_models(work)
    data = Dataset.from_list([{"input_ids": prompt_ids(tokenizer, text)} for text in new_prompts(tokenizer)])
    tokenizer.padding_side = "left"
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            folder,
            **COMMON_ARGS,
            total_episodes=UPDATES * BATCH,
            per_device_train_batch_size=work.micro_batch,
            gradient_accumulation_steps=BATCH // work.micro_batch,
            local_rollout_forward_batch_size=BATCH,
            response_length=work.tokens,
            temperature=1.0,
            stop_token="eos",
            num_sample_generations=0,
        )
        trainer = PPOTrainer(
            args,
            tokenizer,
            policy,
            None,
            classifier,
            data,
            copy.deepcopy(classifier),
            eval_dataset=data.select(range(64)),
            callbacks=[update_clock("on_step_end", times)],
            peft_config=lora_config("CAUSAL_LM") if work.with_lora else None,
        )
        trainer.remove_callback(PrinterCallback)
        counts = count_peer_tokens(tokenizer.pad_token_id)
        trainer.train()
    all_tokens = [BATCH * work.tokens] * UPDATES  # TRL processes the padding too
    return summarize(policy, times, counts, all_tokens)


def update_clock(event: str, times: list[float]) -> Any:
    """Return a callback that appends the time to `times` at the event that ends an update."""
    from transformers import TrainerCallback

    def append_time(*_: Any, **__: Any) -> None:
        times.append(time.perf_counter())

    callback = TrainerCallback()
    setattr(callback, event, append_time)
    return callback


def count_sampled_tokens(trainer: Any) -> list[tuple[int, int]]:
    """Return a list that receives (response tokens, prompt tokens) of each rollout of the trainer."""
    counts: list[tuple[int, int]] = []
    collect = trainer.collect

    def collect_and_count(number: int) -> Any:
        rollout = collect(number)
        counts.append((int(rollout.mask.sum()), int(rollout.responses.query_mask.sum())))
        return rollout

    trainer.collect = collect_and_count
    return counts


def count_peer_tokens(pad_token_id: int) -> list[int]:
    """Return a list that receives the response tokens of each of TRL's rollouts, up to the end tokens."""
    from trl.experimental.ppo import ppo_trainer

    counts: list[int] = []
    truncate = ppo_trainer.truncate_response

    def truncate_and_count(*args: Any) -> Any:
        response = truncate(*args)
        counts.append(int((response != pad_token_id).sum()))
        return response

    ppo_trainer.truncate_response = truncate_and_count
    return counts


def summarize(
    policy: Any, times: list[float], response_tokens: list[int], all_tokens: list[int]
) -> dict[str, Any]:
    """Return the measurement of the updates after the first; each list has one number per update.

    The FLOPs are those of four PPO epochs forward and backward, and of one forward of policy and reference
    each.
    """
    tokens = sum(all_tokens[1:])
    return {
        "seconds": times[-1] - times[0],
        "real_tokens": sum(response_tokens[1:]),
        "all_tokens": tokens // (UPDATES - 1),
        "flops": (6 * EPOCHS + 4) * count_weights(policy) * tokens,
        "model": "GPT-2, 6 layers of 256",
    }


if __name__ == "__main__":
    main()
