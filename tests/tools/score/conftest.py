"""A reward artifact, and small chunks in a folder of the test's own."""

from pathlib import Path

import pytest

from pipeline import config
from pipeline.reward import stage as reward
from pipeline.tools.score import chunks


@pytest.fixture(scope="session")
def model(tiny_records: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward artifact."""
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    paths = {
        "runs": str(tmp_path_factory.mktemp("runs")),
        "model": str(tiny_llama),
        "records": str(tiny_records),
    }
    return reward.run(config.RewardStage(run="t", max_length=96, training=steps, **paths))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 2)
    monkeypatch.chdir(tmp_path)
