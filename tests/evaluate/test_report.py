"""The report, read back as HTML: what is in it, what is left out, and that nothing in it reaches for the
network or runs.
"""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate import plots, report
from pipeline.evaluate.plots import (
    SUPERVISED,
    THEME,
    Plot,
    draw_curve,
    draw_curves,
    fitted_curve,
    metric_column,
    root_kl,
)
from pipeline.evaluate.report import dotted_metrics, word_diff, write_report
from pipeline.formatting.numbers import format_number

NAN = float("nan")
HOSTILE = '<script>alert("x")</script> & <b>bold</b>'
FULL: dict[str, Any] = {
    "title": "demo",
    "command": "rlhf run --recipe demo",
    "summary": [{"name": "Gold reward, PPO", "value": "0.56", "note": "scale −1 to 1"}],
    "metrics": {"reward": {"comparisons": {"accuracy": 0.8061234, "pairs": 1024}}, "seed": 0},
    "rows": {
        "read": 1240,
        "kept": 1230,
        "quarantined": {"not text": 7, "exact duplicate": 3},
        "by_source": {
            "pairs.csv": {"read": 40, "kept": 30, "quarantined": {"not text": 7, "exact duplicate": 3}},
            "more.csv": {"read": 1200, "kept": 1200, "quarantined": {}},
        },
        "derived": {"prompts": 20},
    },
    "records": {
        "comparisons": {"train": 1000, "validation": 100, "test": 130},
        "prompts": {"train": 16, "validation": 2, "test": 2},
    },
    "curves": {
        "sft": [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.1}],
        "reward": [
            {"step": 10, "loss": 0.7, "accuracy": 0.5},
            {"step": 20, "loss": 0.5},
            {"step": 20, "eval_accuracy": 0.75},
        ],
        "ppo": [
            {"step": 1, "loss": 0.1, "objective/kl": 0.0, "objective/scores": -0.2, "response/tokens": 12.0},
            {"step": 2, "loss": 0.1, "objective/kl": 4.0, "objective/scores": 1.0, "response/tokens": 14.0},
            {"step": 2, "eval_gold_reward": 0.4},
        ],
    },
    "reward_kl": [
        {"name": "SFT", "kl": 0.0, "reward": -0.2, "gold_reward": -0.04, "bound": False},
        {
            "name": "best-of-4",
            "kl": 0.636,
            "reward": 0.3,
            "gold_reward": 0.2,
            "bound": True,
            "line": "best-of-n",
        },
        {
            "name": "best-of-16",
            "kl": 1.835,
            "reward": 0.7,
            "gold_reward": 0.5,
            "bound": True,
            "line": "best-of-n",
        },
    ],
    "lengths": {"sft": [3, 4, 4, 9], "ppo": [12, 13, 13]},
    "measured": {
        "labels": {
            "rows": 1200,
            "accuracy": 0.75,
            "accuracy_interval": [0.7, 0.8],
            "auroc": 0.8125,
            "confusion": {"bad": {"bad": 1000, "good": 20}, "good": {"bad": 30, "good": 150}},
        },
        "comparisons": {
            "pairs": 40,
            "accuracy": 0.6,
            "accuracy_interval": [0.5, 0.7],
            "accuracy_longer": 0.55,
            "margin": -0.0001,
            "by_source": {
                "web": {
                    "pairs": 30,
                    "accuracy": 0.5,
                    "accuracy_interval": [0.3, 0.7],
                    "accuracy_longer": 0.4,
                },
                "forum": {
                    "pairs": 10,
                    "accuracy": 0.9,
                    "accuracy_interval": [0.8, 1.0],
                    "accuracy_longer": 1.0,
                },
            },
        },
    },
    "calibration": [
        {"confidence": 0.55, "accuracy": 0.5, "count": 90},
        {"confidence": 0.9, "accuracy": 0.8, "count": 10},
    ],
    "samples": [
        {
            "prompt": "a?",
            "sft": "yes",
            "ppo": "no",
            "sft_reward": 0.125,
            "ppo_reward": 2.0,
            "sft_gold": -0.5,
            "ppo_gold": 1.0,
        },
        {
            "prompt": "b?",
            "sft": HOSTILE,
            "ppo": "مرحبا 🎉",
            "sft_reward": NAN,
            "ppo_reward": None,
            "sft_gold": None,
            "ppo_gold": 0.25,
        },
        {"prompt": "c?", "sft": "half a pair: \ud83c"},
    ],
    "lineage": [
        {
            "stage": "prepare",
            "path": "runs/demo/prepare",
            "identity": "a" * 64,
            "created_at": "2024-05-01",
            "inputs": {},
            "config": "seed: 0",
        },
        {
            "stage": "sft",
            "path": "runs/demo/sft",
            "identity": "b" * 64,
            "inputs": {"records": "a" * 64, "model": "f" * 64},
            "config": "seed: 1",
        },
    ],
}
PLOTS = ("curves", "reward_kl", "lengths", "calibration")
SECTIONS = [
    "summary",
    "reward_kl",
    "samples",
    "curves",
    "lengths",
    "measured",
    "calibration",
    "rows",
    "metrics",
    "lineage",
]


