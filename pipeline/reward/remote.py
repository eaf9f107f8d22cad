"""A reward model that an engine serves: `source: http://host:8000`. The engine computes the logits, all else is `RewardModel`'s.

`reads` is the folder or hub id of what is served. Its tokenizer, config and `reward.json` say how a row is read and what its logits are
worth; without it they are those of the model that the server says it serves, where that is a folder here or a hub id. No weights load.

vLLM is given the very ids that `RewardModel` reads; token types it cannot be told, so that it is refused for pairs of a model that reads
them. Text-embeddings-inference (TEI) is given text, or a pair of texts, that its tokenizer turns into the same ids; a chat has none, and
is refused; where a row is cut it may read a token or two otherwise, which is logged. `pipeline.reward.inference_servers` knows what goes over the
wire.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForSequenceClassification

from pipeline.artifacts import hub
from pipeline.artifacts.files import hash_value
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.config import Reward
from pipeline.data.schema import Text
from pipeline.errors import UserError
from pipeline.models.chat import completion_text
from pipeline.models.loading import explain_load_errors, is_adapter
from pipeline.reward import inference_servers
from pipeline.reward.encoding import concatenated_text, encode_response, prompt_text
from pipeline.reward.model import RewardModel

logger = logging.getLogger(__name__)


class RemoteRewardModel(RewardModel):
    """Scores answers as `RewardModel` does, with the logits of a server; of its own `model` only the shapes are there."""

    server: inference_servers.Server
    timeout: float
    _told = False

    def __init__(self, model: Any, tokenizer: Any, settings: Any):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def _logits(self, prompts: Sequence[Text], responses: Sequence[Text], batch_size: int) -> torch.Tensor:
        read = self._ids if self.server.engine == "vllm" else self._texts
        rows = [read(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        size = min(batch_size, self.server.rows or batch_size)
        return torch.tensor(
            [row for start in range(0, len(rows), size) for row in self._ask(rows[start : start + size])]
        )

    def _ask(self, rows: Sequence[Any], **options: Any) -> list[list[float]]:
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        return inference_servers.request_logits(self.server, rows, labels, self.timeout, **options)

    def _ids(self, prompt: Text, response: Text) -> list[int]:
        return encode_response(self.tokenizer, self.settings.encoding, prompt, response).ids

    def _texts(self, prompt: Text, response: Text) -> list[str]:
        """What TEI's own tokenizer turns into the ids."""
        how, tokenizer = self.settings.encoding, self.tokenizer
        found = encode_response(tokenizer, how, prompt, response)
        texts = (
            [prompt_text(prompt, how.separator), completion_text(response)]
            if how.form == "pair"
            else [concatenated_text(how, prompt, response)]
        )
        if found.overlong:
            parts = (found.ids[: found.answer], found.ids[found.answer :])
            texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts][: len(texts)]
        texts[-1] += tokenizer.eos_token if how.eos else ""
        if found.overlong and not self._told and tokenizer(*texts, verbose=False)["input_ids"] != found.ids:
            self._told = True
            logger.warning(
                "%s: where a row over max_length=%d is cut, TEI reads it a little otherwise",
                self.server.url,
                how.max_length,
            )
        return texts


def require_remote(reward: Reward, fix: str, trust_remote_code: bool = False) -> Artifact:
    """What is served, as an input: the artifact that is read, `served` in its manifest. The server is asked who it is and for one score.

    Its identity is that of what is read, with the engine, and the model's name and revision as the server tells them: not the URL, since
    where it runs is not what it is. (The URL is a setting still: an interrupted run goes on only with the one it was begun with.) That a
    server has the weights it says it has is not checked. Raises `UserError`.
    """
    server = inference_servers.probe(reward.source.rstrip("/"), reward.timeout)
    path = reward.reads or server.path
    if not reward.reads and not Path(path).exists() and not hub.is_hub_id(path):
        raise UserError(
            f"{server.url}: serves {path}, which is no folder here; name the folder or hub id of what it serves: reads=…"
        )
    opened = require_artifact(path, "reward", fix, server.revision)
    identity = hash_value([opened.identity, server.engine, server.model, server.revision])
    found = Artifact(
        opened.path,
        opened.manifest | {"served": server._asdict(), "reads": opened.identity, "identity": identity},
    )
    model = load_remote(reward, found, trust_remote_code=trust_remote_code)
    model._ask(
        [model._ids("Hello.", "Hello.") if server.engine == "vllm" else model._texts("Hello.", "Hello.")],
        retries=inference_servers.FAIL_FAST,
    )
    return found


def load_remote(reward: Reward, opened: Artifact, **options: Any) -> RemoteRewardModel:
    """The model of what `require` opened; nobody is asked. Raises `UserError` where this engine cannot be given what it reads."""
    server, source, revision = (
        inference_servers.Server(**opened.manifest["served"]),
        str(opened.path),
        opened.revision,
    )
    if is_adapter(source, revision):
        raise UserError(
            f"{source}: is an adapter alone, which {server.engine} does not serve as a classifier; name a whole model"
        )
    code = {"trust_remote_code": options.get("trust_remote_code", False)}
    with explain_load_errors(source, "sequence classifier"), init_empty_weights():
        config = AutoConfig.from_pretrained(source, revision=revision, **code)
        shape = AutoModelForSequenceClassification.from_config(config, **code)
    found: Any = RemoteRewardModel.load(
        source, model=shape, revision=revision, positive_label=reward.positive_label, **options
    )
    found.server, found.timeout, shape.name_or_path = server, reward.timeout, source
    if unfit := _unsupported_input(server.engine, found):
        raise UserError(f"{server.url}: {source} reads {unfit}")
    how = found.settings.encoding
    if 0 < server.tokens < how.max_length:
        raise UserError(
            f"{server.url}: takes {server.tokens} tokens, but {source} reads up to {how.max_length}; serve it with as many"
        )
    return found


def _unsupported_input(engine: str, model: RewardModel) -> str | None:
    """What a model reads that an engine cannot be given."""
    form, typed = model.settings.encoding.form, getattr(model.model.config, "type_vocab_size", 0) > 1
    types = "token_type_ids" in model.tokenizer.model_input_names
    if engine == "vllm":
        told = form != "concatenation" and typed and types
        return (
            "token types, which vLLM cannot be told; serve it with text-embeddings-inference"
            if told
            else None
        )
    if form == "chat":
        return (
            "a chat, which is made of ids, and text-embeddings-inference takes text alone; serve it with vLLM"
        )
    without = form == "pair" and typed and not types
    return (
        "pairs without token types, which text-embeddings-inference gives it; serve it with vLLM"
        if without
        else None
    )
