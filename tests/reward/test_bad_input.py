"""What people's files hold: a reason in quarantine.jsonl or one clear line, and the rest still trains."""

import json
from collections import Counter

import pytest

from pipeline import RewardModel, config
from pipeline.errors import UserError
from pipeline.prepare import stage as prepare
from pipeline.reward import stage as reward
from pipeline.reward.dataset import require_contrast

GOOD = [
    {"prompt": f"Name {n} fruits.", "responses": ["An apple.", "No.", f"{n}"], "ranks": [1, 3, 2]}
    for n in range(8)
]
MESSAGES = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "responses": [[{"role": "assistant", "content": "Hello!"}], "Go."],
    "ranks": [1, 2],
}
ODD = [
    {"prompt": "🍎?", "responses": ["🙂 émoji ✓", "תפוח"], "ranks": [1, 2]},
    {"prompt": "ما اسمك؟", "responses": ["اسمي علي.", "لا."], "ranks": [1, 2]},
    {"prompt": "Go on.", "responses": ["word " * 100_000, "No."], "ranks": [2, 1]},
    MESSAGES,
]
BAD = [
    {"prompt": "One?", "responses": ["An only answer."], "ranks": [1]},
    {"prompt": "Tied?", "responses": ["a", "b"], "ranks": [1, 1]},
    {"prompt": "Empty?", "responses": ["a", ""], "ranks": [1, 2]},
    {"prompt": "Ranks?", "responses": ["a", "b"], "ranks": [0, "first"]},
]


def trained(tmp_path, model, source, **more):
    folder = prepare.run(
        config.PrepareStage(
            run="t", runs=str(tmp_path), source=[source], splits={"validation": 0, "test": 0.2}
        )
    )
    # Nothing is left to validate on, which is no reason not to train.
    steps = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_on_start": True,
    }
    loaded = config.RewardStage(
        run="t", runs=str(tmp_path), model=str(model), max_length=96, training=steps, **more
    )
    return folder, lambda: reward.run(loaded)


def quarantined(folder):
    return Counter(
        json.loads(line)["reason"] for line in (folder / "quarantine.jsonl").open(encoding="utf-8")
    )


@pytest.mark.parametrize("backbone", ["gpt2", "bert"])
def test_rankings(backbone, tmp_path, tiny_gpt2, tiny_encoders, capsys):
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD + ODD + BAD))
    model = tiny_gpt2 if backbone == "gpt2" else tiny_encoders["bert"]
    folder, train = trained(
        tmp_path, model, {"format": "rankings", "path": str(tmp_path / "r.jsonl")}, objective="ranking"
    )
    assert quarantined(folder) == {"too-few-answers": 1, "all-tied": 1, "empty-text": 1, "not-a-rank": 1}
    rm = RewardModel.load(train())
    assert "over max_length=96 (overlong: truncate_left): 1 cut" in capsys.readouterr().out
    scores = rm.score([row["prompt"] for row in ODD], [row["responses"][0] for row in ODD])
    assert len(set(scores)) == len(ODD)


def test_a_csv_with_bom_and_crlf_and_labels_as_words(tmp_path, tiny_encoders):
    rows = [f"text {n},{'nothate' if n % 2 else 'HATE'}" for n in range(12)] + [
        '"two\r\nlines",nothate',
        "odd,perhaps",
        ",hate",
    ]
    (tmp_path / "l.csv").write_bytes(("\ufeff" + "\r\n".join(["text,label", *rows])).encode())
    source = {"format": "labels", "path": str(tmp_path / "l.csv"), "classes": ["nothate", "HATE"]}
    options = {"objective": "classification", "encoding": {"form": "concatenation"}}
    folder, train = trained(tmp_path, tiny_encoders["roberta"], source, positive_label="nothate", **options)
    assert quarantined(folder) == {"unknown-label": 1, "empty-text": 1}
    assert list(RewardModel.load(train()).probabilities([""], ["text 1"])[0]) == ["nothate", "HATE"]


