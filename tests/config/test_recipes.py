"""A recipe is found by name or path, and needs only the stages that it changes."""

from pathlib import Path

import pytest

from pipeline import config
from pipeline.config.recipes import read_stage_file
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(**texts: str) -> None:
    """Write files, named with __ for the slash."""
    for name, text in texts.items():
        path = Path(name.replace("__", "/") + ".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def refused(path: str) -> str:
    with pytest.raises(UserError) as error:
        config.load(Path(path).stem, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_stage_without_a_file_is_that_of_the_recipe_which_is_extended() -> None:
    write(mine__recipe="extends: demo", mine__ppo="extends: demo\ntraining: {kl_coef: 0.3}")
    for stage in config.STAGES:
        loaded, shipped = (
            config.load(stage, folder / f"{stage}.yaml", run="mine")
            for folder in (Path("mine"), config.RECIPES / "demo")
        )
        if stage == "ppo":
            assert loaded.training == shipped.training | {"kl_coef": 0.3}
        else:
            assert loaded.resolved() == shipped.resolved()
        assert (loaded._recipe, loaded.command) == ("mine", "rlhf run --recipe mine")
    assert config.load("sft", "mine/sft.yaml").run == "mine"


def test_a_recipe_extends_one_of_the_user_which_extends_another() -> None:
    write(
        base__prepare="source: {format: rankings, path: '${recipe}/answers.csv'}",
        base__recipe="extends: demo",
        mine__recipe="extends: ../base",
    )
    (path,) = [source.path for source in config.load("prepare", "mine/prepare.yaml").source]
    assert Path(path) == Path("base/answers.csv")
    assert config.find_stage_file(Path("mine/sft.yaml")) == config.RECIPES / "demo" / "sft.yaml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: dmo", "mine/recipe.yaml: extends=dmo: no such recipe; did you mean 'demo'?"),
        ("extends: ../base/sft.yaml", "mine/recipe.yaml: extends=../base/sft.yaml: no such recipe"),
        ("extends: [demo]", "mine/recipe.yaml: extends=['demo']: expected the path"),
        ("extends: demo\nseed: 3", "expected one key, such as extends: demo, found extends, seed"),
        ("", "expected one key, such as extends: demo, found none"),
        ("extends: .", "mine/recipe.yaml: extends itself, by way of ."),
        ("extends: ../base", "base/recipe.yaml: extends itself, by way of ../mine"),
        (
            "extends: minilm",
            "minilm/sft.yaml: no such config file; write it, or name a recipe that has it in",
        ),
    ],
)
def test_a_wrong_recipe_file_is_one_line(text: str, expected: str) -> None:
    write(mine__recipe=text, base__recipe="extends: ../mine", base__reward="model: a")
    assert expected in refused("mine/sft.yaml")


def test_without_a_recipe_file_each_stage_needs_its_own() -> None:
    write(mine__ppo="")
    assert config.load("ppo", "mine/ppo.yaml").run == "mine"
    assert refused("mine/sft.yaml") == (
        "mine/sft.yaml: no such config file; write it, or name a recipe that has it in mine/recipe.yaml, "
        "such as extends: demo"
    )
    assert refused("none/sft.yaml") == "none/sft.yaml: no such config file"


def test_a_folder_without_stages_does_not_hide_a_shipped_recipe() -> None:
    Path("demo").mkdir()
    assert config.find_recipe("demo") == config.RECIPES / "demo"
    write(demo__ppo="")
    assert config.find_recipe("demo") == Path("demo")
    for name in ("", "accelerate", "schemas", "dem"):
        with pytest.raises(UserError, match="no such recipe"):
            config.find_recipe(name)


def test_the_shipped_recipes_are_those_with_every_stage() -> None:
    assert {"demo", "grpo", "rloo", "toxicity"} <= set(config.recipes())
    assert {"minilm", "accelerate", "schemas"}.isdisjoint(config.recipes())
    assert config.find_recipe("minilm") == config.RECIPES / "minilm"
    assert read_stage_file(config.RECIPES / "grpo" / "ppo.yaml")["training"]["num_iterations"] == 4  # of rloo
