"""The demo: its corpus, its manners when it is ended, and (slow) the whole of it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zstandard

from megatron_ext.errors import UserError
from megatron_ext.study.demo import run
from megatron_ext.study.demo_corpus import build_corpus, own_texts, standard_library
from tests.conftest import ROOT, metrics


def read(corpus: Path) -> list[dict]:
    with zstandard.open(corpus, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_the_library_is_enough_text_and_nothing_installed() -> None:
    documents = standard_library()
    assert sum(len(d["text"].encode()) for d in documents) >= 8_000_000
    for document in documents:
        assert set(document) == {"text", "meta"}
        assert document["text"].strip()
        assert "-packages" not in document["meta"]["path"]
    paths = [d["meta"]["path"] for d in documents]
    assert len(set(paths)) == len(paths)
    assert {"help/for", "argparse.py"} <= set(paths)


def test_the_corpus_is_the_same_each_time_and_made_once(tmp_path: Path) -> None:
    first, second = tmp_path / "a/corpus.jsonl.zst", tmp_path / "b/corpus.jsonl.zst"
    facts = build_corpus(first)
    build_corpus(second)
    assert first.read_bytes() == second.read_bytes()
    documents = read(first)
    assert facts["documents"] == len(documents)
    assert facts["bytes"] == sum(len(d["text"].encode()) for d in documents)
    written = first.stat().st_mtime_ns
    assert build_corpus(first)["reused"]
    assert first.stat().st_mtime_ns == written


def test_own_texts_of_several_kinds_are_read(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/book.txt").write_text("a long book")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    line = json.dumps({"text": "a document", "meta": {}}).encode() + b"\n"
    (tmp_path / "red.jsonl.zst").write_bytes(zstandard.compress(line * 2))
    texts = [document["text"] for document in own_texts(tmp_path)]
    assert sorted(texts) == ["a document", "a document", "a long book"]


def test_mistakes_about_the_corpus_are_refused(tmp_path: Path) -> None:
    output, own = tmp_path / "data/corpus.jsonl.zst", tmp_path / "own.txt"
    with pytest.raises(UserError, match=r"own\.txt does not exist: name a file or a folder"):
        build_corpus(output, own)
    own.write_text("too little")
    with pytest.raises(UserError, match="holds 10 bytes of text, less than the 1,000,000"):
        build_corpus(output, own)
    assert not output.parent.exists()
    own.write_text("enough " * 150_000)
    build_corpus(output, own)
    with pytest.raises(UserError, match=r"made from .*own\.txt, not from standard library"):
        build_corpus(output)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ended_it_leaves_no_command_running(tmp_path: Path, how: signal.Signals) -> None:
    if how == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a child of its parent's death")
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));"
    code = f"""
import signal, sys
from megatron_ext.study.demo import run
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.default_int_handler)
run(sys.executable, "-c", {sleeper + " time.sleep(60)"!r})
"""
    demo = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    _wait(lambda: pid.is_file() and pid.read_text() != "")
    demo.send_signal(how)
    demo.wait(30)
    _wait(lambda: not _alive(int(pid.read_text())))


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "megatron_ext.study.demo", "--output", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(r"error: another demo is writing into .*\n", done.stderr)


@pytest.mark.parametrize(("given", "used"), [("1", "1"), (None, "2")])
def test_threads_that_the_user_set_are_left_alone(
    given: str | None, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    write = f"import os; open({str(tmp_path / 'n')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    run(sys.executable, "-c", write)
    assert (tmp_path / "n").read_text() == used


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_ext.study.demo", "--output", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "CORPUS"}
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("already done") == 4  # tokenizer, token files, two trainings
    assert f"The report: {tmp_path / 'report.html'}" in done.stdout
    for name in ("below", "above"):
        losses = [r["validation_loss"] for r in metrics(tmp_path / name) if "validation_loss" in r]
        assert losses[-1] < 0.6 * math.log(2048)
        assert (tmp_path / name / "evaluation/perplexity.json").is_file()


def _alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _wait(happened) -> None:
    for _ in range(300):
        if happened():
            return
        time.sleep(0.1)
    raise AssertionError("waited 30 seconds in vain")
