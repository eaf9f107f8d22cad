"""evaluate where there are no comparisons: what the reward model learned from is told instead."""

import json

from pipeline import config, evaluate, prepare, reward
from pipeline.evaluate.summary import table


def test_records_without_comparisons(tmp_path, tiny_gpt2):
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}." if n % 2 else "No.", "rating": n % 2} for n in range(60)]
    (tmp_path / "ratings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"run": "t", "runs": str(tmp_path / "runs")}
    prepare.run(config.PrepareStage(source=[{"format": "ratings", "path": str(tmp_path / "ratings.jsonl")}], **common))
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    learned = {"model": str(tiny_gpt2), "objective": "regression", "max_length": 96, "training": steps}
    scored = reward.run(config.RewardStage(**learned, **common))
    few = {"prompts": 2, "best_of": 2, "samples_per_prompt": 1, "response_tokens": 4}
    folder = evaluate.run(config.EvaluateStage(sft=str(tiny_gpt2), ppo=str(tiny_gpt2), **few, **common))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["reward"] == json.loads((scored / "metrics.json").read_text())
    assert list(metrics["reward"]) == ["ratings"]
    rmse = f"{metrics['reward']['ratings']['rmse']:.3f}"
    assert f"reward RMSE {rmse} {metrics['reward']['ratings']['rows']} test ratings".split() in [
        line.split() for line in table(folder).splitlines()
    ]
    assert "reward accuracy" not in table(folder)
    page = (folder / "report.html").read_text()
    assert f'<th scope="row" dir="auto">RMSE</th><td class="number">{rmse}</td>' in page
    assert 'aria-label="RMSE. ' in page
    assert '<section id="calibration">' not in page
