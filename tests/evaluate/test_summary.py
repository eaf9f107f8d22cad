"""The table that ends a run: which rows there are, by what the reward model learned from."""

import json
from typing import Any

import pytest

from pipeline.evaluate.summary import summary_rows, summary_table

COMPARISONS = {"pairs": 1064, "accuracy": 0.8674, "accuracy_longer": 0.5695}
ACCURACY = ("reward accuracy", "0.867", "longer wins 0.570, 1,064 test pairs")
RANKINGS = {"rankings": 190, "kendall_tau": 0.76316, "top_1": 0.76842, "accuracy": 0.88}
LABELS = {"rows": 1342, "accuracy": 0.9, "auroc": 0.9123, "f1": 0.85, "confusion": {}}
STEPS = {"rows": 400, "auroc": 0.9876, "f1": 0.97, "first_error_f1": 0.8342}
RATINGS = {"rows": 342, "rmse": 0.18187, "spearman": 0.93543}


def told(reward: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows on the reward model; every run has the others."""
    found = [tuple(row.values()) for row in summary_rows({"reward": reward, "sft": {}, "ppo": {"kl": 1.5}})]
    assert found[-1] == ("KL of PPO to SFT", "1.500", "nats per response")
    return found[:-1]


def test_pairs_come_with_the_ceiling_and_with_longer_wins() -> None:
    assert told({"comparisons": COMPARISONS, "rankings": RANKINGS}) == [ACCURACY]
    (row,) = told({"comparisons": COMPARISONS | {"accuracy_ceiling": 0.9}})
    assert row == ("reward accuracy", "0.867", "ceiling 0.900, longer wins 0.570, 1,064 test pairs")


LEARNED: dict[str, tuple[dict[str, Any], list[tuple[str, ...]]]] = {
    "rankings": (
        RANKINGS,
        [("reward top-1", "0.768", "190 test rankings"), ("Kendall τ", "0.763", "190 test rankings")],
    ),
    "labels": (
        LABELS,
        [("reward AUROC", "0.912", "1,342 test labels"), ("reward F1", "0.850", "1,342 test labels")],
    ),
    "steps": (
        STEPS,
        [("step AUROC", "0.988", "400 test responses"), ("first-error F1", "0.834", "400 test responses")],
    ),
    "ratings": (
        RATINGS,
        [("reward RMSE", "0.182", "342 test ratings"), ("Spearman ρ", "0.935", "342 test ratings")],
    ),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_what_it_learned_from_comes_after_the_pairs_where_there_are_any(kind: str) -> None:
    figures, expected = LEARNED[kind]
    assert told({kind: figures, "comparisons": COMPARISONS}) == [ACCURACY, *expected]
    assert told({kind: figures}) == expected


def test_a_ratio_of_few_rows_has_its_interval() -> None:
    few = COMPARISONS | {"pairs": 6, "accuracy": 1.0, "accuracy_interval": [0.61, 1.0]}
    assert told({"comparisons": few}) == [
        ("reward accuracy", "1.000", "longer wins 0.570, 6 test pairs: 95 % from 0.610 to 1.000")
    ]
    many = COMPARISONS | {"accuracy_interval": [0.85, 0.88]}
    assert told({"comparisons": many}) == [ACCURACY]
    rankings = RANKINGS | {"rankings": 9, "top_1_interval": [0.4, 0.9], "kendall_tau_interval": [0.5, 0.8]}
    assert [row[2] for row in told({"rankings": rankings})] == [
        "9 test rankings: 95 % from 0.400 to 0.900",
        "9 test rankings: 95 % from 0.500 to 0.800",
    ]
    of_38 = many | {"pairs": 152, "prompts": 38}
    assert told({"comparisons": of_38})[0][2].endswith(
        "152 test pairs for 38 prompts: 95 % from 0.850 to 0.880"
    )
    of_138 = many | {"pairs": 552, "prompts": 138}
    assert told({"comparisons": of_138})[0][2].endswith("552 test pairs for 138 prompts")

    ppo = {"win_rate": 0.75, "win_rate_interval": [0.5, 0.9], "win_rate_rows": 12}
    rows = summary_rows({"reward": {}, "sft": {}, "ppo": ppo})
    assert rows[-1]["note"] == "against SFT, ties half, 12 responses: 95 % from 0.500 to 0.900"
    rows = summary_rows({"reward": {}, "sft": {}, "ppo": ppo | {"win_rate_rows": 152}})
    assert rows[-1]["note"] == "against SFT, ties half"
    rows = summary_rows({"reward": {}, "sft": {}, "ppo": ppo | {"win_rate_rows": 152, "prompts": 38}})
    note = "against SFT, ties half, 152 responses for 38 prompts: 95 % from 0.500 to 0.900"
    assert rows[-1]["note"] == note

    sft = {
        "reward": 1.0,
        "prompts": 38,
        "reward_interval": [0.9, 1.1],
        "share": 0.5,
        "share_interval": [0.4, 0.6],
    }
    rows = summary_rows({"reward": {}, "sft": sft, "ppo": sft | {"prompts": 100}})
    assert [tuple(row.values()) for row in rows] == [
        ("share, sft", "0.500", "95 % from 0.400 to 0.600"),
        ("share, ppo", "0.500", ""),
        ("reward, sft", "1.000", "95 % from 0.900 to 1.100"),
        ("reward, ppo", "1.000", ""),
    ]


def test_what_is_undefined_or_was_not_measured_is_left_out() -> None:
    assert told({"ratings": {"rows": 3, "rmse": 0.5}}) == [("reward RMSE", "0.500", "3 test ratings")]
    assert told({"labels": {"rows": 1, "accuracy": 1.0}}) == []
    assert told({}) == []


def test_of_best_of_n_16_and_the_most_are_told() -> None:
    by_n = {f"best_of_{n}": {"gold_reward": n / 100} for n in (8, 16, 32, 64)}
    found = [tuple(row.values())[:2] for row in summary_rows({"reward": {}, "sft": {}, **by_n, "ppo": {}})]
    assert found == [("gold reward, best-of-16", "0.160"), ("gold reward, best-of-64", "0.640")]


def test_measures_of_the_config_follow_the_gold_reward() -> None:
    sft = {"reward": 2.0, "gold_reward": 0.25, "right_steps": 0.5, "distinct_1": 0.125}
    rows = summary_rows({"reward": {}, "sft": sft, "ppo": {"right_steps": 0.75}})
    assert [tuple(row.values())[:2] for row in rows] == [
        ("gold reward, sft", "0.250"),
        ("right steps, sft", "0.500"),
        ("right steps, ppo", "0.750"),
        ("reward, sft", "2.000"),
    ]


def test_the_table_says_where_the_report_is(tmp_path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"reward": {"ratings": RATINGS}, "sft": {}, "ppo": {}}))
    assert summary_table(tmp_path).splitlines() == [
        "",
        "  reward RMSE     0.182  342 test ratings",
        "  Spearman ρ      0.935  342 test ratings",
        "",
        f"report: {tmp_path}/report.html",
    ]
