"""`tokenize` killed anywhere and started again, and beside other commands."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.errors import UserError
from data_tools.files import write_json
from data_tools.merge import merge
from data_tools.options import Options
from data_tools.tokenization import tokenize
from data_tools.verification import verify

from .conftest import (
    flip_a_bit,
    outputs,
    write_jsonl,
)

SMALL = Options(part_bytes=4096)


class Killed(BaseException):
    """Stands for a killed process: nothing may catch it and tidy up into a whole result."""


def test_stopped_at_any_file_operation_it_goes_on(
    reference: Path, texts: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename, truncation, removal and fsync in turn is the last thing that happens."""
    monkeypatch.setattr("data_tools.assembly.COMMIT_S", 0.0)
    monkeypatch.setattr("data_tools.shares._SMALL_BYTES", 0)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_jsonl(tmp_path / "a-c4.jsonl", texts[:150])
    write_jsonl(tmp_path / "b-c4.jsonl.gz", texts[150:220])
    table = pyarrow.table({"text": texts[220:]})
    parquet.write_table(table, tmp_path / "c-c4.parquet", row_group_size=20)
    options = Options(part_bytes=32_000)
    real = {name: getattr(os, name) for name in ("replace", "truncate", "unlink", "fsync", "rmdir")}
    left = [0]

    def wrap(name: str, before: bool):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and before:
                raise Killed
            result = real[name](*args, **kwargs)
            if left[0] == 0:
                raise Killed
            return result

        return call

    stops = 0
    for before in (True, False):
        for name in real:
            monkeypatch.setattr(os, name, wrap(name, before))
        step = 1
        while True:
            prefix = tmp_path / f"out-{before}-{step}"
            left[0] = step
            try:
                tokenize([str(tmp_path / "*c4*")], model, prefix, options)
            except Killed:
                stops += 1
                left[0] = -1
                tokenize([str(tmp_path / "*c4*")], model, prefix, options)
                assert outputs(prefix) == outputs(reference / "out"), step
                assert verify(prefix) == []
                step += 7 if step > 12 else 1
            else:
                break
    assert stops > 15


RUN = """
import sys
from pathlib import Path
import data_tools.assembly, data_tools.shares
data_tools.assembly.COMMIT_S = 0.02
data_tools.shares._SMALL_BYTES = 0
from data_tools.options import Options
from data_tools.tokenization import tokenize
folder, model, workers = sys.argv[1:]
tokenize([folder], model, Path(folder, "out"), Options(part_bytes=20_000), workers=int(workers))
"""


