"""The diffs of CONTRIBUTING.md apply, and the code that they add works."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

from pipeline import config

ROOT = config.PACKAGE.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
VOTES = """\
prompt,a,b,winner
Name a fruit.,An apple.,No.,a
Name a colour.,Six.,Blue.,b
Name a bird.,A hen.,Ice.,no
"""
CHECK = """
    import brevity, torch
    from datasets import load_from_disk
    from pipeline import config
    from pipeline.prepare import stage as prepare
    from pipeline.reward import objectives

    source = {"format": "votes", "path": "votes.csv"}
    splits = {"validation": 0, "test": 0}
    folder = prepare.run(config.PrepareStage(run="t", source=[source], splits=splits))
    rows = load_from_disk(str(folder / "comparisons"))["train"]
    assert sorted(zip(rows["chosen"], rows["rejected"])) == [("An apple.", "No."), ("Blue.", "Six.")]
    assert '"no-winner"' in (folder / "quarantine.jsonl").read_text()

    stage = config.RewardStage(run="t", model="m", objective="listnet")
    assert stage.objective == "listnet" in config.OBJECTIVES
    scores, ranks = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[1, 2, -100]])
    loss = objectives.listnet(scores, ranks, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())  # equal scores: ln 2, whatever the ranks

    assert brevity.reward(["p"], ["a"], [[5, 6]], [True]) == [0.98]
"""


def run_python(folder, *arguments):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_diff_applies_and_what_it_adds_works(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pipeline", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    assert len(DIFFS) == 3
    for diff in DIFFS:
        apply = ["git", "apply", "--whitespace=error"]
        subprocess.run(apply, input=diff, text=True, cwd=tmp_path, check=True)

    (tmp_path / "votes.csv").write_text(VOTES)
    run_python(tmp_path, "-c", textwrap.dedent(CHECK))

    (tmp_path / "configs").mkdir()
    run_python(tmp_path, "scripts/write_reference.py")
    reference = (tmp_path / "docs/configuration.md").read_text()
    for name, stage in (("votes", "prepare"), ("listnet", "reward")):
        assert name in reference
        assert f'"{name}"' in (tmp_path / f"configs/schemas/{stage}.json").read_text()
