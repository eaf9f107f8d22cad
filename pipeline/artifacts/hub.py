"""Hub ids, the commit that each one resolves to, and single files of a hub repository.

A result made from a branch is made from one commit of it, and the manifest records which.
"""

import re
from contextlib import suppress
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(source: str) -> bool:
    """Return whether `source` is a hub id, `name` or `org/name`.

    It is a path instead if it exists here, or if `org` is a local folder or `runs`.
    """
    parent = source.rpartition("/")[0]
    local = Path(source).exists() or parent == "runs" or (parent and Path(parent).is_dir())
    return not local and HUB_ID.fullmatch(source) is not None


def resolve_commit(hub_id: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """Return the commit of a branch or tag: the one already downloaded, else the hub's current one.

    Without `revision` it is that of the main branch. If the hub cannot be queried (no network, no such
    repository), `revision` itself is returned, and the load that follows reports the problem.
    """
    from huggingface_hub import HfApi

    for local in (True, False):
        # `Exception`, because the HTTP library raises its own errors, whose classes change with its versions.
        with suppress(Exception):
            return (
                HfApi()
                .resolve_revision(hub_id, repo_type=repo_type, revision=revision, local_files_only=local)
                .resolved
            )
    return revision


def fetch_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """Return the path of a file in a folder, or of a file downloaded from a hub repository.

    None if the folder or repository has no such file, if there is no such repository (the load that follows
    reports it), or if the hub cannot be queried.
    """
    if Path(source).is_dir() or not is_hub_id(source):
        return Path(source) / name if (Path(source) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with suppress(EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return Path(hf_hub_download(source, name, revision=revision))
    return None
