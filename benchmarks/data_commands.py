"""What `data-tools` costs beside the encoding itself, in one run on one machine.

    python benchmarks/data_commands.py corpus.jsonl --tokenizer T.model --gigabytes 2

Prints: seconds from the shell to the end of --help, and to the receipt of an empty file; MB/s of
`merge` and `verify` of a pair of --gigabytes beside `cat` of its .bin to nowhere and to a file,
after the files were dropped from memory; and MB/s of `tokenize` on the same text, four times over,
cut into documents of 10 kB, 1 MB and 16 MB. Medians over --rounds, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

# Run as a script this folder comes first on the path; the packages lie one above.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("corpus", type=Path, help="of benchmarks/build_corpus.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.corpus.resolve().parent) as name:
        folder = Path(name)
        start_up(folder, options)
        document_sizes(folder, options)
        copying(folder, options)


def start_up(folder: Path, options: argparse.Namespace) -> None:
    (folder / "empty.jsonl").write_text("")
    tokenizing = ["tokenize", folder / "empty.jsonl", "--tokenizer", options.tokenizer,
                  "--output", folder / "nothing", "--quiet"]  # fmt: skip
    rounds = []
    for _ in range(options.rounds):
        remove(folder / "nothing")
        rounds.append((timed(["--help"]), timed(tokenizing)))
    print(f"start-up: help {median(r[0] for r in rounds):.2f} s, "
          f"an empty file {median(r[1] for r in rounds):.2f} s")  # fmt: skip


def document_sizes(folder: Path, options: argparse.Namespace) -> None:
    """The same text in documents of three sizes, so only the cut differs; four times over, so that
    the longest are many enough to share out evenly."""
    lines = options.corpus.read_bytes().splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines) * 4
    sizes = {"10 kB": 10_000, "1 MB": 1_000_000, "16 MB": 16_000_000}
    files = {}
    for name, size in sizes.items():
        file = files[name] = folder / f"{size}.jsonl"
        with file.open("w") as stream:
            for start in range(0, len(text), size):
                stream.write(json.dumps({"text": text[start : start + size]}) + "\n")
    megabytes = len(text.encode()) / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(options.rounds):
        for name, file in files.items():
            output = folder / f"sized-{file.stem}"
            remove(output)
            command = ["tokenize", file, "--tokenizer", options.tokenizer]
            seconds[name].append(
                timed([*command, "--workers", options.workers, "--output", output])
            )
    rates = ", ".join(f"{megabytes / median(times):.1f} MB/s of {name}"
                      for name, times in seconds.items())  # fmt: skip
    print(f"documents: {rates} ({megabytes:.0f} MB of text, {options.workers} workers)")


def copying(folder: Path, options: argparse.Namespace) -> None:
    """`merge` and `verify` of a large pair beside `cat`."""
    run(["tokenize", options.corpus, "--tokenizer", options.tokenizer, "--output",
         folder / "one", "--quiet", "--workers", options.workers])  # fmt: skip
    size = (folder / "one.bin").stat().st_size
    copies = max(1, round(options.gigabytes * 1e9 / size))
    for copy in range(copies):
        for ending in ("bin", "idx", "receipt.json"):
            shutil.copy(folder / f"one.{ending}", folder / f"copy{copy:03d}.{ending}")
    inputs = [folder / f"copy{copy:03d}.bin" for copy in range(copies)]
    files = " ".join(map(str, inputs))
    tools: dict[str, tuple[Callable[[], float], list[Path]]] = {
        "cat to nowhere": (lambda: shell(f"cat {files} >/dev/null"), inputs),
        "cat to a file": (lambda: shell(f"cat {files} >{folder}/cat && sync {folder}/cat"), inputs),
        "merge": (
            lambda: timed(["merge", *(i.with_suffix("") for i in inputs),
                           "--output", folder / "all"]),
            inputs,
        ),
        "verify": (lambda: timed(["verify", folder / "all"]), [folder / "all.bin"]),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(options.rounds):
        for name, (work, read) in tools.items():
            if name == "merge":
                remove(folder / "all")
            for file in read:
                forget(file)
            seconds[name].append(work())
    megabytes = size * copies / 1e6
    for name, times in seconds.items():
        print(f"{name:>15}: {megabytes / median(times):,.0f} MB/s ({megabytes:,.0f} MB)")


def remove(prefix: Path) -> None:
    """Its files, or the command would find its work done."""
    for file in prefix.parent.glob(f"{prefix.name}.*"):
        file.unlink()


def forget(file: Path) -> None:
    """Drop a file's pages from memory, so that it is read from the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(arguments: list) -> None:
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def timed(arguments: list) -> float:
    started = time.perf_counter()
    run(arguments)
    return time.perf_counter() - started


def shell(command: str) -> float:
    started = time.perf_counter()
    subprocess.run(command, shell=True, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
