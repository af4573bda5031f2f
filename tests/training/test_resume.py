"""A run that was killed or stopped goes on as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_ext.checkpoint.manifest import find_checkpoints
from megatron_ext.checkpoint.storage import INDEX
from megatron_ext.training.status import read_status
from tests.checkpoint.folders import seal
from tests.conftest import environment, launch, metrics, pretrain

NUMBERS = ("step", "loss", "grad_norm", "lr", "validation_loss")


def numbers(run_dir: Path) -> list[tuple]:
    return [tuple(record.get(name) for name in NUMBERS) for record in metrics(run_dir)]


def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        launch(*arguments, processes=processes),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    """Until metrics.jsonl tells of the step; fails when the process ends before."""
    file = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.is_file() and f'"step": {step},' in file.read_text()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"no step {step} within 120 s"
        time.sleep(0.005)


def kill_all(process: subprocess.Popen) -> str:
    """SIGKILL to the launcher and every worker: no one can tidy up. Returns what they printed."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    return process.communicate(timeout=60)[0]


# A long run at a constant rate, so that the kill comes before the end however fast the machine is.
LONG = ["training.steps=400", "schedule.type=constant", "checkpoint.interval=10"]


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (1, []),
        # Two processes with the distributed optimizer: tests/chaos.
        pytest.param(1, ["precision.dtype=bf16"], marks=pytest.mark.slow),
        pytest.param(4, ["parallel.tensor=2", "parallel.pipeline=2"], marks=pytest.mark.slow),
    ],
    ids=["one process", "bf16", "tensor and pipeline"],
)
def test_killed_run_repeats_the_same_losses_bit_for_bit(
    processes: int, settings: list[str], config_file: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = [config_file, *LONG, *settings]
    # Both are ended by a signal some time after step 25, the first one in order.
    uninterrupted = start(*common, f"training.run_dir={whole}", processes=processes)
    wait_for_step(uninterrupted, whole, 35)
    kill_all(uninterrupted)

    first = start(*common, f"training.run_dir={killed}", processes=processes)
    wait_for_step(first, killed, 13)
    kill_all(first)
    second = start(*common, f"training.run_dir={killed}", processes=processes)
    wait_for_step(second, killed, 35)
    assert "resuming after step 10" in kill_all(second)

    assert numbers(killed)[:35] == numbers(whole)[:35]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals, config_file: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(config_file, *LONG)
    wait_for_step(process, run_dir, 3)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert f"stopped by {number.name}" in printed
    stopped_at = metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{stopped_at:08d}" / "manifest.json").is_file()
    status = read_status(run_dir)
    assert (status["state"], status["requeue"], status["step"]) == ("stopped", True, stopped_at)
    assert status["reason"].startswith(f"stopped by {number.name} after step")

    again = start(config_file, *LONG)
    wait_for_step(again, run_dir, stopped_at + 2)
    assert f"resuming after step {stopped_at}" in kill_all(again)
    steps = [record["step"] for record in metrics(run_dir)]
    assert steps == list(range(1, len(steps) + 1))


def test_checkpoint_of_another_kind_of_device_is_gone_on_from(
    config_file: Path, tmp_path: Path
) -> None:
    """Which has other generators: none of this name, or one with a state of another size."""
    run_dir, few = tmp_path / "run", ["training.steps=4", "checkpoint.interval=2"]
    pretrain(config_file, *few)
    whole = numbers(run_dir)
    newest, older = find_checkpoints(run_dir)
    shutil.rmtree(newest)
    index = json.loads((older / INDEX).read_bytes())
    tracker = next(key for key in index if key.startswith("rng.00000.tracker."))
    index[tracker]["shape"] = [16]
    del index["rng.00000.numpy"]
    (older / INDEX).write_text(json.dumps(index))
    seal(older)
    printed = pretrain(config_file, *few)
    assert "resuming after step 2" in printed
    assert f"begin anew: rng.00000.numpy, {tracker} came from another kind" in printed
    assert numbers(run_dir) == whole


def test_signal_to_the_whole_process_group_spares_the_loader(
    config_file: Path, tmp_path: Path
) -> None:
    """Slurm's time limit and `timeout` signal every process, loader workers too."""
    process = subprocess.Popen(
        launch(config_file, *LONG, "data.num_workers=1"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(process, tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert "stopped by SIGTERM" in printed
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"))


def test_error_on_one_rank_ends_all(config_file: Path) -> None:
    # Every step is skipped, so rank 0 and 1 both stop with the verdict; nobody waits.
    started = time.monotonic()
    settings = ["model.init_std=1e30", "faults.max_consecutive_skips=1"]
    printed = pretrain(config_file, *settings, processes=2, code=1)
    assert "2 steps in a row had a non-finite loss" in printed
    assert time.monotonic() - started < 120


def test_damaged_newest_checkpoint_is_named_and_the_older_one_used(
    config_file: Path, tmp_path: Path
) -> None:
    common = [config_file, "checkpoint.interval=10"]
    pretrain(*common)
    shard = next((tmp_path / "run/checkpoints/step_00000020").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found = f"{shard} has the right size but not the content that was written"
    printed = pretrain(*common, "checkpoint.on_damage=refuse", code=2)
    assert f"error: {found}; checkpoint.on_damage=refuse" in printed
    printed = pretrain(*common)
    assert found in printed
    assert "resuming after step 10" in printed


def test_refused_resume_leaves_the_run_folder_as_it_was(config_file: Path, tmp_path: Path) -> None:
    pretrain(config_file, "training.steps=2")
    before = content(tmp_path / "run")
    # torchrun makes 1 of every exit code: status.json tells a launcher what it was.
    refused = ["training.steps=2", "training.seed=7"]
    printed = pretrain(config_file, *refused, processes=2, code=1)
    assert printed.count("data.seed: 1234 -> 7") == 1
    status = read_status(tmp_path / "run")
    assert (status["state"], status["requeue"]) == ("failed", False)
    assert "data.seed: 1234 -> 7" in status["reason"]
    assert before == content(tmp_path / "run")
    printed = pretrain(config_file, *refused, "checkpoint.on_data_change=allow")
    assert "not what the checkpoint was trained on: data.seed: 1234 -> 7" in printed
    assert "resuming after step 2" in printed


def content(run_dir: Path) -> dict[Path, bytes]:
    """What the run's files hold, but for what tells of this very start."""
    told = {"status.json", "error.txt", "heartbeat"}
    files = [p for p in run_dir.rglob("*") if p.is_file()]
    return {p: p.read_bytes() for p in files if not told & set(p.relative_to(run_dir).parts)}


def test_weights_start_from_another_run(config_file: Path, tmp_path: Path) -> None:
    pretrain(config_file)
    fresh = tmp_path / "fine-tune"
    pretrain(
        config_file,
        f"training.init_from={tmp_path / 'run'}",
        f"training.run_dir={fresh}",
        "rope.base=1e6",
        "training.steps=2",
    )
    # A trained model starts far below ln(512) = 6.24.
    assert metrics(fresh)[0]["loss"] < 5.7


@pytest.mark.slow
def test_growing_batch_goes_on_where_it_was_stopped_by_the_clock(
    config_file: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [config_file, "training.rampup_batch_size=[2,2,20]", "training.steps=8"]
    pretrain(*common, f"training.run_dir={whole}")
    common.append(f"training.run_dir={parts}")
    # The time is up before the first step, so each start does one.
    for step in (1, 2):
        printed = pretrain(*common, "training.exit_duration_in_mins=0.001")
        assert f"stopped by training.exit_duration_in_mins after step {step}" in printed
    printed = pretrain(*common[:1], *common[2:], code=2)
    assert "data.rampup_batch_size: [2, 2, 20] -> nothing" in printed
    pretrain(*common)
    assert numbers(parts) == numbers(whole)
    # A third of the 20 samples by 2, by 4 and by 6, then 8; each has 64 tokens.
    tokens = [record["tokens"] for record in metrics(parts) if "loss" in record]
    assert tokens == [64 * samples for samples in (2, 4, 6, 8, 12, 16, 22, 30)]
