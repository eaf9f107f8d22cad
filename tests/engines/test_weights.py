"""How new weights reach servers: in which order, by which folders, and what is left of them after a fault."""

import gc
import shutil
from functools import partial
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from pipeline import config
from pipeline.engines.embeddings import FILE
from pipeline.engines.policy_server import PolicyServer
from pipeline.engines.weights import WeightSync, reload_weights, unserved_setting
from pipeline.errors import UserError
from pipeline.ppo import engines
from tests.engines.stand_in import stand_in

RELOAD = ["/pause", "/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/resume"]


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "weights").write_text(folder.name)


class RecordedSync(WeightSync):
    """Brings nothing to a server, and remembers the folders that are there meanwhile."""

    def _reload(self, server, folder, version):
        assert (
            folder / "weights"
        ).read_text() == f"{folder.name}.partial"  # it was whole when it got its name
        self.there = sorted(path.name for path in self.folder.iterdir())


def test_at_most_two_steps_are_kept_and_none_at_the_end(tmp_path):
    (tmp_path / "w" / "of-an-interrupted-run").mkdir(parents=True)
    sync = RecordedSync([PolicyServer("http://h:1", "base", "/m")], "folder", tmp_path / "w", 1)
    folder = sync.folder
    for step, there in ((0, ["step-000000"]), (2, ["step-000000", "step-000002"])):
        sync.update(step, write)
        assert sync.there == there
        assert [path.name for path in folder.iterdir()] == [f"step-{step:06}"]
    assert list(folder.parent.iterdir()) == [folder]
    del sync
    gc.collect()
    assert not folder.parent.exists()


def test_a_step_that_was_not_brought_is_brought_by_the_next_call(tmp_path, word_policy):
    with stand_in(word_policy) as server:
        found = PolicyServer(server.url, "base", "/m")
        sync = WeightSync([found], "folder", tmp_path / "w", 5)
        server.faults = [None, None, (400, "no")]
        with pytest.raises(UserError, match="does not take /collective_rpc"):
            sync.update(0, partial(shutil.copytree, word_policy))
        server.asked.clear()
        sync.update(0, partial(shutil.copytree, word_policy))
        assert [path for path, _ in server.asked] == RELOAD


def test_a_policy_with_shared_embeddings_is_brought_with_both(tmp_path, tiny_gpt2):
    with stand_in(tiny_gpt2) as server:
        sync = WeightSync([PolicyServer(server.url, "base", "/m")], "folder", tmp_path / "w", 5)
        sync.update(0, partial(shutil.copytree, tiny_gpt2))
        (loaded,) = [body["kwargs"]["weights_path"] for path, body in server.asked if path == RELOAD[2]]
        assert load_file(Path(loaded) / FILE).keys() == {"lm_head.weight"}


@pytest.mark.parametrize("number", range(4))
def test_a_server_is_resumed_whatever_fails(number, tmp_path, word_policy):
    with stand_in(word_policy) as server:
        server.faults = [*[None] * number, (404, "gone")]
        with pytest.raises(UserError, match=rf"does not take {RELOAD[number]}.* returned 404, 'gone'"):
            reload_weights(PolicyServer(server.url, "base", "/m"), word_policy, "v", 5)
        assert [path for path, _ in server.asked] == [*RELOAD[: number + 1], "/resume"]


def test_a_lost_request_is_sent_again(word_policy):
    with stand_in(word_policy) as server:
        server.faults = [None, None, "drop"]
        reload_weights(PolicyServer(server.url, "base", "/m"), word_policy, "v", 5)
        assert [path for path, _ in server.asked] == [*RELOAD[:3], *RELOAD[2:]]
        assert server.version == "v"


@pytest.mark.parametrize(
    ("keys", "setting"),
    [
        ({}, ""),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 64}}, ""),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "all"}, "bias='all'"),
        ({"r": 1024}, "r=1024"),
        ({"rank_pattern": {"q_proj": 600}}, "r=600"),
    ],
)
def test_adapters_that_vllm_does_not_serve(keys, setting):
    assert unserved_setting(LoraConfig(**keys)) == setting


def stage(url, **keys):
    rollouts = {"url": url, "timeout": 5} | keys.pop("rollouts", {})
    return config.PPOStage(run="t", reward="pipeline.prepare.demo:gold_reward", rollouts=rollouts, **keys)


def test_an_unserved_adapter_is_refused_before_a_server_is_asked():
    with pytest.raises(UserError, match=r"^ppo: lora.use_dora=True: vLLM serves no such adapter; change it"):
        engines.require_servers(stage("http://127.0.0.1:1", lora={"use_dora": True}))


def test_a_shared_folder_keeps_what_others_have_in_it(tmp_path):
    shared = {"rollouts": {"folder": str(tmp_path)}}
    ours = engines.weights_folder(stage("http://h:1", **shared), Path("/a/run"))
    other = engines.weights_folder(stage("http://h:1", **shared), Path("/another/run"))
    assert ours.parent == other.parent == tmp_path
    assert ours != other
    assert engines.weights_folder(stage("http://h:1"), tmp_path) == tmp_path / "weights-for-servers"
    missing = {"rollouts": {"folder": str(tmp_path / "typo")}}
    with pytest.raises(UserError, match=r"^rollouts.folder: .*/typo is no folder; expected one that all"):
        engines.weights_folder(stage("http://h:1", **missing), Path("/a/run"))