@pytest.mark.parametrize(
    ("classes", "positive_label", "problem"),
    [
        (
            ["nothate", "hate"],
            "kind",
            "the classes are nothate, hate, and positive_label='kind' is none of them",
        ),
        (["nothate", "hate"], None, "the classes are nothate, hate, and 'positive_label' is not set"),
        (["nothate", "hate", "kind"], "kind", "positive_label='kind': no training row has it"),
    ],
)
def test_a_class_that_is_not_in_the_data(classes, positive_label, problem, tmp_path, tiny_encoders):
    (tmp_path / "l.csv").write_text(
        "text,label\n" + "".join(f"text {n},{'nothate' if n % 2 else 'hate'}\n" for n in range(12))
    )
    source = {"format": "labels", "path": str(tmp_path / "l.csv"), "classes": classes}
    _, train = trained(
        tmp_path, tiny_encoders["bert"], source, objective="classification", positive_label=positive_label
    )
    with pytest.raises(UserError, match=problem):
        train()


def test_records_that_are_not_there_are_named(tmp_path, tiny_gpt2):
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD))
    _, train = trained(
        tmp_path, tiny_gpt2, {"format": "rankings", "path": str(tmp_path / "r.jsonl")}, objective="regression"
    )
    with pytest.raises(
        UserError, match=r"holds no ratings \(found: comparisons, demonstrations, prompts, rankings\)"
    ):
        train()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            {"objective": "regression", "training": {"center_rewards_coefficient": 0.1}},
            "center_rewards_coefficient is not read with objective",
        ),
        (
            {"objective": "ranking", "training": {"label_smoothing_factor": 0.1}},
            "label_smoothing_factor is not read with objective: ranking",
        ),
    ],
)
def test_what_an_objective_does_not_read_is_refused(more, problem):
    with pytest.raises(UserError, match=problem):
        reward.check(config.RewardStage(run="t", model="m", **more))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"positive_label": "x"}, "'positive_label' is only read with objective: classification"),
        ({"reward_output": "log_odds"}, "'reward_output' is only read with objective: classification"),
        ({"uncertainty_penalty": 1.0}, "'uncertainty_penalty' is only read with an ensemble"),
        (
            {"objective": "classification", "ensemble": 2},
            "an ensemble of heads is for objectives with one score",
        ),
        ({"objective": "pairwize"}, "objective='pairwize'"),
        ({"encoding": {"sepparator": " "}}, "unknown key 'encoding.sepparator'; did you mean 'separator'"),
    ],
)
def test_configs_that_make_no_sense(more, problem):
    with pytest.raises(UserError, match=problem):
        config.validate(config.RewardStage, {"run": "t", "model": "m", **more}, "reward.yaml")


@pytest.mark.parametrize(
    ("rows", "form", "objective", "problem"),
    [
        ([{"label": 1}] * 6, "labels", "classification", "all 5 labels to train on have one class"),
        ([{"rating": 0.5}] * 6, "ratings", "regression", "all 5 ratings to train on are equal"),
    ],
)
def test_records_that_teach_nothing_are_refused(rows, form, objective, problem, tmp_path, tiny_gpt2):
    rows = [{"prompt": f"Name {n}.", "completion": f"It is {n}."} | row for n, row in enumerate(rows)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"format": form, "path": str(tmp_path / "r.jsonl")}
    _, train = trained(tmp_path, tiny_gpt2, source, objective=objective)
    with pytest.raises(UserError, match=f"reward: {problem}, which teaches nothing; give prepare"):
        train()


@pytest.mark.parametrize(
    ("kind", "alike", "other"),
    [
        ("rankings", ([1, 1], ["a", "b"]), ([1, 2], ["a", "b"])),
        ("rankings", ([1, 2], ["a", "a"]), ([2, 1], ["a", "b"])),
        ("comparisons", ([1, 2], ["a", "a"]), ([1, 2], ["a", "b"])),
        ("labels", (1, ["a"]), (0, ["a"])),
        ("ratings", (0.5, ["a"]), (0.25, ["a"])),
    ],
)
def test_one_record_that_differs_is_enough(kind, alike, other):
    with pytest.raises(UserError, match=f"all 3 {kind} to train on"):
        require_contrast(kind, [alike] * 3)
    require_contrast(kind, [alike, alike, other])
