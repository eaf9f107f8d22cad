"""A hub id stands for one commit: the one fetched, else the one the hub names."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.artifacts import hub

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list:
    """What a hub that knows of one commit was asked."""
    questions: list = []

    def repo_info(_, **question):
        questions.append({name: question[name] for name in ("repo_id", "revision", "repo_type")})
        return SimpleNamespace(sha=SHA)

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return questions


def test_the_hub_is_asked_for_a_commit_not_yet_fetched(asked):
    assert hub.resolve_commit("org/name") == SHA
    assert hub.resolve_commit("org/name", "v1", "dataset") == SHA
    assert [hub.resolve_commit("org/name"), hub.resolve_commit("org/name", "v1", "dataset")] == [
        SHA,
        SHA,
    ]  # once each
    assert asked == [
        {"repo_id": "org/name", "revision": None, "repo_type": "model"},
        {"repo_id": "org/name", "revision": "v1", "repo_type": "dataset"},
    ]


@pytest.mark.parametrize(("revision", "repo_type"), [(None, "model"), ("v1", "model"), (None, "dataset")])
def test_what_was_fetched_stays(asked, tmp_path, revision, repo_type):
    refs = tmp_path / f"{repo_type}s--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / (revision or "main")).write_text("c0ffee\n")
    assert hub.resolve_commit("org/name", revision, repo_type) == "c0ffee"
    assert asked == []


def test_a_commit_is_itself(asked):
    assert hub.resolve_commit("org/name", SHA) == SHA
    assert asked == []


def test_without_a_hub_the_revision_is_as_given(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert [hub.resolve_commit("org/name", revision) for revision in (None, "v1")] == [
        None,
        "v1",
    ]  # the tests run offline


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert [
        hub.is_hub_id(name) for name in ("gpt2", "gpt2/x", "org/name", "distilgpt2", "runs/x", "a/b/c")
    ] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_file_is_found_in_a_folder_or_fetched_or_absent(tmp_path, monkeypatch):
    from httpx2 import Request, Response
    from huggingface_hub.errors import RepositoryNotFoundError

    (tmp_path / "reward.json").touch()
    assert hub.fetch_file(str(tmp_path), "reward.json") == tmp_path / "reward.json"
    assert hub.fetch_file(str(tmp_path), "none.json") is None
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda source, name, revision: f"/cache/{source}/{revision}/{name}"
    )
    assert hub.fetch_file("org/name", "reward.json", "v1") == Path("/cache/org/name/v1/reward.json")
    missing = RepositoryNotFoundError("none", response=Response(404, request=Request("GET", "https://hub")))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(missing))
    assert hub.fetch_file("org/name", "reward.json") is None
