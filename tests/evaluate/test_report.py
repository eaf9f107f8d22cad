"""The report, read back as HTML: what is in it, what is left out, and that nothing in it reaches for the
network or runs.
"""

import base64
import hashlib
import re
from pathlib import Path

import pytest

from pipeline.evaluate.report import dotted_metrics, word_diff
from tests.evaluate.pages import FULL, HOSTILE, NAN, PLOTS, SECTIONS, Page, render


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return render(tmp_path_factory.mktemp("report"), FULL)


def test_full_data_has_every_section_and_a_link_to_each(full: Page) -> None:
    assert full.attributes("section", "id") == SECTIONS
    links = [link for link in full.attributes("a", "href") if link and not link.startswith("#stage-")]
    assert links == [f"#{section}" for section in SECTIONS]


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize("empty", ["missing", "empty", "none"])
def test_a_missing_or_empty_key_leaves_out_its_section_alone(tmp_path: Path, key: str, empty: str) -> None:
    without = {
        name: value for name, value in FULL.items() if name not in PLOTS
    }  # plots take time: one of them has to do
    without["calibration"] = FULL["calibration"]
    expected = [section for section in SECTIONS if section in without and section != key]
    without.pop(key, None)
    if empty != "missing":
        without[key] = None if empty == "none" else type(FULL[key])()
    assert render(tmp_path, without).attributes("section", "id") == expected


def test_no_data_is_a_page_without_sections(tmp_path: Path) -> None:
    page = render(tmp_path, {})
    assert page.attributes("section", "id") == []
    assert '<h1 dir="auto">run</h1>' in page.html


def test_the_same_data_gives_the_same_bytes(tmp_path: Path, full: Page) -> None:
    assert render(tmp_path, FULL).html == full.html


def test_nothing_is_fetched(full: Page) -> None:
    addresses = re.findall(r"\w+://[^\s\"'<]+", full.html)
    assert set(addresses) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names of XML namespaces
    assert "@import" not in full.html
    assert all(not {"src", "srcset", "data", "action"} & attributes.keys() for _, attributes in full.tags)
    references = [
        value
        for _, attributes in full.tags
        for name, value in attributes.items()
        if name in ("href", "xlink:href")
    ]
    assert references
    assert all(value is not None and value.startswith("#") for value in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full.html))
    assert any("default-src 'none'" in (content or "") for content in full.attributes("meta", "content"))


def test_text_is_escaped_wherever_it_comes_from(tmp_path: Path) -> None:
    data = {
        "title": HOSTILE,
        "command": HOSTILE,
        "summary": [{"name": HOSTILE, "value": HOSTILE, "note": HOSTILE}],
        "metrics": {HOSTILE: HOSTILE},
        "rows": {"by_source": {HOSTILE: {"read": 1, "kept": 0, "quarantined": {HOSTILE: 1}}}},
        "curves": {HOSTILE: FULL["curves"]["sft"]},
        "reward_kl": [{"name": HOSTILE, "kl": 1.0, "reward": 1.0}],
        "lengths": {HOSTILE: [1, 2], "$x$": [3]},
        "measured": {
            HOSTILE: {
                HOSTILE: 1,
                "by_source": {HOSTILE: FULL["measured"]["comparisons"]},
                "confusion": {HOSTILE: {HOSTILE: 1}},
            }
        },
        "samples": [{"prompt": HOSTILE, "sft": HOSTILE, "ppo": HOSTILE}],
        "lineage": [
            dict.fromkeys(("stage", "path", "identity", "created_at", "config"), HOSTILE)
            | {"inputs": {HOSTILE: HOSTILE}}
        ],
    }
    page = render(tmp_path, data)
    assert [tag for tag, _ in page.tags].count("script") == 1  # the sorting
    assert "b" not in {tag for tag, _ in page.tags}
    assert "alert(" not in page.html.split("<script>")[-1]
    assert page.rows["samples"][1] == [HOSTILE, HOSTILE, "–", HOSTILE, "–", "–"]


