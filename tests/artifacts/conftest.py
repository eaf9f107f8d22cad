"""Fixtures of the tests of artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifacts.making import (
    Config,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(runs=str(tmp_path / "runs"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and a working folder without a local model in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"
