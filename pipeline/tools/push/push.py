"""`rlhf push`: upload a model artifact to the hub in one commit, with a model card.

Only files that the manifest lists and a reader of the model needs are uploaded, after each has been read
again. A repository that does not exist yet is private, unless `public` is asked for; the visibility of one
that exists is never changed. What names a folder of this machine stays here: an adapter of a local base, and
PEFT's own README.
"""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import is_own_base, require_artifact, verify_artifact
from pipeline.artifacts.manifest import Artifact, load_manifest
from pipeline.artifacts.schema import CRITIC, VALUE_HEAD
from pipeline.errors import UserError
from pipeline.tools.push.policy_card import policy_card_text

# They contain paths of this machine, or people's prompts.
NOT_PUSHED = {"config.yaml", "samples.jsonl", "rewards.json"}
PICKLES = {".bin", ".pt", ".pth", ".pkl"}
# Models inside the artifact, each pushed from its own folder: the intermediate policies, and the adapter that
# was merged, which names its base.
SUBMODELS = ("best", "policies", "adapter")
# The line of a card's code that names the model.
CARD_FOLDER = re.compile(r'^folder, prompt(?:, (?:answer|response))? = ("(?:[^"\\]|\\.)*")', re.M)


def push_artifact(
    folder: Path, to: str, *, private: bool = False, public: bool = False, revision: str | None = None
) -> str:
    """Upload the artifact in `folder` to the hub repository `to`, and return the URL of the commit.

    `folder` is an artifact of sft, reward or ppo, or a policy inside one of ppo (`best/`,
    `policies/step-N/`). The repository and the branch `revision` are created if they do not exist. A new
    repository is private unless `public` is set. With `private`, one that exists must be private too.

    Raises `UserError` before anything is uploaded, if `folder` is no such artifact or is half-written or
    altered, if no one is logged in, or if the repository contains files that would be loaded with the
    model.
    """
    opened = _open_artifact(folder)
    files = list_contents(opened, folder)
    _check_base(opened, files)
    files["README.md"] = render_card(opened, folder, files, to).encode()
    if not hub.HUB_ID.fullmatch(to) or "/" not in to:
        raise UserError(f"--to {to}: expected ORG/NAME")
    return _upload(files, to, private, public, revision, f"{opened.manifest['stage']} {opened.identity[:12]}")


def _open_artifact(folder: Path) -> Artifact:
    """Open the artifact that `folder` is, or is inside of."""
    manifests = {path: load_manifest(path) for path in (folder, *folder.parents[:2])}
    root = next((path for path, seen in manifests.items() if any(seen)), folder)
    manifest, fault = manifests[root]
    if fault:
        raise UserError(f"{root}: {fault}; run its stage again")
    if manifest.get("kind") not in ("policy", "reward"):
        problem = f"is of kind {manifest['kind']!r}" if manifest else "is not the artifact of any stage"
        raise UserError(
            f"{folder}: {problem}; expected a model that sft, reward or ppo wrote, such as runs/demo/reward"
        )
    opened = require_artifact(root, manifest["kind"], "its stage again")
    verify_artifact(opened)
    return opened


def list_contents(opened: Artifact, folder: Path) -> dict[str, Any]:
    """Return path in the repository -> file. Raises `UserError` if `folder` contains no model."""
    subfolder = folder.relative_to(opened.path)
    files = {}
    for name in map(Path, opened.manifest["files"]):
        if name.is_relative_to(subfolder) and name.suffix not in PICKLES and name.name not in NOT_PUSHED:
            target = name.relative_to(subfolder)
            if target.parts[0] not in SUBMODELS and not _is_private_critic(target):
                files[target.as_posix()] = opened.path / name
    if not {"config.json", "adapter_config.json"} & files.keys():
        raise UserError(
            f"{folder}: contains no model that {opened.path}/manifest.json lists; "
            "expected the artifact, or its best/"
        )
    return files


def _is_private_critic(file: Path) -> bool:
    """Return whether a file is of the critic and not its value head.

    critic.json names the folder that it started from, and the config of its adapter the base.
    """
    return file.parts[0] == CRITIC and file.name != VALUE_HEAD


def _check_base(opened: Artifact, files: dict[str, Any]) -> None:
    """Check that others can load the base of an adapter. Raises `UserError`."""
    if "adapter_config.json" not in files:
        return
    folder = files["adapter_config.json"].parent
    base = read_json(files["adapter_config.json"]).get("base_model_name_or_path")
    # A relative folder looks like a hub id from elsewhere; the manifest knows what it was.
    local = [item["path"] for item in opened.manifest["inputs"].values() if "hub" not in item]
    if (
        not isinstance(base, str)
        or not hub.is_hub_id(base)
        or any(is_own_base(folder, path) for path in local)
    ):
        raise UserError(
            f"{folder}: is an adapter of {base}, a local path that others do not have; "
            "set merge: true and run its stage again"
        )


def render_card(opened: Artifact, folder: Path, files: dict[str, Any], to: str) -> str:
    """Return the model card, whose code loads `to`: a reward model's own, or a policy's, written here.

    Raises `UserError` for a folder inside a reward model.
    """
    if opened.manifest["kind"] == "policy":
        return policy_card_text(opened, folder, to, is_adapter="adapter_config.json" in files)
    if folder != opened.path:  # PEFT's README
        raise UserError(f"{folder}: has no model card of its own; push {opened.path}")
    text = files["README.md"].read_text(encoding="utf-8")
    match = CARD_FOLDER.search(text)
    return text.replace(match[1], json.dumps(to)) if match else text


def _upload(
    files: dict[str, Any], to: str, private: bool, public: bool, revision: str | None, message: str
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UserError(f"{to}: no one is logged in to the hub; run: hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _hub_errors(to):
        api.create_repo(to, private=not public, exist_ok=True)
        is_private = api.repo_info(to).private
        if revision:
            api.create_branch(to, branch=revision, exist_ok=True)
        others = sorted(set(api.list_repo_files(to, revision=revision)) - files.keys() - {".gitattributes"})

    if private and not is_private:
        raise UserError(
            f"{to}: exists already and is public; name another, or make it private on the hub first"
        )
    if others:
        raise UserError(
            f"{to}: contains files that this model does not have ({', '.join(others[:3])}); "
            "name another, or a --revision, or remove them"
        )
    with _hub_errors(to):
        operations = [CommitOperationAdd(name, source) for name, source in sorted(files.items())]
        return api.create_commit(to, operations, commit_message=message, revision=revision).commit_url


@contextmanager
def _hub_errors(to: str) -> Iterator[None]:
    """Raise `UserError` if the hub refuses, which the user can fix, and `OSError` if it cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # also the errors of the HTTP library, whose classes change with its version
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = " ".join(str(getattr(error, "server_message", None) or error).split())
        if status == 401:
            raise UserError(
                f"{to}: the hub does not know this token; run: hf auth login, or set HF_TOKEN"
            ) from error
        if status is not None and status < 500:
            raise UserError(
                f"{to}: the hub refused: {reason}; check the name, and that the token may write there"
            ) from error
        raise OSError(
            errno.EIO, f"the hub could not be reached, and nothing was pushed: {reason}", to
        ) from error
