"""The output embeddings of a model that shares them with its input, in a file of their own.

A checkpoint leaves such output embeddings out. vLLM 0.32 then keeps the old ones when it reloads weights on a
CPU, where they were packed as it started. It loads them too if the checkpoint has them.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from pipeline.errors import UserError, one_line

FILE = "output-embeddings.safetensors"


@contextmanager
def folder_for_servers(folder: Path, parent: Path) -> Iterator[Path]:
    """Yield a folder that servers load a published model from: it is this one, or has links to its files.

    Links are for a model that shares its embeddings; their folder is in `parent`, and removed at the end.
    Raises `UserError` if `parent` cannot be written.
    """
    if _shared_names(folder) is None:
        yield folder
        return
    try:
        links = tempfile.TemporaryDirectory(dir=parent, prefix=".for-servers-")
    except OSError as error:
        raise UserError(
            f"{parent}: {one_line(error)}; set rollouts.folder to one that can be written"
        ) from None
    with links as name:
        Path(name).chmod(0o755)  # a server may be another user
        for path in folder.iterdir():
            (Path(name) / path.name).symlink_to(path)
        add_output_embeddings(Path(name))
        yield Path(name)


def add_output_embeddings(folder: Path) -> None:
    """Write the output embeddings of a model in a folder into a file there, if its files leave them out."""
    names = _shared_names(folder)
    tensor = _find_tensor(folder, *names) if names else None
    if names is None or tensor is None:
        return
    save_file({names[1]: tensor}, folder / FILE, metadata={"format": "pt"})
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"][names[1]] = FILE
        index.unlink()  # it may be a link
        index.write_text(json.dumps(content), encoding="utf-8")


def _shared_names(folder: Path) -> tuple[str, str] | None:
    """Return the keys of the input and output embeddings, or None if they are not shared.

    A model whose code comes with it is not opened for this. A server tells if a folder has no model.
    """
    if not (folder / CONFIG_NAME).is_file():
        return None
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not config.get_text_config().tie_word_embeddings or hasattr(config, "auto_map"):
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {module: name for name, module in model.named_modules()}
    return (f"{names[ends[0]]}.weight", f"{names[ends[1]]}.weight") if all(ends) else None


def _find_tensor(folder: Path, inputs: str, outputs: str) -> Tensor | None:
    """Return the input embeddings, or None if the files have no such key, or have the output embeddings."""
    embeddings = None
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            if outputs in keys:
                return None
            if inputs in keys:
                embeddings = file.get_tensor(inputs)
    return embeddings
