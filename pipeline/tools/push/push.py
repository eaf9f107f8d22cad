"""A model artifact to the hub: the files that its manifest vouches for and a reader needs, with a card, in one commit."""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.artifacts import hub
from pipeline.artifacts.files import read_json
from pipeline.artifacts.inputs import require_artifact
from pipeline.artifacts.manifest import Artifact, read_manifest
from pipeline.errors import UserError
from pipeline.tools.push.policy_card import policy_card_text

# What stays: this machine's paths, people's prompts, and the policies on the way, each of which is pushed by its own folder.
NOT_PUSHED = {"config.yaml", "samples.jsonl"}

PICKLES = {".bin", ".pt", ".pth", ".pkl"}

SUBMODELS = ("best", "policies")

CARD_FOLDER = re.compile(r'^folder, prompt(?:, answer)? = ("(?:[^"\\]|\\.)*")', re.M)


def push_artifact(folder: Path, to: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload `folder`, an artifact of sft, reward or ppo, or a ppo's `best/`, to the repository `to`; returns the commit's URL.

    The repository, and the branch `revision`, are made where there are none. UserError, before anything is uploaded, where the artifact is
    none, half-written or altered, where nobody is logged in, or where what is there already would be loaded with it.
    """
    opened = _open_artifact(folder)
    files = list_contents(opened, folder)
    _check_base(files)
    files["README.md"] = render_card(opened, folder, files, to).encode()
    if not hub.HUB_ID.fullmatch(to) or "/" not in to:
        raise UserError(f"--to {to}: expected ORG/NAME")
    return _upload(files, to, private, revision, f"{opened.manifest['stage']} {opened.identity[:12]}")


def _open_artifact(folder: Path) -> Artifact:
    """The artifact that `folder` is, or is a part of."""
    root = next((place for place in (folder, *folder.parents[:2]) if read_manifest(place)), folder)
    manifest = read_manifest(root)
    if manifest.get("kind") not in ("policy", "reward"):
        found = f"is of kind {manifest['kind']!r}" if manifest else "holds nothing that a stage has published"
        raise UserError(
            f"{folder}: {found}; expected a model that sft, reward or ppo wrote, such as runs/demo/reward"
        )
    return require_artifact(root, manifest["kind"], "its stage again")


def list_contents(opened: Artifact, folder: Path) -> dict[str, Any]:
    """Path in the repository -> file. Raises `UserError` where `folder` holds no model."""
    part = folder.relative_to(opened.path)
    files = {}
    for name in map(Path, opened.manifest["files"]):
        if name.is_relative_to(part) and name.suffix not in PICKLES and name.name not in NOT_PUSHED:
            within = name.relative_to(part)
            if within.parts[0] not in SUBMODELS:
                files[within.as_posix()] = opened.path / name
    if not {"config.json", "adapter_config.json"} & files.keys():
        raise UserError(
            f"{folder}: holds no model that {opened.path}/manifest.json vouches for; expected the artifact, or its best/"
        )
    return files


def _check_base(files: dict[str, Any]) -> None:
    """An adapter is worth nothing to those who have not its base."""
    if "adapter_config.json" in files:
        base = read_json(files["adapter_config.json"])["base_model_name_or_path"]
        if not hub.is_hub_id(base):
            folder = files["adapter_config.json"].parent
            raise UserError(
                f"{folder}: is an adapter of {base}, a folder of this machine, which others have not; set merge: true"
            )


def render_card(opened: Artifact, folder: Path, files: dict[str, Any], to: str) -> str:
    """The model card, its code reading `to`: a reward's own, or one made here of what the manifest says of a policy."""
    if opened.manifest["kind"] == "policy":
        return policy_card_text(opened, folder, to, is_adapter="adapter_config.json" in files)
    text = files["README.md"].read_text(encoding="utf-8")
    found = CARD_FOLDER.search(text)
    return text.replace(found[1], json.dumps(to)) if found else text


def _upload(files: dict[str, Any], to: str, private: bool, revision: str | None, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UserError(f"{to}: nobody is logged in to the hub here; run: hf auth login, or set HF_TOKEN")
    api = HfApi()
    with _hub_errors(to):
        api.create_repo(to, private=private, exist_ok=True)
        is_private = api.repo_info(to).private
        if revision:
            api.create_branch(to, branch=revision, exist_ok=True)
        others = sorted(set(api.list_repo_files(to, revision=revision)) - files.keys() - {".gitattributes"})
    if private and not is_private:
        raise UserError(
            f"{to}: is there already, and public; name another, or make it private on the hub first"
        )
    if others:
        raise UserError(
            f"{to}: holds files that this model has not ({', '.join(others[:3])}); name another, or a --revision, or remove them"
        )
    with _hub_errors(to):
        operations = [CommitOperationAdd(name, source) for name, source in sorted(files.items())]
        return api.create_commit(to, operations, commit_message=message, revision=revision).commit_url


@contextmanager
def _hub_errors(to: str) -> Iterator[None]:
    """What the hub refuses is the user's to mend; that it cannot be reached is the machine's failure."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # the HTTP library's own errors among them, whose classes change with it
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        said = " ".join(str(getattr(error, "server_message", None) or error).split())
        if status == 401:
            raise UserError(
                f"{to}: the hub does not know this token; run: hf auth login, or set HF_TOKEN"
            ) from error
        if status is not None and status < 500:
            raise UserError(
                f"{to}: the hub refused: {said}; check the name, and that the token may write there"
            ) from error
        raise OSError(
            errno.EIO, f"the hub could not be reached, and nothing was pushed: {said}", to
        ) from error
