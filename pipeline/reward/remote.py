"""A reward model that an inference server runs: `source: http://host:8000`.

The server computes the logits; everything else is `RewardModel`'s, and no weights are loaded here. `reads` is
the folder or hub id of the served model. Its tokenizer, config and `reward.json` define how a row is encoded
and what its logits mean. Without `reads`, they are those of the model that the server reports, if that is a
folder here or a hub id.

- vLLM receives the same ids that `RewardModel` computes, and serves stepwise models too. It accepts no token
  types, so it is refused for pairs of a model that uses them.
- Text-embeddings-inference (TEI) receives text, or a pair of texts, which its tokenizer encodes into the same
  ids. A chat has no such text and is refused. A row that was cut, or that spells a special token, may differ
  by a token or two, which is logged.

The wire formats are in `pipeline.reward.inference_servers`.
"""

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig

from pipeline.artifacts import hub
from pipeline.artifacts.files import hash_value
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.config import Reward
from pipeline.data.schema import Text
from pipeline.engines.requests import FAIL_FAST
from pipeline.errors import UserError
from pipeline.models.adapters import is_adapter
from pipeline.models.chat import completion_text, read_markup, split_response
from pipeline.models.load_errors import explain_load_errors
from pipeline.reward import inference_servers
from pipeline.reward.encoding import Encoded, concatenated_text, prompt_text
from pipeline.reward.model import RewardModel
from pipeline.reward.settings import RewardSettings

logger = logging.getLogger(__name__)


class RemoteRewardModel(RewardModel):
    """A `RewardModel` whose logits a server computes; its own `model` has shapes but no weights."""

    server: inference_servers.Server
    timeout: float  # seconds
    _warned_of_difference = False

    def __init__(self, model: Any, tokenizer: Any, settings: Any):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def check_server(self) -> None:
        """Request the score of one row. Raises `UserError` if the server does not send it."""
        row = self._row("Hello.", "Hello.", self.encode("Hello.", "Hello."))
        self._request([row], tries=FAIL_FAST)

    def _compute(
        self, prompts: Sequence[Text], responses: Sequence[Text], encoded: Sequence[Encoded], batch_size: int
    ) -> torch.Tensor:
        rows = list(map(self._row, prompts, responses, encoded))
        size = min(batch_size, self.server.rows or batch_size)
        batches = [self._request(rows[start : start + size]) for start in range(0, len(rows), size)]
        logits = torch.tensor([row for batch in batches for row in batch])
        if not self.settings.is_stepwise:
            return logits
        starts = accumulate((len(row.ids) for row in encoded), initial=0)
        wanted = [start + p for start, row in zip(starts, encoded, strict=False) for p in row.positions]
        return logits[torch.tensor(wanted, dtype=torch.long)]

    def _request(self, rows: Sequence[Any], **options: Any) -> list[list[float]]:
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        options["per_token"] = self.settings.is_stepwise
        return inference_servers.request_logits(self.server, rows, labels, self.timeout, **options)

    def _row(self, prompt: Text, response: Text, encoded: Encoded) -> list[int] | list[str]:
        return encoded.ids if self.server.engine == "vllm" else self._texts(prompt, response, encoded)

    def _texts(self, prompt: Text, response: Text, encoded: Encoded) -> list[str]:
        """Return the texts that TEI's own tokenizer turns into the ids."""
        encoding, tokenizer = self.settings.encoding, self.tokenizer
        prompt, response = split_response(prompt, response)
        texts = (
            [prompt_text(prompt, encoding.separator), completion_text(response)]
            if encoding.form == "pair"
            else [concatenated_text(encoding, prompt, response)]
        )
        if encoded.overlong:
            parts = (encoded.ids[: encoded.response_start], encoded.ids[encoded.response_start :])
            texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts][: len(texts)]
        texts[-1] += tokenizer.eos_token if encoding.eos else ""
        spelled = read_markup(tokenizer).pattern
        if encoded.overlong or any(map(spelled.search, (completion_text(response), str(prompt)))):
            self._warn_of_difference(texts, encoded.ids)
        return texts

    def _warn_of_difference(self, texts: list[str], ids: list[int]) -> None:
        """Log once that the texts of a row have other ids: it was truncated, or spells a special token."""
        if self._warned_of_difference or self.tokenizer(*texts, verbose=False)["input_ids"] == ids:
            return
        self._warned_of_difference = True
        logger.warning(
            "%s: TEI encodes rows that were cut at max_length=%d, or that spell a special token, differently",
            self.server.url,
            self.settings.encoding.max_length,
        )


