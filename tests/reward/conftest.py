"""Fixtures of the tests of served reward models."""

import threading
import time

import pytest

from pipeline.reward.encoding import Encoding
from tests.reward.stand_in import StandIn, reward_folder


@pytest.fixture
def serve(monkeypatch):
    """Starts stand-ins; `slept` is how long a client would have waited between its tries."""
    running, slept, now = [], [], time.monotonic
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(slept))

    def start(*given, **options):
        running.append(StandIn(*given, **options))
        running[-1].slept = slept
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield start
    for each in running:
        each.over.set()
        each.shutdown()
        each.server_close()


@pytest.fixture
def decoder(tiny_gpt2, tmp_path):
    known = {
        "alpha": 0.5,
        "sign": -1,
        "reward_mean": 1.0,
        "reward_std": 2.0,
        "length_mean": 3.0,
        "length_slope": 0.1,
    }
    return reward_folder(tiny_gpt2, tmp_path / "decoder", encoding=Encoding(max_length=60), **known)
