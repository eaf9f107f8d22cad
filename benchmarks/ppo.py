"""This project's PPO beside the last one TRL had (1.12, `trl.experimental.ppo`), alternately, in one process tree.

    python benchmarks/ppo.py [WORK …] --trl FOLDER [--rounds 3]

FOLDER holds TRL 1.12, kept out of the environment: `make build/trl-1.12`. Both sides get the same GPT-2 (6 layers of 256) as policy, reward
and, for TRL, value and reference; the same prompts of 8 to 64 tokens; 64 answers of 48 tokens an update; 4 PPO epochs of one optimizer
step. The first update warms up and is not timed. In `ppo-lora` policy, reference, value and reward stand on one backbone here; TRL has a
LoRA policy, a value model and a reward model. `ppo-length` is this project alone, as answers grow from 24 to 96 tokens.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from typing import Any

from harness import child, compare, keep, measured, weights

WORKS = {  # name -> (required ratio, activation, micro-batch, with LoRA)
    "ppo-fused": (1.8, "gelu_pytorch_tanh", 64, False),
    "ppo-shipped": (2.3, "gelu_new", 64, False),
    "ppo-best": (2.0, "gelu_pytorch_tanh", 16, False),
    "ppo-lora": (1.0, "gelu_pytorch_tanh", 16, True),
}
LENGTHS = (24, 48, 96)
UPDATES, BATCH, EPOCHS, ANSWER = 3, 64, 4, 48  # the first update is not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join([*WORKS, "ppo-length"]))
    parser.add_argument("--trl", required=True, metavar="FOLDER", help="where TRL 1.12 lies")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=ANSWER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.works) - {*WORKS, "ppo-length"}:
        sys.exit(f"error: no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}, ppo-length")
    if args.side:
        print(json.dumps(measure(args.works[0], args.side, args.tokens)))
        return
    for work in args.works or [*WORKS, "ppo-length"]:
        if work == "ppo-length":
            lengths(args.trl)
        else:
            compare(__file__, work, [f"--trl={args.trl}"], args.rounds, WORKS[work][0], check, peer_path=args.trl)


def check(work: str, found: dict[str, dict[str, Any]]) -> None:
    """Both must have drawn as many tokens, but for the few answers that end early."""
    ours, peer = (found[side]["real_tokens"] for side in ("ours", "peer"))
    if abs(ours - peer) > 0.03 * peer:
        sys.exit(f"error: {work}: {ours} and {peer} tokens were drawn and trained on; expected as many")


def lengths(trl: str) -> None:
    """Seconds per update and per token as answers grow."""
    found = [child(__file__, "ppo-fused", "ours", [f"--trl={trl}", f"--tokens={tokens}"]) for tokens in LENGTHS]
    rows = [
        {"answer_tokens": n, "seconds": f["seconds"] / (UPDATES - 1), "tokens": f["all_tokens"]}
        for n, f in zip(LENGTHS, found, strict=True)
    ]
    keep("ppo-length", {"rows": rows})
    for row in rows:
        each = 1e6 * row["seconds"] / row["tokens"]
        print(
            f"ppo-length {row['answer_tokens']:>4} tokens  {row['seconds']:6.2f} s an update  {each:6.1f} µs a token of prompt and answer"
        )


def measure(work: str, side: str, tokens: int) -> dict[str, Any]:
    import os
    import warnings

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import transformers

    if side == "ours":
        import pipeline.ppo  # noqa: F401
    else:
        import trl.experimental.ppo  # noqa: F401
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _, activation, micro, lora = WORKS[work]
    return measured(lambda: (ours if side == "ours" else peer)(activation, micro, tokens, lora))


def models(activation: str) -> tuple[Any, Any, Any]:
    """(policy, classifier, tokenizer): made from nothing, the same on both sides."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    from pipeline.config import Scratch
    from pipeline.models.scratch import train_tokenizer

    tokenizer = train_tokenizer([" ".join(WORDS)], Scratch(vocabulary=5000, positions=256), "\n")
    size = {"n_layer": 6, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 5000, "activation_function": activation}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(**size, **ids))
    return policy, GPT2ForSequenceClassification(GPT2Config(**size, **ids, num_labels=1)), tokenizer


WORDS = [f"w{n}" for n in range(2000)]