class Page(HTMLParser):
    """What a browser builds: every tag with its attributes, and table rows as lists of cells, per section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.section, self.in_cell = html, "", False
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text: dict[str, str] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        elif tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[self.section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.section = "" if tag == "section" else self.section
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if self.in_cell:
            self.rows[self.section][-1][-1] += data.strip("\n")

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


def render(folder: Path, data: dict[str, Any]) -> Page:
    write_report(folder / "report.html", data)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


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


def test_long_texts_are_compared_in_linear_time():
    """Word by word, each of these would take hours."""
    many = 200_000
    for parts, text in zip(word_diff("a x " * many, "a " * many), ("a x " * many, "a " * many), strict=True):
        assert [changed for _, changed in parts[:2]] == [False, False]
        assert "".join(part for part, _ in parts) == text
    same = " ".join(map(str, range(many)))
    before, after = word_diff(f"{same} b c {same}", f"{same} d {same}")
    assert [part for part, changed in before if changed] == ["b c"]
    assert [part for part, changed in after if changed] == ["d"]


def test_texts_with_many_equal_words_are_marked_as_a_whole():
    before, after = word_diff("a " + "x y " * 150 + "q z", "a " + "y " * 300 + "r z")
    assert [part for part, changed in before if changed] == ["x y " * 150 + "q"]
    assert [part for part, changed in after if changed] == ["y " * 300 + "r"]


@given(st.text("ab \n\t", max_size=60), st.text("ab \n\t", max_size=60), st.integers(0, 5))
def test_the_parts_of_a_text_are_the_text(a, b, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "MAX_DIFF_WORDS", limit)
        for text, parts in zip((a, b), word_diff(a, b), strict=True):
            assert "".join(part for part, _ in parts) == text
            assert not any(changed and part[0].isspace() for part, changed in parts)
    unchanged = [" ".join(p for p, changed in parts if not changed).split() for parts in word_diff(a, b)]
    assert unchanged[0] == unchanged[1]


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
    assert full.rows["summary"] == [["Gold reward, PPO", "0.56", "scale −1 to 1"]]
    assert full.rows["metrics"] == [
        ["reward.comparisons.accuracy", "0.8061"],
        ["reward.comparisons.pairs", "1,024"],
        ["seed", "0"],
    ]
    by_source, records = full.rows["rows"][1:3], full.rows["rows"][4:]
    assert by_source == [
        ["pairs.csv", "40", "30", "10", "not text\xa07 · exact duplicate\xa03"],
        ["more.csv", "1,200", "1,200", "0", ""],
    ]
    assert records == [
        ["comparisons", "1,000", "100", "130", "", "the sources"],
        ["prompts", "16", "2", "2", "", "other kinds"],
    ]
    assert full.attributes("i", "style")[:4] == ["width: 81.3%", "width: 8.1%", "width: 10.6%", "width: 1.3%"]
    flow = " ".join(full.text["rows"].split())
    assert "1,240 read 1,230 kept 10 quarantined: not text 7 · exact duplicate 3" in flow
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
        "Response length",
        "Calibration",
    ]
    assert full.html.count("<svg ") == full.html.count("<figcaption>") == 11
    assert "Reward rising while gold falls" in full.text["curves"]


@pytest.mark.parametrize(
    ("title", "key", "says"),
    [
        ("RMSE", "eval_rmse", "constant"),
        ("AUROC", "eval_auroc", "coin"),
        ("Kendall τ", "eval_kendall_tau", "order"),
    ],
)
def test_what_an_objective_is_evaluated_by_is_drawn(
    title: str, key: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    log = [{"step": 5, "loss": 0.7}, {"step": 5, "eval_loss": 0.6, key: 0.25}, {"step": 10, key: 0.5}]
    axes = Figure().add_subplot()
    monkeypatch.setattr(
        plots,
        "draw_plot",
        lambda name, title, caption, x, y, paint: paint(axes) or [Plot(title, caption, "")],
    )
    (curve,) = [curve for curve in SUPERVISED if curve.title == title]
    (plot,) = draw_curve("reward", curve, log)
    assert says in plot.caption
    (line,) = axes.get_lines()
    assert line.get_label() == "validation"
    assert line.get_xydata().tolist() == [[5, 0.25], [10, 0.5]]
    monkeypatch.undo()
    assert [plot.title for plot in draw_curves("reward", log)] == ["Loss", title]


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


def test_a_plot_in_a_notebook_brings_its_colours() -> None:
    shown = Plot("Loss", "Should fall.", "<svg/>")._repr_html_()
    assert set(re.findall(r"(--[\w-]+):", shown)) >= set(THEME.values())
    assert "<b>Loss</b><svg/><figcaption>Should fall.</figcaption>" in shown


def test_a_policy_of_trl_s_trainers_has_a_policy_s_plots() -> None:
    log = [
        {
            "step": 1,
            "loss": 0.1,
            "reward": 0.2,
            "raw_reward": 1.0,
            "completions/mean_length": 9.0,
            "entropy": 0.5,
            "kl": 0.01,
        },
        {"step": 1, "eval_reward": 1.0, "eval_kl": 0.4},
    ]
    assert [plot.title for plot in draw_curves("ppo", log)] == [
        "Reward",
        "Reward against KL",
        "KL",
        "Response length",
        "Entropy",
    ]


def test_a_fit_is_drawn_where_something_was_measured() -> None:
    fit = {"start": 1.0, "alpha": 2.0, "beta": 0.5}
    assert list(fitted_curve("best-of-n", fit, 1.0, 2.0, parts=1)) == [(1.0, 1 + 1.5), (2.0, 1 + 2.0)]
    assert list(fitted_curve("PPO", fit, 0.0, 1.0, parts=1)) == [(0.0, 1.0), (1.0, 3.0)]


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


def test_numbers() -> None:
    values = {
        "–": None,
        "True": True,
        "12,480": 12480,
        "0.1235": 0.123456,
        "0": -0.0,
        "inf": math.inf,
        "a": "a",
        '[1, "é"]': [1, "é"],
    }
    assert [format_number(value) for value in values.values()] == list(values)
    assert format_number(NAN) == "–"
    assert format_number(-0.001, "z.2f") == "0.00"


def test_dotted_keys() -> None:
    assert list(dotted_metrics({"a": {"b": {"c": 1}, "d": 2}, "e": 3})) == [
        ("a.b.c", 1),
        ("a.d", 2),
        ("e", 3),
    ]


def test_a_column_is_the_first_key_that_any_entry_holds() -> None:
    entries: list[dict[str, Any]] = [
        {"step": 1, "b": 1.0},
        {"step": 2, "a": NAN, "b": None},
        {"step": 3, "b": 3},
    ]
    assert metric_column(entries, ("a", "b")) == [1.0, None, 3.0]
    assert metric_column(entries, ("c",)) == [None, None, None]


def test_distance_is_the_root_of_the_kl() -> None:
    assert [root_kl(kl) for kl in (4.0, -0.1, None, NAN)] == [2.0, 0.0, None, None]
