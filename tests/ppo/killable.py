"""Runs PPO stages in forked children, and kills them where it is told to: `test_resume.py` starts it and
writes it jobs.

A job is a line of JSON: `stage` (of `PPOStage`), `fault` (the number of the event at which SIGKILL comes, or
null) and `digest` (where the
hash of the optimizer's state goes once training is done). An event is a rollout, a micro-batch, an optimizer
step, or a file being written,
of which then only half is there. Answers each with a line: the exit code and the names of the events that
came.
"""

import gc
import hashlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import save
from transformers import TrainerState

from pipeline import config
from pipeline.artifacts import files
from pipeline.ppo import stage as ppo
from pipeline.ppo import trainer as trainer_module
from pipeline.ppo.trainer import PPOTrainer
from pipeline.training.checkpoints import train_with_resume


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # each child ends with a collection, which need not look at what the imports made
    for line in sys.stdin:
        job = json.loads(line)
        events = Path(job["digest"]).with_suffix(".events")
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what is printed is not an answer
            torch.set_num_threads(1)
            files.CACHE = Path(job["stage"]["runs"])
            watch(events, job["fault"])
            keep_digest(Path(job["digest"]))
            ppo.run(config.PPOStage(**job["stage"]))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(
            json.dumps({"code": os.waitstatus_to_exitcode(status), "events": events.read_text().split()}),
            flush=True,
        )


def watch(log: Path, fault: int | None) -> None:
    """Count the events, and die at the one that is wanted."""
    log.write_text("")
    count = 0

    def die_here(name: str) -> bool:
        nonlocal count
        count += 1
        with log.open("a") as file:
            file.write(f"{name}\n")
        return fault == count - 1

    def before(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: object, **kwargs: object) -> object:
            if die_here(name):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def halfway(owner: object, name: str, as_bytes, path_of) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            if die_here(name):
                content = as_bytes(*args)
                Path(path_of(*args)).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    before(PPOTrainer, "collect")
    before(PPOTrainer, "compute_loss")
    before(torch.optim.AdamW, "step")
    before(PPOTrainer, "publish")
    before(shutil, "copytree")
    before(ppo, "write_log")
    halfway(trainer_module, "save_file", lambda tensors, *_: save(tensors), lambda _tensors, path: path)
    halfway(torch, "save", pickled, lambda _object, path: path)
    halfway(
        TrainerState,
        "save_to_json",
        lambda state, _path: json.dumps(vars(state), default=str).encode(),
        lambda _state, path: path,
    )


def pickled(value: object, _path: object, save=torch.save) -> bytes:
    save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def keep_digest(path: Path) -> None:
    fit = train_with_resume

    def fitted(trainer: PPOTrainer, work: Path) -> None:
        fit(trainer, work)
        state = trainer.optimizer.state_dict()["state"]
        hashed = hashlib.sha256()
        for number in sorted(state):
            for name in sorted(state[number]):
                hashed.update(torch.as_tensor(state[number][name]).numpy().tobytes())
        path.write_text(hashed.hexdigest())

    ppo.train_with_resume = fitted


if __name__ == "__main__":
    main()
