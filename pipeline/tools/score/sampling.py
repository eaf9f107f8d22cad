"""Sample n responses to each prompt of a job, here or by a server: shared by `best-of-n` and `generate`.

torch is imported only when a policy is opened.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact
from pipeline.data.readers import ParsedRecord
from pipeline.errors import UserError
from pipeline.tools.score.encoders import Columns
from pipeline.tools.score.job import ScoringJob, check_rows

MAKE_COMMAND = "rlhf run --until"
POLICY_TIMEOUT = 600  # seconds that a request to --policy-url may take, with all its tries

# From items to the batches of their responses: `n` for each item, one after the other.
Sampler = Callable[[Sequence[ParsedRecord]], list[Any]]


def require_policy(source: str) -> Artifact:
    """Return the policy of that folder or hub id. Raises `UserError` if it is none."""
    return require_artifact(source, "policy", f"{MAKE_COMMAND} sft")


def open_sampler(
    job: ScoringJob,
    policy: Artifact,
    n: int,
    *,
    max_prompt_tokens: int,
    batch_size: int,
    overlong: str,
    policy_url: str | None = None,
    check_prompt: Callable[[Any], Any] = lambda prompt: None,
    **sampling: Any,
) -> tuple[Sampler, dict[str, Any]]:
    """Return a sampler of `n` responses to each item of the job, and the settings that decide them.

    Rows whose prompt `check_prompt` or the chat template refuses get a fault. `sampling` is seed, temperature
    and response_tokens. The random numbers of a response derive from its row and its number among the n. A
    policy with few positions reads a shorter prompt, so that the response fits. `overlong` is what happens to
    longer prompts. With `policy_url` the server there samples, with its own random numbers. Raises
    `UserError`.
    """
    from pipeline.models.chat import prompt_ids
    from pipeline.models.generation import sample_responses
    from pipeline.models.prompts import truncation_side

    model, tokenizer, positions, sampler = _open_policy(policy, policy_url)
    prompt_tokens = min(max_prompt_tokens, positions - sampling["response_tokens"])
    if prompt_tokens < 1:
        raise UserError(
            f"{policy.path}: its {positions} positions leave no room for a prompt; lower --response-tokens"
        )
    options = {"max_prompt_tokens": prompt_tokens, "batch_size": batch_size, "sampler": sampler, **sampling}
    options |= {"side": truncation_side(overlong)}

    def is_overlong(record: Columns) -> bool:
        check_prompt(record["prompt"])
        return len(prompt_ids(tokenizer, record["prompt"])) > prompt_tokens

    check_rows(job, is_overlong, f"{prompt_tokens} prompt tokens", overlong)

    def sample(items: Sequence[ParsedRecord]) -> list[Any]:
        prompts = [item.record["prompt"] for item in items for _ in range(n)]
        rows = [item.record["number"] * n + k for item in items for k in range(n)]
        return list(sample_responses(model, tokenizer, prompts, rows, **options))

    settings = {"policy": policy.identity, "n": n, "room": prompt_tokens, "overlong": overlong}
    return sample, settings | sampling | ({"engine": "vllm"} if policy_url else {})


def _open_policy(opened: Artifact, url: str | None) -> tuple[Any, Any, float, Any]:
    """Return the policy, its tokenizer, the tokens of its longest row, and the sampler of its server.

    Without a `url` the sampler is None, and the policy is loaded; with one, only its outline is.
    """
    from pipeline.models.loading import load_sampler, load_tokenizer
    from pipeline.models.positions import max_positions

    source = str(opened.path)
    if url is None:
        model, tokenizer = load_sampler(source, revision=opened.revision)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
        return model, tokenizer, max_positions(model) or context, None
    from pipeline.engines.outline import read_outline
    from pipeline.engines.sampler import open_served_policy

    sampler = open_served_policy(url, source, POLICY_TIMEOUT)
    tokenizer = load_tokenizer(source, revision=opened.revision)
    positions = sampler.servers[0].tokens or math.inf
    return read_outline(source, opened.revision), tokenizer, positions, sampler
