"""A signal always stops the command, whatever it interrupts."""

import argparse
import signal
import threading

import pytest

from pipeline import cli
from pipeline.cli import commands


class SignalledWhileDeleted:
    """Gets a signal in a place whose errors Python drops."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_an_object_is_deleted_is_not_lost(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(_: argparse.Namespace) -> None:
        SignalledWhileDeleted(number)
        threading.Event().wait(10)  # until the signal is raised again

    monkeypatch.setitem(commands.COMMANDS, "completion", command)
    assert cli.main(["completion", "bash"]) == code


def test_an_interrupt_beside_the_command_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    with pytest.raises(SystemExit) as left:
        cli.entry(["completion", "bash"])
    assert left.value.code == 130
    with pytest.raises(KeyboardInterrupt):
        cli.entry(["--debug", "completion", "bash"])
