"""The diffs of CONTRIBUTING.md apply, and what they add works."""

import os
import re
import shutil
import subprocess
import sys
import textwrap

from pipeline import config

ROOT = config.PACKAGE.parent
DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
CHECK = """
    import brevity, torch
    from pipeline import config, prepare
    from pipeline.config import OBJECTIVES
    from pipeline.reward import objectives

    with open("votes.csv", "w") as file:
        file.write("prompt,a,b,winner\\nName a fruit.,An apple.,No.,a\\nName a colour.,Six.,Blue.,b\\nName a bird.,A hen.,Ice.,no\\n")
    source = {"format": "votes", "path": "votes.csv"}
    folder = prepare.run(config.PrepareStage(run="t", source=[source], splits={"validation": 0, "test": 0}))
    from datasets import load_from_disk
    rows = load_from_disk(str(folder / "comparisons"))["train"]
    assert sorted(zip(rows["chosen"], rows["rejected"])) == [("An apple.", "No."), ("Blue.", "Six.")]
    assert '"no-winner"' in (folder / "quarantine.jsonl").read_text()

    assert config.RewardStage(run="t", model="m", objective="listnet").objective == "listnet" in OBJECTIVES
    scores, ranks = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[1, 2, -100]])
    found = objectives.listnet(scores, ranks, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor(2.0).log())  # equal scores: ln 2, whatever the ranks

    assert brevity.reward(["p"], ["a"], [[5, 6]], [True]) == [0.98]
"""


def test_each_diff_applies_and_what_it_adds_works(tmp_path):
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    assert len(DIFFS) == 3
    for diff in DIFFS:
        subprocess.run(["git", "apply", "--whitespace=error"], input=diff, text=True, cwd=tmp_path, check=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(CHECK)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
