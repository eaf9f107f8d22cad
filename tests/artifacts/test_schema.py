"""Thousands of changed manifests, fingerprints and reward.json: no traceback, and no change that passes."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import files
from pipeline.artifacts.build import build_artifact
from pipeline.artifacts.inputs import artifact_status, open_external, require_artifact
from pipeline.artifacts.manifest import Artifact, load_manifest, read_fingerprint, read_manifest
from pipeline.artifacts.schema import manifest_digest
from pipeline.cli import main
from pipeline.config import SFTStage
from pipeline.errors import UserError
from pipeline.reward.settings import RewardSettings

MANIFESTS, OTHERS = 2000, 300
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**30,
    -(10**400),
    0.5,
    float("inf"),
    float("-inf"),
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "f" * 64,
    "2026-01-01",
    "9999-99-99T00:00:00+00:00",
    [],
    [[]],
    {},
    {"x": {"y": [1, 2]}},
    {"": None},
]
DEEP = "[" * 100_000 + "]" * 100_000


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key and item."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


def mutate(value: dict[str, Any], rng: random.Random) -> str:
    """The JSON of the value with one key dropped, renamed, added, copied, or given another value."""
    mutated = copy.deepcopy(value)
    *path, key = rng.choice(list(places(value)))
    owner: Any = mutated
    for step in path:
        owner = owner[step]
    what = rng.choice(["drop", "rename", "replace", "replace", "replace", "nudge", "nest", "deep", "add"])
    if what == "drop":
        del owner[key]
    elif what == "rename" and isinstance(owner, dict):
        owner[rng.choice(["x", f"{key}s", "../x", "/x", "", ".x"])] = owner.pop(key)
    elif what == "nudge" and isinstance(owner[key], int | float):
        owner[key] += rng.choice([1, -1, 0.5, 1e-9])
    elif what == "nudge" and isinstance(owner[key], str):
        owner[key] = owner[key][:-1] + chr(ord((owner[key] or "a")[-1]) ^ 1)
    elif what == "nest":
        owner[key] = {"x": owner[key]}
    elif what == "add" and isinstance(owner, dict):
        owner[rng.choice(["x", "trust", "zz/../x"])] = rng.choice(VALUES)
    elif what == "deep":
        owner[key] = "DEEP"
    else:
        owner[key] = rng.choice(VALUES)
    return json.dumps(mutated).replace('"DEEP"', DEEP)


def is_changed(text: str, value: dict[str, Any]) -> bool:
    try:
        # As text: 1, 1.0 and true are equal to Python, and not the same content.
        return json.dumps(json.loads(text), sort_keys=True) != json.dumps(value, sort_keys=True)
    except RecursionError:
        return True


def publish(config: SFTStage, inputs: dict[str, Artifact]) -> Path:
    def make(output: Path, work: Path) -> dict[str, Any]:
        (output / "model.safetensors").write_text("weights")
        (output / "best").mkdir()
        (output / "best" / "model.safetensors").write_text("best")
        return {
            "metrics": {"eval_loss": 0.25, "more": {"deep": [1, 2.5, None]}},
            "rows": {"train": {"kept": 7}},
        }

    return build_artifact(config, kind="policy", inputs=inputs, make=make, log=lambda _: None)


@pytest.fixture
def sft(tmp_path: Path) -> tuple[SFTStage, dict[str, Artifact]]:
    (tmp_path / "data.csv").write_text("prompt,completion\n")
    config = SFTStage(run="t", runs=str(tmp_path / "runs"), model="scratch", training={"max_steps": 5})
    inputs = {"records": open_external(tmp_path / "data.csv", "records")}
    publish(config, inputs)
    return config, inputs


def test_no_changed_manifest_passes_and_none_is_a_traceback(sft, capsys) -> None:
    config, _ = sft
    folder, rng = config.folder, random.Random(0)
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = 0
    for _ in range(MANIFESTS):
        text = mutate(manifest, rng)
        (folder / "manifest.json").write_text(text)
        if not is_changed(text, manifest):
            continue
        changed += 1
        assert read_manifest(folder) == {}, text
        with pytest.raises(UserError):
            require_artifact(folder, "policy", "make it")
        assert artifact_status(folder)[0] == "altered"
        if changed % 100 == 0:  # as commands: slower
            assert main(["show", str(folder), "--verify"]) == 2
            assert main(["show", str(folder.parent), "--verify"]) == 2
            assert main(["show", str(folder.parent)]) == 0
            assert main(["push", str(folder), "--to", "org/name"]) == 2
    assert "Traceback" not in "".join(capsys.readouterr())
    assert changed > 0.9 * MANIFESTS


def test_no_changed_manifest_without_a_digest_is_a_traceback(sft, capsys) -> None:
    """One of schema 1 vouches for its files, and for what it records twice, and not for its figures."""
    config, _ = sft
    folder, rng = config.folder, random.Random(1)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"schema": 1}
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["show", str(folder), "--verify"]) == 0
    assert "digest      none, as an older version wrote it" in capsys.readouterr().out
    for number in range(OTHERS):
        (folder / "manifest.json").write_text(mutate(manifest, rng))
        if load_manifest(folder)[0] or number % 20 == 0:
            other = shutil.copytree(folder, folder.parent.parent / "u" / "sft", dirs_exist_ok=True)
            codes = [main(["show", str(folder), "--verify"]), main(["show", str(folder.parent)])]
            codes += [
                main(["show", str(folder), str(other)]),
                main(["push", str(folder), "--to", "org/name"]),
            ]
            assert set(codes) <= {0, 2}
    for keys in (
        ["fingerprint", "config", "seed"],
        ["inputs", "records", "identity"],
        ["files", "model.safetensors"],
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | {keys[0]: changed_at(manifest, keys)}))
        assert load_manifest(folder)[0] == {}


def changed_at(manifest: dict[str, Any], keys: list[str]) -> Any:
    mutated = copy.deepcopy(manifest)
    owner = mutated
    for key in keys[:-1]:
        owner = owner[key]
    owner[keys[-1]] = "0" * 64 if isinstance(owner[keys[-1]], str) else owner[keys[-1]] + 1
    return mutated[keys[0]]


def test_no_changed_fingerprint_is_resumed(sft) -> None:
    config, inputs = sft
    shutil.rmtree(config.folder)
    partial, rng = config.folder.parent / ".sft.partial", random.Random(2)

    def interrupted(output: Path, work: Path) -> dict[str, Any]:
        (work / "checkpoint-1").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_artifact(config, kind="policy", inputs=inputs, make=interrupted)
    fingerprint = json.loads((partial / "fingerprint.json").read_text())
    for number in range(OTHERS):
        text = mutate(fingerprint, rng)
        if DEEP not in text and json.loads(text) == fingerprint:  # false instead of 0 is the same setting
            continue
        (partial / "work" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (partial / "fingerprint.json").write_text(text)
        valid = bool(read_fingerprint(partial))
        if number % 5 == 0 and valid:
            with pytest.raises(UserError, match="interrupted with other settings"):
                publish(config, inputs)
        elif number % 5 == 0:  # of no known origin: it starts over
            publish(config, inputs)
            assert not partial.exists()
            shutil.rmtree(config.folder)


def test_no_changed_reward_json_is_a_traceback(tmp_path: Path) -> None:
    RewardSettings(outputs=["a", "b"], reward_mean=0.5, reward_std=1.0).save(tmp_path)
    settings, rng = json.loads((tmp_path / "reward.json").read_text()), random.Random(3)
    refused = 0
    for _ in range(OTHERS):
        (tmp_path / "reward.json").write_text(mutate(settings, rng))
        try:
            loaded = RewardSettings.load(tmp_path)
        except UserError:
            refused += 1
        else:
            assert loaded is not None
            assert 0 <= loaded.logit < len(loaded.outputs)
    assert refused > OTHERS / 2


def test_no_changed_hash_cache_is_a_traceback_or_a_wrong_hash(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").write_text("a")
    expected, rng = files.hash_files(tmp_path / "model"), random.Random(4)
    (cache,) = (tmp_path / "cache").iterdir()
    known = json.loads(cache.read_text())
    for _ in range(OTHERS):
        mutated = mutate(known, rng)
        cache.write_text(mutated)
        found = files.hash_files(tmp_path / "model")
        assert found.keys() == {"a.bin"}
        assert found == expected or found["a.bin"] in mutated  # the cache is the user's own: it is believed


def test_the_digest_does_not_depend_on_the_order_of_keys(sft) -> None:
    manifest = read_manifest(sft[0].folder)
    assert manifest_digest(dict(reversed(list(manifest.items())))) == manifest["digest"]
