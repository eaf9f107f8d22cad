"""The README and the pages of docs/: every command parses, every example runs, every link leads somewhere,
every page is in the menu.
"""

import re
import shlex
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pipeline import config
from pipeline.cli import main
from pipeline.cli.parser import parse
from pipeline.config.prepare import Format
from pipeline.data.shapes.table import SHAPES

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
DRY_RUN = {"run", *config.STAGES}  # the commands that take --dry-run; the others are only parsed
NOT_OURS = {"vllm", "text-embeddings-router", "tensorboard"}
SIZES = {
    "num_rollouts=50": "num_rollouts=1",
    "per_device_train_batch_size=16": "per_device_train_batch_size=2",
    "tokens=48": "tokens=4",
}


def blocks(page, language):
    return [text for found, text in FENCE.findall(PAGES[page]) if found == language]


def prose(page):
    return FENCE.sub("", PAGES[page])


def per_page(find):
    """A parameter for each distinct thing that `find` returns, under the first page that has it."""
    first = {}
    for page in PAGES:
        for thing in find(page):
            first.setdefault(thing, page)
    return [pytest.param(thing, id=f"{page}: {thing}") for thing, page in first.items()]


LOOP = re.compile(r"^for (\w+) in (.*); do\n(.*?)^done$", re.M | re.S)


def expand_loops(text):
    """Replace each shell loop by its commands, once for each value."""
    while loop := LOOP.search(text):
        name, values, body = loop.groups()
        turns = "".join(body.replace(f"${name}", value) for value in values.split())
        text = text[: loop.start()] + turns + text[loop.end() :]
    return text


def commands_of(page):
    return [
        line.strip()
        for text in blocks(page, "bash")
        for line in expand_loops(text).splitlines()
        if line and not line.startswith("#")
    ]


def inline_of(page):
    return re.findall(r"`((?:make|rlhf) [^`…<]+)`", prose(page))


def words_of(command):
    """The words without the variables in front."""
    words = shlex.split(command)
    while "=" in words[0]:
        words = words[1:]
    return words


def arguments_of(command):
    """What the command hands to `pipeline.cli`; None if it is not this project's."""
    words = words_of(command)
    if words[0] == "accelerate":
        return words[words.index("pipeline") + 1 :]
    return words[1:] if words[0] == "rlhf" else None


def is_dry_runnable(command):
    arguments = arguments_of(command)
    return bool(arguments) and arguments[0] in DRY_RUN and "--inspect" not in arguments


# Commands


@pytest.mark.parametrize("command", per_page(lambda page: [c for c in commands_of(page) if arguments_of(c)]))
def test_each_command_is_understood(command):
    arguments = shlex.split(command, comments=True)
    arguments = arguments_of(shlex.join(arguments[: arguments.index(">")] if ">" in arguments else arguments))
    assert parse(arguments).command == arguments[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the checkout's configs, and with the recipes that the pages write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in {c for page in PAGES for c in commands_of(page) if c.startswith("rlhf init ")}:
            assert main(arguments_of(command)) == 0
    return folder


@pytest.mark.parametrize("command", per_page(lambda page: filter(is_dry_runnable, commands_of(page))))
def test_each_stage_accepts_its_settings(command, checkout, capsys, monkeypatch):
    monkeypatch.chdir(checkout)
    arguments = arguments_of(command)
    assert main([*arguments, *(["--dry-run"] if "--dry-run" not in arguments else [])]) == 0
    assert "would write runs/" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    per_page(lambda page: [c for c in commands_of(page) + inline_of(page) if c.startswith("make ")]),
)
def test_each_make_target_exists(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "command", per_page(lambda page: [c for c in inline_of(page) if c.startswith("rlhf ")])
)
def test_each_command_in_a_sentence_exists(command):
    with pytest.raises(SystemExit) as done:
        parse([shlex.split(command)[1], "--help"])
    assert done.value.code == 0


@pytest.mark.parametrize(
    "command",
    per_page(
        lambda page: [
            c for c in commands_of(page) if not arguments_of(c) and words_of(c)[0] not in {"make", *NOT_OURS}
        ]
    ),
)
def test_each_script_exists(command):
    words = words_of(command)
    assert (ROOT / words[words[0] == "python"]).is_file()


def test_the_loops_of_the_pages_are_shell(tmp_path):
    """bash runs the commands into which `commands_of` expands a loop."""
    loops = [text for page in PAGES for text in blocks(page, "bash") if LOOP.search(text)]
    assert loops
    for text in loops:
        script = f'rlhf() {{ echo "rlhf $*"; }}\n{text}'
        done = subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        expanded = [" ".join(line.split()) for line in expand_loops(text).splitlines() if line]
        assert done.stdout.splitlines() == expanded


def test_a_bare_make_lists_the_targets():
    listed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in (
        "setup",
        "run",
        "prepare|sft|reward|ppo|evaluate",
        "test",
        "test-gpu",
        "lint",
        "docs",
        "models/smollm2",
        "clean",
    ):
        assert re.search(rf"^{re.escape(target)} ", listed, re.M), target


