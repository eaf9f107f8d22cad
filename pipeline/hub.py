"""Hub ids, and the commit that one stands for: what is made from a branch is made from one commit of it, and says which."""

import re
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(source: str) -> bool:
    """`name` or `org/name`; where `org` is a folder here, or `runs`, a path was meant."""
    parent = source.rpartition("/")[0]
    local = Path(source).exists() or parent == "runs" or (parent and Path(parent).is_dir())
    return not local and HUB_ID.fullmatch(source) is not None


def commit(hub_id: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The commit of a branch or tag (main unless named): the one already fetched, else what the hub says.

    Where the hub cannot say (no network, no such repository) it is `revision` itself; the load that follows tells what is wrong.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    fetched = Path(constants.HF_HUB_CACHE, f"{repo_type}s--{hub_id.replace('/', '--')}", "refs", revision or "main")
    if fetched.is_file():
        return fetched.read_text(encoding="utf-8").strip()
    try:
        return HfApi().repo_info(hub_id, revision=revision, repo_type=repo_type).sha
    except Exception:  # the HTTP library's own errors among them, whose classes change with it
        return revision