def prompts(tokenizer: Any) -> list[str]:
    """UPDATES × BATCH prompts of 8 to 64 tokens."""
    from pipeline.models.chat import prompt_ids

    rng = random.Random(0)
    found = []
    while len(found) < UPDATES * BATCH:
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 40)))
        if 8 <= len(prompt_ids(tokenizer, text)) <= 64:
            found.append(text)
    return found


PLAIN = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}


def adapter(task: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


def on_one_backbone(policy: Any, classifier: Any, tokenizer: Any, settings: Any, folder: str) -> tuple[Any, Any]:
    """(policy with an adapter, reward source): the reward artifact is an adapter of the same base."""
    from pathlib import Path

    from peft import get_peft_model

    from pipeline.artifacts.inputs import open_external
    from pipeline.ppo.backbone import attach_reward_adapter

    get_peft_model(classifier, adapter("SEQ_CLS")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings.save(Path(folder))
    policy = get_peft_model(policy, adapter("CAUSAL_LM"))
    return policy, attach_reward_adapter(policy, open_external(folder, "reward"), "reward_0")


def ours(activation: str, micro: int, tokens: int, lora: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from pipeline import PPOConfig, PPOTrainer, RewardModel
    from pipeline.reward.encoding import Encoding
    from pipeline.reward.functions import reward_from_model
    from pipeline.reward.settings import RewardSettings

    policy, classifier, tokenizer = models(activation)
    settings = RewardSettings(encoding=Encoding("chat", eos=True, max_length=256))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    steps = {
        "num_rollouts": UPDATES,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": BATCH // micro,
        "num_ppo_epochs": EPOCHS,
    }
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(folder, **PLAIN, **steps, response_tokens=tokens, generation_batch_size=BATCH, max_kl=None, learning_rate=3e-6)
        data = Dataset.from_list([{"prompt": text} for text in prompts(tokenizer)])
        if lora:
            policy, reward = on_one_backbone(policy, classifier, tokenizer, settings, folder)
            del classifier
        else:
            reward = reward_from_model(RewardModel(classifier, tokenizer, settings))
        trainer = PPOTrainer(policy, reward, args, data, tokenizer, callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)
        drawn: list[tuple[int, int]] = []
        collect = trainer.collect

        def counted(rollout: int) -> Any:
            experience = collect(rollout)
            drawn.append((int(experience.mask.sum()), int(experience.responses.query_mask.sum())))
            return experience

        trainer.collect = counted  # type: ignore[method-assign]
        trainer.train()
    return result(policy, times, [answer for answer, _ in drawn], [sum(each) for each in drawn])


def peer(activation: str, micro: int, tokens: int, lora: bool) -> dict[str, Any]:
    import copy

    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from pipeline.models.chat import prompt_ids

    policy, classifier, tokenizer = models(activation)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    steps = {"total_episodes": UPDATES * BATCH, "per_device_train_batch_size": micro, "gradient_accumulation_steps": BATCH // micro}
    with tempfile.TemporaryDirectory() as folder:
        drawing = {"response_length": tokens, "temperature": 1.0, "stop_token": "eos", "num_sample_generations": 0}
        args = PPOConfig(
            folder, **PLAIN, **steps, **drawing, num_ppo_epochs=EPOCHS, local_rollout_forward_batch_size=BATCH, learning_rate=3e-6
        )
        rows = [{"input_ids": prompt_ids(tokenizer, text)} for text in prompts(tokenizer)]
        tokenizer.padding_side = "left"
        data = Dataset.from_list(rows)
        value = copy.deepcopy(classifier)
        trainer = PPOTrainer(
            args, tokenizer, policy, None, classifier, data, value, eval_dataset=data.select(range(64)), callbacks=[Clock()],
            peft_config=adapter("CAUSAL_LM") if lora else None,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    every = [BATCH * tokens] * UPDATES
    return result(policy, times, every, every)


def result(policy: Any, times: list[float], answers: list[int], every: list[int]) -> dict[str, Any]:
    """Of the updates after the first. Its flops: four epochs forward and back, and the reading of each token by policy and reference."""
    tokens = sum(every[1:])
    return {
        "seconds": times[-1] - times[0], "real_tokens": sum(answers[1:]), "all_tokens": tokens // (UPDATES - 1),
        "flops": (6 * EPOCHS + 4) * weights(policy) * tokens, "model": "GPT-2, 6 layers of 256",
    }  # fmt: skip


if __name__ == "__main__":
    main()
