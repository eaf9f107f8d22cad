"""PPO stages of several sizes, each in a process of its own: bytes over those of the imports at their peak,
and what doctor estimated.
"""

import gc
import json
import multiprocessing
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from pipeline import config
from pipeline.models.scratch import decoder_config
from pipeline.ppo import stage as ppo
from pipeline.tools.doctor import memory
from pipeline.tools.doctor.plans import plan_stage, stage_arguments

SIZES: dict[str, dict[str, Any]] = {  # layers, width, micro-batch, LoRA
    "small": {"layers": 4, "width": 256, "rows": 64, "lora": None},
    "large": {"layers": 6, "width": 384, "rows": 48, "lora": None},
    "large, LoRA": {"layers": 8, "width": 512, "rows": 32, "lora": {"r": 16, "target_modules": "all-linear"}},
}


def spread(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
    return [float(len(set(ids))) for ids in completion_ids]


def stage(folder: Path, records: str, name: str) -> config.PPOStage:
    size = SIZES[name]
    training = {
        "num_rollouts": 1,
        "num_ppo_epochs": 2,
        "per_device_train_batch_size": size["rows"],
        "generation_batch_size": size["rows"],
        "response_tokens": 32,
        "min_response_tokens": 32,
        "per_device_eval_batch_size": 16,
        "save_strategy": "no",
    }
    given = {
        "policy": str(folder / name),
        "records": records,
        "reward": f"{__name__}:spread",
        "lora": size["lora"],
    }
    return config.PPOStage(
        run=name.split(",")[0] + str(size["rows"]), runs=str(folder), training=training, **given
    )


def save_policy(folder: Path, words: str, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(words)
    size = config.Scratch(
        layers=SIZES[name]["layers"], width=SIZES[name]["width"], positions=128, vocabulary=len(tokenizer)
    )
    ids = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    GPT2LMHeadModel(decoder_config(size, len(tokenizer), **ids)).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def measure(folder: Path, records: str, name: str, found: Any) -> None:
    before = psutil.Process().memory_info().rss
    ppo.run(stage(folder, records, name))
    found.put(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def estimated(folder: Path, records: str, name: str, found: Any) -> None:
    from pipeline.tools.doctor.examine import longest_prompt

    given = stage(folder, records, name)
    found.put(memory.estimate(*plan_stage(given, {}, stage_arguments(given), longest_prompt(given)))["peak"])


def main(folder: Path, records: str, words: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # each child ends with a collection, which need not look at what the imports made
    forked = multiprocessing.get_context("fork")
    for name in SIZES:
        figures = {"size": name}
        for key, work, given in (
            ("", save_policy, (folder, words, name)),
            ("measured", measure, (folder, records, name)),
            ("estimated", estimated, (folder, records, name)),
        ):
            found = forked.SimpleQueue()
            process = forked.Process(target=work, args=(*given, *([found] if key else [])))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{name}: {work.__name__} failed")
            if key:
                figures[key] = found.get()
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
