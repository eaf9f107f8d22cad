"""Servers get the output embeddings of a model that shares them with its input."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.engines.embeddings import FILE, add_output_embeddings, folder_for_servers
from pipeline.errors import UserError


@pytest.fixture(params=["10GB", "100KB"], ids=["one file", "shards"])
def shared(tiny_gpt2, request, tmp_path):
    """A policy with shared embeddings, in a folder of one file or of several."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    policy.save_pretrained(tmp_path / "policy", max_shard_size=request.param)
    return policy, tmp_path / "policy"


def test_servers_load_the_embeddings_and_the_artifact_stays_as_it_was(shared, tmp_path):
    policy, folder = shared
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with folder_for_servers(folder, tmp_path) as whole:
        assert whole.parent == tmp_path
        index = whole / "model.safetensors.index.json"
        if index.exists():  # what a server reads of several files
            names = json.loads(index.read_text())["weight_map"]
            assert names["lm_head.weight"] == FILE
        found = load_file(whole / FILE)
        assert found.keys() == {"lm_head.weight"}
        assert torch.equal(found["lm_head.weight"], policy.get_input_embeddings().weight)
        assert {path.name for path in whole.iterdir()} == {*before, FILE}
    assert not whole.exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_with_output_embeddings_of_its_own_is_left_alone(word_policy, tmp_path):
    with folder_for_servers(word_policy, tmp_path) as whole:
        assert whole == word_policy
    add_output_embeddings(word_policy)
    assert not (word_policy / FILE).exists()


def test_a_folder_that_cannot_be_written_is_one_line(tiny_gpt2, tmp_path):
    with (
        pytest.raises(UserError, match=r"missing: .*No such file.*; set rollouts.folder to one that can be"),
        folder_for_servers(tiny_gpt2, tmp_path / "missing"),
    ):
        pass
