"""Hub ids, and the commit that one stands for: what is made from a branch is made from one commit of it, and says which."""

import re
from contextlib import suppress
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(source: str) -> bool:
    """`name` or `org/name`; where `org` is a folder here, or `runs`, a path was meant."""
    parent = source.rpartition("/")[0]
    local = Path(source).exists() or parent == "runs" or (parent and Path(parent).is_dir())
    return not local and HUB_ID.fullmatch(source) is not None


def resolve_commit(hub_id: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """The commit of a branch or tag (main unless named): the one already fetched, else what the hub says.

    Where the hub cannot say (no network, no such repository) it is `revision` itself; the load that follows tells what is wrong.
    """
    from huggingface_hub import HfApi

    for fetched in (True, False):
        with suppress(Exception):  # the HTTP library's own errors among them, whose classes change with it
            return (
                HfApi()
                .resolve_revision(hub_id, repo_type=repo_type, revision=revision, local_files_only=fetched)
                .resolved
            )
    return revision


def fetch_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder, or of a hub repository, fetched; None where it has none, where there is no such repository (which the load that
    follows tells), or where the hub cannot be asked."""
    if not is_hub_id(source):
        return Path(source) / name if (Path(source) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with suppress(EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return Path(hf_hub_download(source, name, revision=revision))
    return None