# Data and Python


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "json") and page != "docs/data-shapes.md"]
)
def test_three_lines_are_enough_to_prepare(page, tmp_path):
    from pipeline.prepare import stage as prepare

    (tmp_path / "pairs.jsonl").write_text(blocks(page, "json")[0])
    given = [f"source.path={tmp_path / 'pairs.jsonl'}", f"runs={tmp_path}"]
    folder = prepare.run(config.load("prepare", ROOT / "configs/smollm2/prepare.yaml", given))
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"comparisons", "demonstrations", "prompts"}


def test_the_named_formats_are_all_formats():
    formats = set(get_args(Format)) - SHAPES.keys()  # tests/data/test_shapes.py has the shapes
    named = re.search(r"picks the reader: (.*)\.", PAGES["docs/data.md"]).group(1)
    assert set(re.findall(r"`(\w+)`", named)) == formats
    assert {
        row for row in re.findall(r"^\| `(\w+)` \|", PAGES["docs/data.md"], re.M) if row in formats
    } == formats


@pytest.mark.parametrize("page", ["README.md", "docs/reward-models.md"])
def test_the_named_objectives_are_all_objectives(page):
    table = prose(page).partition("| `objective` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(config.OBJECTIVES)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_records, tiny_gpt2):
    """A folder with runs/demo/prepare, sft and reward, runs/sums/reward, and the policy beside it."""
    from datasets import Dataset, DatasetDict

    from pipeline.reward import stage as reward

    folder = tmp_path_factory.mktemp("place")
    (folder / "runs" / "demo").mkdir(parents=True)
    (folder / "runs" / "demo" / "prepare").symlink_to(tiny_records)
    (folder / "runs" / "demo" / "sft").symlink_to(tiny_gpt2)
    training = {"max_steps": 1, "per_device_train_batch_size": 2}
    given = {"model": str(tiny_gpt2), "records": str(tiny_records), "max_length": 64, "training": training}
    reward.run(config.RewardStage(run="demo", runs=str(folder / "runs"), precision="fp32", **given))

    steps = [{"prompt": "7+5=", "completions": ["7+5=2"], "labels": [right]} for right in (True, False)]
    records = DatasetDict({name: Dataset.from_list(steps) for name in ("train", "validation", "test")})
    records.save_to_disk(folder / "steps")
    given |= {"records": str(folder / "steps"), "encoding": {"step_separator": " "}, "objective": "stepwise"}
    reward.run(config.RewardStage(run="sums", runs=str(folder / "runs"), precision="fp32", **given))
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_each_page_runs(page, place, tiny_gpt2, tiny_tokenizer, monkeypatch):
    from datasets import Dataset

    from pipeline.models.loading import load_policy

    monkeypatch.chdir(place)
    prompts = Dataset.from_list([{"prompt": "Hello."}] * 2)
    known = {
        "policy": load_policy(str(tiny_gpt2), tiny_tokenizer),
        "tokenizer": tiny_tokenizer,
        "prompts": prompts,
    }
    for code in blocks(page, "python"):
        if "PPOConfig(" in code:
            for large, small in SIZES.items():
                assert large in code
                code = code.replace(large, small)
        exec(code, known)
    if "PPOTrainer" in known:
        assert (place / "out").is_dir()
    if "rm" in known:
        assert known["rm"].score(["Name a fruit."], ["An apple."]) == [
            known["rm"].score_response("Name a fruit.", "An apple.")
        ]
    if "step_rm" in known:
        expected = known["step_rm"].score_steps([known["chain"]], [known["steps"]])[0]
        assert known["step_scores"] == pytest.approx(expected, abs=1e-5)


# Size, links, menu


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1300


def anchors(page):
    """The anchors of a page's headings, if GitHub and MkDocs agree on them."""
    for heading in re.findall(r"^#+ (.*)", prose(page), re.M):
        word = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        if word.isascii() and "  " not in word:
            yield word.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_each_file_that_is_named_exists(page):
    folders = "tests|configs|scripts|notebooks|benchmarks"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*\w\.\w+)`", prose(page)):
        assert (ROOT / name).is_file(), f"{page}: {name}"


def test_the_menu_of_the_site_names_every_page():
    """The pages that docs/ does not hold are made of files of the root, as docs/hooks.py has it."""
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def pages(entry):
        return (
            [entry]
            if isinstance(entry, str)
            else [page for value in entry.values() for part in _list(value) for page in pages(part)]
        )

    named = [page for entry in menu for page in pages(entry)]
    from_root = {
        "index.md": "README.md",
        "contributing.md": "CONTRIBUTING.md",
        "changelog.md": "CHANGELOG.md",
    }
    assert len(set(named)) == len(named)
    assert set(named) == {page.removeprefix("docs/") for page in PAGES if page != "README.md"} | set(
        from_root
    )
    for page, source in from_root.items():
        assert (ROOT / source).is_file()
        assert not (ROOT / "docs" / page).exists()
        assert f'"{source}": "{page}"' in (ROOT / "docs/hooks.py").read_text()


def _list(value):
    return value if isinstance(value, list) else [value]