def test_samples_are_one_row_each_with_scores_to_sort_by(full: Page) -> None:
    head, *rows = full.rows["samples"]
    assert head == [
        "Prompt",
        "SFT response",
        "Reward",
        "Gold",
        "PPO response",
        "Reward",
        "Gold",
        "Δ reward",
        "Δ gold",
    ]
    assert rows == [
        ["a?", "yes", "0.12", "-0.50", "no", "2.00", "1.00", "+1.88", "+1.50"],
        ["b?", HOSTILE, "–", "–", "مرحبا 🎉", "–", "0.25", "–", "–"],
        ["c?", "half a pair: ?", "–", "–", "–", "–", "–", "–", "–"],
    ]
    assert full.attributes("td", "data-sort")[:8] == [
        "0.125",
        "-0.5",
        "2.0",
        "1.0",
        "1.875",
        "1.5",
        "None",
        "None",
    ]
    assert full.attributes("div", "dir") == ["auto"] * 9


def test_gold_columns_need_a_gold_reward(tmp_path: Path) -> None:
    page = render(
        tmp_path,
        {
            "samples": [
                {"prompt": "a?", "sft": "b", "ppo": "c", "sft_reward": 1.0, "ppo_reward": 2, "ppo_gold": NAN}
            ]
        },
    )
    head = ["Prompt", "SFT response", "Reward", "PPO response", "Reward", "Δ reward"]
    assert page.rows["samples"] == [head, ["a?", "b", "1.00", "c", "2", "+1.00"]]


def test_words_that_only_one_response_has_are_marked(tmp_path: Path) -> None:
    before, after = "Good question!  The capital is Lyon.", "The capital is Paris. Surely.\n"
    found = word_diff(before, after)
    assert found == (
        [("Good question!", True), ("  ", False), ("The capital is", False), (" ", False), ("Lyon.", True)],
        [("The capital is", False), (" ", False), ("Paris. Surely.\n", True)],
    )
    assert ["".join(words for words, _ in parts) for parts in found] == [before, after]
    assert word_diff("the same", "the same") == ([("the same", False)],) * 2
    page = render(tmp_path, {"samples": [{"prompt": "a?", "sft": before, "ppo": after}]})
    assert re.findall(r"<(del|ins)>([^<]*)<", page.html)[2:] == [
        ("del", "Good question!"),
        ("del", "Lyon."),
        ("ins", "Paris. Surely.\n"),
    ]


def sources(page, tag):
    return re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)


def test_only_its_own_script_and_style_may_run(tmp_path):
    for data in (FULL, {"samples": [{"prompt": HOSTILE, "sft": HOSTILE, "ppo": HOSTILE}], "title": HOSTILE}):
        page = render(tmp_path, data).html
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        for tag, rule in (("script", "script-src"), ("style", "style-src-elem")):
            (source,) = sources(page, tag)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert rules[rule] == f"'sha256-{digest}'"
        assert len(re.findall("<script|<style", page)) == 2
        assert not re.search(r"<[^>]+\son\w+=", page)
        assert page.index("Content-Security-Policy") < page.index("<style>")


def test_tables_hold_the_values(full: Page) -> None:
    assert full.rows["policies"] == [
        ["Policy", "Gold reward", "KL (nats)"],
        ["SFT", "0.1200.100 to 0.140", ""],
        ["best-of-16", "0.5", "≤ 1.84"],
    ]
    assert full.rows["summary"] == [["Gold reward, PPO", "0.56", "scale −1 to 1"]]
    assert full.rows["metrics"] == [
        ["reward.comparisons.accuracy", "0.8061"],
        ["reward.comparisons.pairs", "1,024"],
        ["seed", "0"],
    ]
    by_source, records = full.rows["rows"][1:3], full.rows["rows"][4:]
    assert by_source == [
        ["pairs.csv", "40", "27", "3", "10", "not text\xa07 · exact duplicate\xa03"],
        ["more.csv", "1,200", "1,200", "0", "0", ""],
    ]
    assert records == [
        ["comparisons", "1,000", "100", "130", "", "the sources"],
        ["prompts", "16", "2", "2", "", "other kinds"],
    ]
    assert full.attributes("i", "style")[:4] == ["width: 81.3%", "width: 8.1%", "width: 10.6%", "width: 1.3%"]
    flow = " ".join(full.text["rows"].split())
    assert "1,240 read 1,227 kept 3 merged as votes 10 quarantined: not text 7 · exact duplicate 3" in flow
    assert full.rows["reward_kl"][1:] == [
        ["SFT", "0.00", "-0.20", "-0.04"],
        ["best-of-4", "≤ 0.64", "0.30", "0.20"],
        ["best-of-16", "≤ 1.83", "0.70", "0.50"],
    ]


