"""Signals before and after there is something to save."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import time
from megatron_ext.training.watch import StopSignals
with StopSignals() as signals:
    {hold}
    print("ready", flush=True)
    while not (signals.holding and signals.received):
        time.sleep(0.01)
    print("received", signals.received, flush=True)
    {after}
"""


def start(hold: str = "pass", after: str = "pass") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(hold=hold, after=after)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_while_starting_ends_the_process(name: str) -> None:
    process = start()
    process.send_signal(signal.Signals[name])
    printed, _ = process.communicate(timeout=30)
    assert (process.returncode, printed) == (0, f"stopped by {name} before the first step\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_while_training_is_remembered(name: str) -> None:
    process = start(hold="signals.hold()")
    process.send_signal(signal.Signals[name])
    printed, _ = process.communicate(timeout=30)
    assert (process.returncode, printed) == (0, f"received {name}\n")


def test_second_ctrl_c_ends_at_once() -> None:
    process = start(hold="signals.hold()", after="time.sleep(60)")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "received SIGINT\n"
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in printed
    assert process.returncode == -signal.SIGINT
