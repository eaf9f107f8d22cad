"""Checks of the servers that sample PPO's rollouts: they answer, serve this base, and accept new weights."""

from pipeline.config import PPOStage
from pipeline.errors import UserError
from pipeline.ppo.engines import base_problem, require_server, served_base, start_command, sync_method


def describe_servers(config: PPOStage) -> str:
    """Return the command that starts the servers of `rollouts:` right."""
    return f"weights by {sync_method(config)}; start a server with: {start_command(config)}"


def check_engine(config: PPOStage, url: str, longest: int) -> str:
    """Return what the server at `url` serves.

    `longest` is the tokens of the longest prompt and a response. Raises `UserError` if the server does not
    answer as the run needs it, serves another base, or cuts a row of so many tokens.
    """
    server = require_server(config, url)
    if problem := base_problem(server, served_base(config)):
        raise UserError(f"{url}: {problem}; start it with: {start_command(config)}")
    if 0 < server.tokens < longest:
        raise UserError(
            f"{url}: accepts {server.tokens} tokens, but a prompt and response have up to {longest}; "
            f"start it with --max-model-len {longest}"
        )
    accepts = "LoRA adapters" if sync_method(config) == "adapter" else "new weights"
    return f"{url}: serves {server.path}, rows of up to {server.tokens} tokens, and accepts {accepts}"