def kill_and_resume(kills: int, texts: list[str], model: str, tmp_path: Path, whole: Path) -> int:
    """Kill runs at random moments until there were `kills`; every result must be the whole one."""
    rng = random.Random(kills)
    done = runs = 0
    while done < kills:
        runs += 1
        folder = tmp_path / f"run{runs}"
        folder.mkdir()
        write_jsonl(folder / "a-c4.jsonl", texts[: len(texts) // 2])
        write_jsonl(folder / "b-c4.jsonl.zst", texts[len(texts) // 2 :])
        command = [sys.executable, "-c", RUN, str(folder), model, str(1 + runs % 3)]
        patience = 0.3
        while True:
            # Later kills come later, so that a slow machine gets past its start-up.
            patience *= 1.2
            limit = rng.uniform(0.2, 1.0) + patience if done < kills else None
            process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
            try:
                _, errors = process.communicate(timeout=limit)
                assert process.returncode == 0, errors.decode()
                break
            except subprocess.TimeoutExpired:
                # Half of the time only the parent dies and the workers are orphans for a moment.
                if rng.random() < 0.5:
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                done += 1
        assert outputs(folder / "out") == outputs(whole)
        assert verify(folder / "out") == []
        assert not (folder / "out.work").exists()
    return runs


def many(texts: list[str], times: int) -> list[str]:
    return [f"{i} {text}" for i in range(times) for text in texts]


def test_killed_and_started_again_the_bytes_are_the_same(
    texts: list[str], model: str, tmp_path: Path
) -> None:
    lots = many(texts, 4)
    write_jsonl(tmp_path / "c4.jsonl", lots)
    tokenize([str(tmp_path / "c4.jsonl")], model, tmp_path / "whole")
    kill_and_resume(4, lots, model, tmp_path, tmp_path / "whole")


@pytest.mark.slow
def test_fifty_kills(texts: list[str], model: str, tmp_path: Path, capsys) -> None:
    lots = many(texts, 40)
    write_jsonl(tmp_path / "c4.jsonl", lots)
    tokenize([str(tmp_path / "c4.jsonl")], model, tmp_path / "whole")
    runs = kill_and_resume(60, lots, model, tmp_path, tmp_path / "whole")
    with capsys.disabled():
        print(
            f"\n60 kills over {runs} runs of {len(lots):,} documents: every result byte-identical"
        )


# A worker kills itself at its eighth part. In a process of its own, as only a process without other
# threads forks its workers, and the changed function with them.
DIE = """
import os, signal, sys
import data_tools.workers
real = data_tools.workers.encode_part
def die(part, options, worker):
    if part.number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(part, options, worker)
data_tools.workers.encode_part = die
from data_tools.options import Options
from data_tools.tokenization import tokenize
tokenize([sys.argv[1]], sys.argv[2], sys.argv[3], Options(part_bytes=4096), workers=2)
"""


def dying_run(reference: Path, model: str, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DIE, str(reference / "c4.jsonl"), model, str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_dead_worker_ends_the_run_and_nothing_is_lost(
    reference: Path, model: str, tmp_path: Path
) -> None:
    ended = dying_run(reference, model, tmp_path / "out")
    assert ended.returncode == 1
    assert "worker process died" in ended.stderr
    assert not (tmp_path / "out.bin").exists()
    tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", SMALL, workers=2)
    assert outputs(tmp_path / "out") == outputs(reference / "out")


def test_a_part_torn_by_a_power_cut_is_encoded_again(
    reference: Path, model: str, tmp_path: Path
) -> None:
    ended = dying_run(reference, model, tmp_path / "out")
    assert ended.returncode == 1
    parts = sorted((tmp_path / "out.work" / "parts").glob("*.part"))
    assert parts
    flip_a_bit(parts[-1], at=10)  # size and trailer are as they were
    tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", SMALL)
    assert outputs(tmp_path / "out") == outputs(reference / "out")


def test_two_commands_on_one_output_are_refused(
    texts: list[str], model: str, tmp_path: Path
) -> None:
    import fcntl

    source = write_jsonl(tmp_path / "x.jsonl", texts[:5])
    (tmp_path / "out.work").mkdir()
    with open(tmp_path / "out.work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another data-tools"):
            tokenize([str(source)], model, tmp_path / "out")


def test_a_file_system_without_locks_is_named_as_such(
    texts: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    source = write_jsonl(tmp_path / "x.jsonl", texts[:5])
    monkeypatch.setattr(fcntl, "flock", refuse)
    tokenize([str(source)], model, tmp_path / "out")
    message = capsys.readouterr().err
    assert "cannot lock files (No locks available)" in message and "another data-" not in message
    assert verify(tmp_path / "out") == []


def test_finished_leaves_the_work_of_others_alone(
    texts: list[str], model: str, tmp_path: Path
) -> None:
    import fcntl

    source = write_jsonl(tmp_path / "x.jsonl", texts[:5])
    first = tokenize([str(source)], model, tmp_path / "out")
    work = tmp_path / "out.work"
    work.mkdir()
    write_json(work / "plan.json", {"inputs": "others"})
    assert tokenize([str(source)], model, tmp_path / "out")["reused"]
    assert (work / "plan.json").exists()
    write_json(work / "plan.json", first["wanted"])
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert tokenize([str(source)], model, tmp_path / "out")["reused"]
        assert (work / "plan.json").exists()
    assert tokenize([str(source)], model, tmp_path / "out")["reused"]
    assert not work.exists()


def test_what_versions_divide_otherwise_is_not_put_together(
    reference: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = [str(reference / "c4.jsonl")]
    for i in range(2):
        monkeypatch.setattr("data_tools.options.DIVISION", i)
        tokenize(source, model, tmp_path / f"t{i}", Options(task=(i, 2)))
    with pytest.raises(UserError, match="different options"):
        merge([str(tmp_path / "t0"), str(tmp_path / "t1")], tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        tokenize(source, model, tmp_path / "t0", Options(task=(0, 2)))