def require_remote(reward: Reward, make_command: str, trust_remote_code: bool = False) -> Artifact:
    """Open a served model as an input: the artifact of the served model, with `served` in its manifest.

    The server is asked for its model and for one score. Whether it has the weights that it reports is not
    checked.

    The identity combines that of the artifact with the engine, and the model's name and revision as the
    server reports them. It excludes the URL: the same model on another host is the same input. The URL is
    still a setting, so an interrupted run resumes only with the URL that it started with.

    Raises `UserError` if the artifact is missing, or the server does not respond or does not fit it.
    """
    server = inference_servers.probe(reward.source.rstrip("/"), reward.timeout)
    path = reward.reads or server.path
    if not reward.reads and not Path(path).exists() and not hub.is_hub_id(path):
        raise UserError(
            f"{server.url}: serves {path}, which is not a folder here; "
            "name the folder or hub id of the served model: reads=…"
        )
    opened = require_artifact(path, "reward", make_command, server.revision)
    identity = hash_value([opened.identity, server.engine, server.model, server.revision])
    artifact = Artifact(
        opened.path,
        opened.manifest | {"served": server._asdict(), "reads": opened.identity, "identity": identity},
    )
    load_remote(reward, artifact, trust_remote_code=trust_remote_code).check_server()
    return artifact


def load_remote(reward: Reward, opened: Artifact, **options: Any) -> RemoteRewardModel:
    """Load the model that `require_remote` opened, without a request to the server.

    Raises `UserError` if the server's engine does not support the model's input.
    """
    server = inference_servers.Server(**opened.manifest["served"])
    source, revision = str(opened.path), opened.revision
    if is_adapter(source, revision):
        raise UserError(
            f"{source}: is an adapter alone, which {server.engine} does not serve as a classifier; "
            "name a whole model"
        )

    code = {"trust_remote_code": options.get("trust_remote_code", False)}
    settings = RewardSettings.find(source, revision) or RewardSettings()
    with explain_load_errors(source, "classifier"), init_empty_weights():
        config = AutoConfig.from_pretrained(source, revision=revision, **code)
        empty = settings.auto_class.from_config(config, **code)
    model: Any = RemoteRewardModel.load(
        source, model=empty, revision=revision, positive_label=reward.positive_label, **options
    )
    model.server, model.timeout, empty.name_or_path = server, reward.timeout, source

    if unsupported := _unsupported_input(server.engine, model):
        raise UserError(f"{server.url}: {source} reads {unsupported}")
    max_length = model.settings.encoding.max_length
    if 0 < server.tokens < max_length:
        raise UserError(
            f"{server.url}: accepts {server.tokens} tokens, but {source} reads up to {max_length}; "
            "serve it with as many"
        )
    return model


def _unsupported_input(engine: str, model: RewardModel) -> str | None:
    """Return the input of a model that an engine does not support, or None."""
    form = model.settings.encoding.form
    if model.settings.is_stepwise and engine != "vllm":
        return "steps, but text-embeddings-inference serves no token classifier; serve it with vLLM"
    has_types = getattr(model.model.config, "type_vocab_size", 0) > 1
    uses_types = "token_type_ids" in model.tokenizer.model_input_names
    if engine == "vllm":
        if form != "concatenation" and has_types and uses_types:
            return "token types, which vLLM does not accept; serve it with text-embeddings-inference"
        return None
    if form == "chat":
        return "a chat as token ids, but text-embeddings-inference accepts only text; serve it with vLLM"
    if form == "pair" and has_types and not uses_types:
        return "pairs without token types, but text-embeddings-inference adds them; serve it with vLLM"
    return None
