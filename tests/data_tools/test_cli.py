"""The command line: exit codes, one-sentence refusals, quick start without heavy imports."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data_tools.cli import EXAMPLES, build_parser, main

from .conftest import write_jsonl

ROOT = Path(__file__).parents[2]


def test_every_command_has_help_with_an_example(capsys) -> None:
    for command in EXAMPLES:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"data-tools {command}" in capsys.readouterr().out.split("example")[1]


def test_examples_are_valid_commands() -> None:
    for text in EXAMPLES.values():
        for line in text.splitlines()[1:]:
            words = line.strip().split("| ")[-1].replace("'", "").split()
            if words[0] == "data-tools":
                build_parser().parse_args(words[1:])


TOKENIZE = ["tokenize", "{x}", "--tokenizer", "{model}", "--output", "{out}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokenize", "{none}", *TOKENIZE[2:]], "matches no file"),
        (["tokenize", "{empty}", *TOKENIZE[2:]], "holds no"),
        (["tokenize", "{x}", *TOKENIZE[1:]], "twice"),
        (["tokenize", "{x}", "--tokenizer", "{none}", "--output", "{out}"], "does not exist"),
        (["tokenize", "{x}", "--tokenizer", "{x}", "--output", "{out}"], "not a sentencepiece"),
        (["tokenize", "{x}", "--tokenizer", "{blank}", "--output", "{out}"], "not a sentencepiece"),
        (["tokenize", "{x}", "--tokenizer", "{json}", "--output", "{out}"], "not a Hugging Face"),
        ([*TOKENIZE[:5], "{x}/y/z"], "cannot be written"),
        ([*TOKENIZE, "--workers", "0"], "0"),
        ([*TOKENIZE, "--task", "3/3"], "3/3"),
        ([*TOKENIZE, "--task", "x"], "i/n"),
        ([*TOKENIZE, "--max-rejected", "2.5"], "share"),
        ([*TOKENIZE, "--min-tokens", "-1"], "negative"),
        ([*TOKENIZE, "--text-key", ""], "empty"),
        ([*TOKENIZE, "--eod-token", "<eod>"], "not in the vocabulary"),
        (["train-tokenizer", "{x}", "--vocab-size", "100", "--output", "{out}"], "300"),
        (
            ["train-tokenizer", "{x}", "--vocab-size", "90000", "--output", "{out}"],
            "more than this text",
        ),
        ([*TOKENIZE[:5], ""], "--output '' names no token files"),
        ([*TOKENIZE[:5], "."], "--output . is a folder: write the beginning of the files' names"),
        ([*TOKENIZE[:5], "{none}/"], "names no token files"),
        ([*TOKENIZE[:5], "{empty}"], "is a folder"),
        ([*TOKENIZE[:5], "{none}\udcff"], "not UTF-8"),
        (["merge", "{pair}", "--output", "{empty}"], "is a folder"),
        (["merge", "{pair}", "--output", "{out}", "--seed", "-1"], "--seed -1"),
        (["merge", "{pair}", "--output", "{out}", "--shard-tokens", "-5"], "--shard-tokens -5"),
        (["split", "{pair}", "--seed", "-1"], "--seed -1"),
        (["split", "{pair}", "--seed", f"{1 << 63}"], "2^63 - 1"),
        (["split", "{pair}", "--shares", "a/b=1"], "'a/b'"),
        (["split", "{pair}", "--shares", "=1"], "--shares names a set ''"),
        (["peek", "{pair}", "--sample", "-1"], "--sample -1 is negative"),
        (["peek", "{pair}", "--max-tokens", "-2"], "--max-tokens -2 is negative"),
        (["peek", "{pair}", "0", "--seed", "-1"], "--seed -1"),
        (["verify", "{pair}", "{none}"], "does not exist"),
        (["inspect", "{none}"], "does not exist"),
        (["inspect", ""], "names no token files"),
        (["inspect", "{lonely}"], "lonely.bin does not exist"),
        (["peek", "{lonely}", "--tokenizer", "{model}"], "lonely.bin does not exist"),
        *[
            ([*command.split(), *more], "made.receipt.json is not a receipt of token files")
            for command in (
                "inspect {made}",
                "peek {made}",
                "split {made}",
                "merge {made} --output {out}",
                "tokenize {x} --output {made}",
            )
            for more in [TOKENIZE[2:4] if command.startswith("tok") else []]
        ],
        (["lengths", "{none}", "--contexts", "many"], "numbers"),
        (["merge", "{none}", "--output", "{out}"], "matches none"),
        (["split", "{none}", "--shares", "x"], "NAME=SHARE"),
        (["download", "{none}", "--output", "{out}"], "cannot be read"),
        (["dedup", "-", "--report", "{out}", "--output", "{out}-clean"], "twice"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(
    model: str, reference: Path, tmp_path: Path, capsys, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("lonely", "made"):
        shutil.copy(f"{reference}/out.idx", tmp_path / f"{name}.idx")
    (tmp_path / "made.receipt.json").write_text('{"format": 1, "kind": "tokens"}')
    before = sorted(tmp_path.iterdir())
    names = {
        "model": model,
        "x": write_jsonl(tmp_path / "x.jsonl", ["some text"] * 3),
        "none": tmp_path / "none",
        "out": tmp_path / "out",
        "pair": reference / "out",
        "lonely": tmp_path / "lonely",
        "made": tmp_path / "made",
        "empty": tmp_path / "empty",
        "blank": tmp_path / "blank",
        "json": tmp_path / "tokenizer.json",
    }
    assert main([argument.format(**names) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1 and "Traceback" not in message
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "x.jsonl"])


@pytest.mark.parametrize(
    "arguments", [[], ["tokenise"], ["tokenize", "x", "--workers", "two"], ["inspect", "--al", "x"]]
)
def test_a_misspelt_request_is_one_sentence_too(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.endswith("--help)\n")


def test_a_full_disk_is_named(reference: Path, tmp_path: Path, capsys) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert main(["merge", str(reference / "out"), "--output", str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == f"data-tools merge: File too large ({tmp_path}/out)\n"


def test_nothing_heavy_is_imported(model: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["some text"])
    script = (
        "import sys\n"
        "from data_tools.cli import main\n"
        f"assert main(['tokenize', {str(source)!r}, '--tokenizer', {model!r}, "
        f"'--output', {str(tmp_path / 'out')!r}, '--workers', '1']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'megatron', 'megatron_ext', 'pyarrow',"
        " 'scipy', 'scipy.linalg')"
        " if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == b"[]"


def test_the_demo_commands(tmp_path: Path, capsys) -> None:
    library = Path(subprocess.__file__).read_text()
    files = [str(write_jsonl(tmp_path / "x.jsonl", [library[i::7] for i in range(7)]))]
    model, corpus = str(tmp_path / "data/tokenizer.model"), str(tmp_path / "data/corpus")
    for done in ("written", "already done"):
        assert main(["train-tokenizer", *files, "--vocab-size", "500", "--output", model]) == 0
        assert done in capsys.readouterr().out
        assert (
            main(["tokenize", *files, "--tokenizer", model, "--output", corpus, "--append-eod"])
            == 0
        )
        assert done in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "made", "message"),
    [
        (
            ["tokenize", "-", "--tokenizer", "{model}", "--output", "out", "--quiet"],
            "out.work/parts",
            "interrupted: the same command goes on where it was\n",
        ),
        (["dedup", "-", "--report", "out"], ".out.lock", "interrupted\n"),
    ],
)
def test_interrupted_by_a_signal_it_says_whether_it_goes_on(
    model: str, tmp_path: Path, command: list[str], made: str, message: str
) -> None:
    # Standard input that does not end: the signal finds the command at work on any machine.
    words = [word.format(model=model) for word in command]
    with subprocess.Popen(
        [sys.executable, "-m", "data_tools", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores it, and so would we.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not (tmp_path / made).exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == message
    assert not list(tmp_path.glob("out.bin")) and not (tmp_path / "out").exists()


def test_ended_by_sigterm_is_exit_code_143(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_tools", "tokenize", "-", "--tokenizer", model]
    command += ["--output", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:
        while not (tmp_path / "out.work" / "parts").exists() and process.poll() is None:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 143
    assert not (tmp_path / "out.bin").exists()


def test_a_signal_while_the_kernel_is_loaded_is_not_lost(model: str, tmp_path: Path) -> None:
    # LLVM calls back into Python there, where ctypes prints an exception and goes on: without care
    # to a standard input that never ends.
    program = """
import ctypes, os, signal, sys
from data_tools import encoding
from data_tools.cli import main

@ctypes.CFUNCTYPE(None)
def called_back():
    os.kill(os.getpid(), signal.SIGTERM)

def probe_texts(whole=encoding.probe_texts):
    called_back()
    return whole()

encoding.probe_texts = probe_texts
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "tokenize", "-", "--tokenizer", model]
    command += ["--output", str(tmp_path / "out")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.wait(180) == 143  # the kernel may have to be compiled first
        finally:
            process.kill()
        assert process.stderr.read() == ""
