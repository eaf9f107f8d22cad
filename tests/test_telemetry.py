"""No library reports to its authors, unless the user says so."""

import json
import os
import subprocess
import sys

import pytest

ASK = """
import json, os, pipeline
from huggingface_hub import constants
from transformers.utils.hub import http_user_agent
said = constants.HF_HUB_DISABLE_TELEMETRY, "telemetry/off" in http_user_agent()
print(json.dumps([*said, os.environ["WANDB_ERROR_REPORTING"], os.environ["MLFLOW_DISABLE_TELEMETRY"]]))
"""


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, [True, True, "false", "true"]),
        (
            {
                "HF_HUB_DISABLE_TELEMETRY": "0",
                "WANDB_ERROR_REPORTING": "true",
                "MLFLOW_DISABLE_TELEMETRY": "false",
            },
            [False, False, "true", "false"],
        ),
    ],
)
def test_telemetry_is_off_and_a_user_s_own_value_wins(
    set_by_user: dict[str, str], expected: list[object]
) -> None:
    switches = (
        "HF_HUB_DISABLE_TELEMETRY",
        "WANDB_ERROR_REPORTING",
        "MLFLOW_DISABLE_TELEMETRY",
        "DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
    )
    offline = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    environment = {
        name: value for name, value in os.environ.items() if name not in (*switches, *offline)
    } | set_by_user
    answer = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(answer) == expected
