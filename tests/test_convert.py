"""scripts/convert.py against conversions worked by hand."""

import importlib.util
import json
import subprocess
import sys

import pytest

from pipeline.config import RECIPES

SCRIPT = RECIPES.parent / "scripts" / "convert.py"
spec = importlib.util.spec_from_file_location("convert", SCRIPT)
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


@pytest.mark.parametrize(
    ("votes", "chosen"),
    [((1, 1, 2), "one"), ((2, 0, 2), "two"), ((0, 0, 1), None), ((0, 1, 2), None), ((2, 2, 2), "two")],
)
def test_pandalm_takes_what_most_annotators_prefer(votes, chosen):
    row = {"instruction": "Do.", "input": "x", "response1": "one", "response2": "two"}
    pair = convert.convert_pandalm(row | {f"annotator{n}": vote for n, vote in enumerate(votes, 1)})
    if chosen is None:
        assert pair is None
    else:
        rejected = "two" if chosen == "one" else "one"
        assert pair == {"prompt": "Do.\n\nx", "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("preference", "ranks"),
    [
        ([1, 1, 1, 1, 1, 1], [1, 2, 3, 4]),
        ([0, 1, 2, 1, 2, 2], [2, 2, 4, 1]),
        ([0, 0, 0, 0, 0, 0], [1, 1, 1, 1]),
        ([1, 2, 1, 1, 1, 1], None),  # 1 before 2 before 3 before 1
        ([0, 0, 1, 1, 1, 1], None),  # 1 equals 2 and 3, but 2 is before 3
    ],
)
def test_finegrained_qa_ranks_what_fits_one_order(preference, ranks):
    responses = [f"answer {number}" for number in (1, 2, 3, 4)]
    row = {"question": "Q?", "passages": [["title", "A.", "B."], ["t", "C."]], "preference": preference}
    row |= {f"prediction {number}": response for number, response in enumerate(responses, 1)}
    ranking = convert.convert_finegrained_qa(row)
    if ranks is None:
        assert ranking is None
    else:
        assert ranking == {"prompt": "A. B.\n\nC.\n\nQ?", "responses": responses, "ranks": ranks}


def test_another_file_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"a": 1}]))
    command = [sys.executable, SCRIPT, "pandalm", tmp_path / "x.json", tmp_path / "y"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'x.json'}: not a pandalm file: KeyError: 'annotator1'\n"
    assert not (tmp_path / "y").exists()