def test_the_reward_model_s_figures_are_told_by_kind_with_intervals(full: Page) -> None:
    head = ["metric", "value", "95 % interval"]
    labels = [head, ["rows", "1,200", ""], ["accuracy", "0.750", "0.700 to 0.800"], ["AUROC", "0.812", ""]]
    confusion = [
        ["true class", "predicted bad", "predicted good"],
        ["bad", "1,000", "20"],
        ["good", "30", "150"],
    ]
    longer, margin = ["accuracy of “longer wins”", "0.550", ""], ["mean margin", "0.000", ""]
    pairs = [head, ["pairs", "40", ""], ["accuracy", "0.600", "0.500 to 0.700"], longer, margin]
    by_source = [
        ["source", "pairs", "accuracy", "95 % interval", "“longer wins”"],
        ["web", "30", "0.500", "0.300 to 0.700", "0.400"],
        ["forum", "10", "0.900", "0.800 to 1.000", "1.000"],
    ]
    assert full.rows["measured"] == labels + confusion + pairs + by_source
    words = full.text["measured"]
    assert (
        words.index("labels")
        < words.index("Confusion matrix")
        < words.index("comparisons")
        < words.index("By source")
    )


def test_lineage_links_an_input_to_the_stage_that_made_it(full: Page) -> None:
    assert [link for link in full.attributes("a", "href") if link and link.startswith("#stage-")] == [
        "#stage-prepare"
    ]
    assert "records from prepare aaaaaaaaaaaa" in full.text["lineage"]
    assert "model from ffffffffffff" in full.text["lineage"]
    assert "seed: 1" in full.text["lineage"]


def test_plots_are_chosen_by_the_keys_that_exist(full: Page) -> None:
    labels = [
        attributes["aria-label"] or "" for _, attributes in full.tags if attributes.get("role") == "img"
    ]
    reward_kl, sft, reward = ["Reward against KL", "Gold reward against KL"], ["Loss"], ["Loss", "Accuracy"]
    ppo = [
        "Reward",
        "Reward against KL",
        "KL",
        "Response length",
    ]  # its loss says nothing, and no entropy was logged
    assert [label.split(".")[0] for label in labels] == [
        *reward_kl,
        *sft,
        *reward,
        *ppo,
        "Reward before and after",
        "Response length",
        "Calibration",
    ]
    assert full.html.count("<svg ") == full.html.count("<figcaption>") == 12
    assert "Reward rising while gold falls" in full.text["curves"]


def test_plots_follow_the_theme_and_keep_their_ids_apart(full: Page) -> None:
    svgs = "".join(re.findall(r"<svg .*?</svg>", full.html, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", svgs)) == set()  # every colour is one of the page's
    assert set(re.findall(r"var\(--([^)]*)\)", svgs)) == {
        "ink",
        "muted",
        "line",
        "page",
        "series-0",
        "series-1",
    }
    ids = re.findall(r'\bid="([^"]+)"', full.html)
    assert len(ids) == len(set(ids))
    assert "<metadata>" not in svgs


def test_nan_and_none_are_not_drawn(tmp_path: Path) -> None:
    page = render(
        tmp_path,
        {
            "curves": {
                "sft": [{"step": 1, "loss": NAN}, {"step": None, "loss": 1.0}],
                "ppo": [{"step": 1, "objective/kl": None}],
            },
            "reward_kl": [
                {"name": "PPO", "kl": NAN, "reward": 1.0},
                {"name": "SFT", "kl": 0.0, "reward": None, "gold_reward": NAN},
            ],
            "lengths": {"sft": [], "ppo": None},
            "calibration": [
                {"confidence": NAN, "accuracy": 0.5, "count": 3},
                {"confidence": 0.6, "accuracy": 0.5, "count": 0},
            ],
            "metrics": {"ece": NAN, "kl": None},
        },
    )
    assert page.html.count("<svg ") == 0
    assert page.attributes("section", "id") == ["reward_kl", "metrics"]
    assert page.rows["reward_kl"][1:] == [["PPO", "–", "1.00", "–"], ["SFT", "0.00", "–", "–"]]
    assert page.rows["metrics"] == [["ece", "–"], ["kl", "–"]]


def test_dotted_keys() -> None:
    assert list(dotted_metrics({"a": {"b": {"c": 1}, "d": 2}, "e": 3})) == [
        ("a.b.c", 1),
        ("a.d", 2),
        ("e", 3),
    ]
