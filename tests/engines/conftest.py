"""Servers of the real engine: started once for a file of tests, and ended with it.

The environment variable VLLM_PYTHON names the Python of an environment that has vLLM.
"""

import os
import signal
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_SERVER_DEV_MODE": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = ("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager")
SAMPLES = ("--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8")
READY = "Application startup complete"
WORDS = 28  # of the tokenizer; the model has more rows, as published models do


@contextmanager
def serve(model: Path, *options: str) -> Iterator[str]:
    """Serve a model until the end of the block, and yield the URL of the server."""
    python = os.environ.get("VLLM_PYTHON") or pytest.fail("VLLM_PYTHON: names no Python that has vLLM")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", port]
    process = subprocess.Popen(
        [*command, *OPTIONS, *options],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines, is_ready = deque[str](maxlen=400), threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)
            if READY in line:
                is_ready.set()
        is_ready.set()  # it has ended

    threading.Thread(target=read, daemon=True).start()
    try:
        is_ready.wait(600)
        assert any(READY in line for line in lines), "".join(line for line in lines if "Error" in line)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # so that it leaves no shared memory behind
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def new_llama(tokenizer, **options):
    """Return a random Llama with heads of 32 for a tokenizer: vLLM serves its adapters, but none of GPT-2."""
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, **size, **ids} | options
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**options))


@pytest.fixture(scope="session")
def word_policy(tmp_path_factory) -> Path:
    """A random Llama with heads of 32, whose vocabulary has four rows more than its tokenizer has words."""
    words = ["<pad>", "<eos>", "<bos>", *(f"w{number}" for number in range(3, WORDS))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    folder = tmp_path_factory.mktemp("words")
    new_llama(tokenizer, vocab_size=WORDS + 4, initializer_range=0.15).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sampling_server(word_policy) -> Iterator[str]:
    """The URL of a server that samples from `word_policy`, and takes adapters and new weights."""
    with serve(word_policy, *SAMPLES) as url:
        yield url
