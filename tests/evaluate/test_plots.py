"""Plots: what is drawn of a log or of metrics, and the values of a curve."""

import io
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from pipeline.evaluate import curves, plots
from pipeline.evaluate.curves import SUPERVISED, draw_curve, draw_curves
from pipeline.evaluate.plots import (
    Plot,
    draw_lengths,
    draw_reward_kl,
    draw_rewards,
    fitted_curve,
    metric_column,
    root_kl,
)
from tests.evaluate.pages import NAN


def painted(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Any:
    """Return the axes on which the module paints from now on; it draws no image."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    monkeypatch.setattr(
        module,
        "draw_plot",
        lambda name, title, caption, x, y, paint: paint(axes) or [Plot(title, caption, "")],
    )
    return axes


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
    log = [{"step": 5, "loss": 0.7}, {"step": 5, "eval_loss": 0.6, key: 0.25}, {"step": 10, key: 0.5}]
    axes = painted(monkeypatch, curves)
    (curve,) = [curve for curve in SUPERVISED if curve.title == title]
    (plot,) = draw_curve("reward", curve, log)
    assert says in plot.caption
    (line,) = axes.get_lines()
    assert line.get_label() == "validation"
    assert line.get_xydata().tolist() == [[5, 0.25], [10, 0.5]]
    assert (line.get_linestyle(), line.get_marker()) == ("None", "o")  # two points have no shape
    monkeypatch.undo()
    assert [plot.title for plot in draw_curves("reward", log)] == ["Loss", title]


def test_each_of_several_rewards_has_a_curve_of_its_name() -> None:
    log = [
        {"step": 0, "eval_kl": 0.0, "eval_rewards/runs/a": 1.0},
        {"step": 1, "rewards/runs/a": 2.0, "rewards/b": 0.5, "rewards/reward_function/mean": 9.0},
        {"step": 2, "rewards/runs/a": 3.0, "rewards/b": 0.25, "rewards/reward_function/std": 9.0},
    ]
    titles = [plot.title for plot in draw_curves("ppo", log)]
    assert titles == ["KL", "Reward runs/a", "Reward b"]


def test_a_plot_in_a_notebook_is_an_image_in_the_light_colours() -> None:
    points = [{"name": "SFT", "kl": 0, "reward": 0}, {"name": "PPO", "kl": 1, "reward": 1, "bound": True}]
    plot = draw_reward_kl(points, {})[0]
    png = plot._repr_png_()
    assert png == plot._repr_png_()
    image = Image.open(io.BytesIO(png)).convert("RGB")
    assert image.getpixel((0, 0)) == (0xFC, 0xFC, 0xFA)  # --page
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(0x1D, 0x1F, 0x22), (0x60, 0x65, 0x6D), (0xDD, 0xDC, 0xD5), (0x2A, 0x63, 0xA5)} <= colours
    assert not {colour for colour in colours if max(colour) <= 7}  # none of THEME is left


def test_the_image_of_a_plot_has_its_title_and_caption() -> None:
    plot = draw_lengths({"SFT": [3, 4]})[0]
    assert plot.figure is not None
    height = Image.open(io.BytesIO(plot._replace(caption="Short.")._repr_png_())).height
    assert Image.open(io.BytesIO(plot._repr_png_())).height > height
    assert plot.figure.axes[0].get_title(loc="left") == plot.title
    assert " ".join(plot.figure.get_supxlabel().split()) == plot.caption
    assert Plot("Loss", "Should fall.", "<svg/>")._repr_png_() is None
    assert repr(plot) == f"Plot({plot.title!r}, {plot.caption!r})"


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


def test_rewards_are_drawn_as_shares_in_equal_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = painted(monkeypatch, plots)
    draw_rewards({"sft": [0.0, 0.0, 4.0, NAN], "ppo": [2.05, 4.0], "none": []})
    assert [patch.get_label() for patch in axes.patches] == ["sft", "ppo"]
    sft, ppo = ({round(x, 6): y for x, y in patch.get_xy() if y} for patch in axes.patches)
    assert sft == pytest.approx({0.0: 2 / 3, 0.1: 2 / 3, 3.9: 1 / 3, 4.0: 1 / 3})
    assert ppo == pytest.approx({2.0: 1 / 2, 2.1: 1 / 2, 3.9: 1 / 2, 4.0: 1 / 2})


def test_the_critic_s_curves_are_drawn() -> None:
    values = {"loss/value_avg": 0.5, "val/explained_variance": 0.2, "learning_rate": 1e-3}
    log = [{"step": step, "objective/kl": 0.1} | values for step in (1, 2, 3)]
    titles = [plot.title for plot in draw_curves("ppo", log)]
    assert titles[-3:] == ["Value loss", "Explained variance", "Learning rate"]
