"""Tiny models and records, made once: no test needs a hub or a download.

Property tests draw the same examples every time, so that a green suite stays green;
`--hypothesis-profile=default` looks further.
`make test` runs two workers. Each process has one thread, because more only wait for each other on models
this small.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # torch and numpy read it when they are imported, here and in subprocesses
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline import config
from pipeline.artifacts import files
from pipeline.models.loading import head_config
from pipeline.models.scratch import new_classifier, new_policy
from pipeline.prepare import demo

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files marked `long` first, so that the workers finish together."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Keep what the imports made out of garbage collection: accelerate collects at the end of each training,
    over all objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C interrupts, as in a terminal: a shell starts its background jobs with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def hash_cache(tmp_path_factory) -> None:
    """Hashes go where the tests' files go."""
    files.CACHE = tmp_path_factory.mktemp("hashes")


@pytest.fixture(scope="session")
def tiny_records(tmp_path_factory) -> Path:
    """A small prepare artifact: the demo world's pairs through the comparisons reader."""
    import json

    from pipeline.prepare import stage as prepare

    root = tmp_path_factory.mktemp("records")
    pairs = [
        record
        for kind, record in demo.rows(config.Source(format="demo"), 0)
        if kind == "comparisons" and record["chosen"]
    ][::40]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    source = {"format": "comparisons", "path": str(root / "pairs.jsonl")}
    return prepare.run(config.PrepareStage(run="tiny", runs=str(root / "runs"), source=[source]))


@pytest.fixture(scope="session")
def tiny_feedback(tmp_path_factory) -> Path:
    """A small prepare artifact with all kinds of feedback: the first questions of the demo world."""
    from pipeline.prepare import stage as prepare

    source = [{"format": "demo", "classes": ["nothate", "hate"], "limit": 1400}]
    return prepare.run(
        config.PrepareStage(run="tiny", runs=str(tmp_path_factory.mktemp("feedback")), source=source)
    )


@pytest.fixture(scope="session")
def demo_texts() -> list[str]:
    rows = demo.rows(config.Source(format="demo"), 0)
    return [text for kind, record in rows if kind == "demonstrations" for text in record.values()]


@pytest.fixture(scope="session")
def tiny_tokenizer(demo_texts):
    return new_policy(demo_texts, config.Scratch(layers=1, width=16, heads=2, vocabulary=700), "\n")[1]


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory, demo_texts) -> dict[str, Path]:
    """Random encoder checkpoints by architecture, with dropout as published ones have, without a head."""
    torch.manual_seed(0)
    found = {}
    for name in ("bert", "roberta", "distilbert"):
        size = config.Scratch(architecture=name, layers=2, width=64, heads=4, vocabulary=700, positions=128)
        model, tokenizer = new_classifier(demo_texts, size, "\n", head_config(["LABEL_0"], "regression"))
        found[name] = _saved(model.base_model, tokenizer, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random GPT-2 checkpoint, with dropout as published ones have."""
    torch.manual_seed(0)
    ids = {
        "bos_token_id": 1,
        "eos_token_id": tiny_tokenizer.eos_token_id,
        "pad_token_id": tiny_tokenizer.pad_token_id,
    }
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tiny_tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2, **ids)
    )
    return _saved(model, tiny_tokenizer, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer) -> Path:
    """A random Llama checkpoint, its sizes large enough for bitsandbytes' blocks."""
    torch.manual_seed(0)
    ids = {
        "bos_token_id": 1,
        "eos_token_id": tiny_tokenizer.eos_token_id,
        "pad_token_id": tiny_tokenizer.pad_token_id,
    }
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tiny_tokenizer), max_position_embeddings=128, **size, **ids)
    )
    return _saved(model, tiny_tokenizer, tmp_path_factory.mktemp("llama"))


def _saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
