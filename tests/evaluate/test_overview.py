"""The table of the policies at the top of the report."""

from pipeline.evaluate.overview import policy_table

METRICS = {
    "sft": {
        "reward": 0.1,
        "reward_interval": [0.05, 0.15],
        "gold_reward": -0.0001,
        "kl": 0.0,
        "response_tokens": 9.0,
    },
    "best_of_2": {"reward": 0.2, "kl_bound": 0.19},
    "best_of_16": {"reward": 0.5, "gold_reward": 0.4, "kl_bound": 1.835, "response_tokens": 12.25},
    "best_of_64": {"reward": 0.7, "gold_reward": 0.5, "kl_bound": 3.17},
    "ppo_10": {"reward": 0.3, "kl": 0.5},
    "ppo": {
        "reward": 0.6,
        "gold_reward": 0.55,
        "kl": 2.0,
        "win_rate": 0.9,
        "win_rate_gold": 0.75,
        "win_rate_gold_interval": [0.7, 0.8],
    },
    "fits": {},
}


def cells(row):
    return [(cell["value"], cell["interval"]) for cell in row["cells"]]


def test_the_table_has_sft_best_of_n_and_the_last_policy():
    table = policy_table(METRICS)
    assert table["columns"] == ["Gold reward", "Reward", "Wins against SFT", "KL (nats)", "Tokens"]
    sft, best_of_16, best_of_64, ppo = table["rows"]
    assert [row["name"] for row in table["rows"]] == ["SFT", "best-of-16", "best-of-64", "PPO"]
    assert cells(sft) == [("0.000", ""), ("0.100", "0.050 to 0.150"), ("", ""), ("0.00", ""), ("9.0", "")]
    assert cells(best_of_16) == [("0.400", ""), ("0.500", ""), ("", ""), ("≤ 1.83", ""), ("12.2", "")]
    assert cells(best_of_64)[3] == ("≤ 3.17", "")
    assert cells(ppo) == [("0.550", ""), ("0.600", ""), ("0.750", "0.700 to 0.800"), ("2.00", ""), ("", "")]


def test_the_win_rate_is_that_of_the_reward_if_no_other_is_known():
    ppo = {"reward": 0.6, "win_rate": 0.9}
    table = policy_table({"sft": {"reward": 0.1}, "ppo": ppo})
    assert table["columns"] == ["Reward", "Wins against SFT"]
    assert cells(table["rows"][1]) == [("0.600", ""), ("0.900", "")]
    assert policy_table({}) == {}
