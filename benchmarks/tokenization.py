"""Tokenise one corpus with us and with the peers, and compare speed, memory and ids.

    python benchmarks/build_corpus.py corpus.jsonl --megabytes 300
    python benchmarks/tokenization.py corpus.jsonl --tokenizer T.model --workers 2 --rounds 3

Peers run interleaved, each in its own process, with the interpreter given by --python (they need
not be installed beside us; one that is missing is skipped by name); Megatron-LM's two tools are run
from a checkout, --megatron-lm FOLDER. MB is 10^6 bytes of UTF-8 text.
wall is what a person waits, start-up included; core is MB over CPU-seconds, which other jobs on the
machine disturb less. Memory is the peak sum over all processes of the tool. ids are compared with
ours, document by document; "n differ" counts documents.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

# Run as a script this folder comes first on the path; the packages lie one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

WORK: dict[str, str] = {
    "data-tools": """
from data_tools.cli import main
raise SystemExit(main(["tokenize", corpus, "--tokenizer", model, "--output", out,
                       "--workers", workers, "--quiet"]))
""",
    "datatrove": """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
if __name__ == "__main__":
    LocalPipelineExecutor(
        [JsonlReader(parts, glob_pattern="*.jsonl"),
         MegatronDocumentTokenizer(out, tokenizer_name_or_path=twin + "/tokenizer.json",
                                   eos_token="</s>", batch_size=1000)],
        tasks=int(workers), workers=int(workers), logging_dir=out + "-logs").run()
""",
    "dolma": """
import subprocess, sys
raise SystemExit(subprocess.call([
    sys.executable, "-m", "dolma.cli", "tokens",
    "--documents", parts + "/*.jsonl", "--destination", out,
    "--tokenizer.name_or_path", twin + "/tokenizer.json", "--tokenizer.eos_token_id", "2",
    "--tokenizer.encode_special_tokens", "--tokenizer.segment_before_tokenization",
    "--dtype", "uint16", "--processes", workers]))
""",
    "sentencepiece": """
import json, os
import numpy, sentencepiece
texts = [json.loads(line)["text"] for line in open(corpus)]
processor = sentencepiece.SentencePieceProcessor(model_file=model)
found = []
for i in range(0, len(texts), 1000):
    found += processor.encode(texts[i : i + 1000], num_threads=int(workers))
save(found)
""",
    "kitoken": """
import json
import kitoken
texts = [json.loads(line)["text"] for line in open(corpus)]
encoder = kitoken.Kitoken.from_sentencepiece_file(model)
save([encoder.encode(text, False) for text in texts])
""",
    "gigatoken": """
import json
import gigatoken
texts = [json.loads(line)["text"] for line in open(corpus)]
tokenizer = gigatoken.Tokenizer.from_sentencepiece(model)
save(tokenizer.encode_batch(texts))
""",
    "megatron-lm": """
megatron("preprocess_data.py", "--tokenizer-type", "SentencePieceTokenizer",
         "--tokenizer-model", model, "--workers", workers)
""",
    "megatron-lm-fast": """
megatron("preprocess_data_fast.py", "--tokenizer-type", "HuggingFaceTokenizer",
         "--tokenizer-model", twin, "--tokenizer-hf-no-include-special-tokens", "--use-gigatoken")
""",
}
# Peers that use their own threads; of the others each process gets one.
THREADED = ("gigatoken", "megatron-lm-fast")
HEAD = """
import os, sys
corpus, parts, model, twin, out, workers = sys.argv[1:]
os.environ["RAYON_NUM_THREADS"] = workers if {threads} else "1"
def save(found):
    import numpy
    with open(out + ".bin", "wb") as ids, open(out + ".lengths", "wb") as lengths:
        numpy.array([len(one) + 1 for one in found], dtype="int32").tofile(lengths)
        for one in found:
            numpy.append(numpy.asarray(one, dtype="uint16"), numpy.uint16(2)).tofile(ids)
def megatron(tool, *settings):
    import subprocess
    folder = os.environ["MEGATRON_LM"]
    raise SystemExit(subprocess.call(
        [sys.executable, folder + "/tools/" + tool, "--input", corpus, "--output-prefix", out,
         "--append-eod", *settings], env={**os.environ, "PYTHONPATH": folder}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("corpus", type=Path)
    add("--tokenizer", type=Path, required=True, help="a sentencepiece .model")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--rounds", type=int, default=3)
    add("--peers", default=",".join(list(WORK)[1:]))
    add("--python", default=sys.executable, help="interpreter that has the peers")
    add("--megatron-lm", type=Path, help="a checkout of Megatron-LM")
    add("--json", type=Path, help="write the measurements here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.corpus.parent) as folder:
        rows = measure(options, Path(folder))
    print(show(rows, options))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Interleaved rounds; wall and CPU seconds, memory, and the documents whose ids differ."""
    from data_tools.twin import write_twin

    lines = options.corpus.read_bytes().splitlines(keepends=True)
    text_bytes = sum(len(json.loads(line)["text"].encode()) for line in lines)
    (folder / "parts").mkdir()
    (folder / "twin").mkdir()
    share = -(-len(lines) // options.workers)  # peers share a folder out by files
    for i in range(options.workers):
        with (folder / "parts" / f"{i:03d}.jsonl").open("w") as part:
            for number in range(i * share, min((i + 1) * share, len(lines))):
                # dolma passes over documents without an id.
                part.write(json.dumps({**json.loads(lines[number]), "id": str(number)}) + "\n")
    write_twin(options.tokenizer, folder / "twin")
    rows: dict[str, dict] = {}
    names = ["data-tools", *filter(None, options.peers.split(","))]
    for name in list(names[1:]):
        if name.startswith("megatron-lm"):
            missing = options.megatron_lm is None and "no checkout was given by --megatron-lm"
        else:
            known = subprocess.run([options.python, "-c", f"import {name}"], capture_output=True)
            missing = known.returncode and f"it is not installed for {options.python}"
        if missing:
            print(f"{name} is skipped: {missing}", file=sys.stderr)
            names.remove(name)
    for turn in range(options.rounds):
        for name in names:
            out = folder / f"{name}-out"
            for stale in folder.glob(f"{name}-out*"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            took = run(name, options, folder, out)
            row = rows.setdefault(name, {"text_bytes": text_bytes, "runs": []})
            row["runs"].append(took)
            if turn == 0 and not took["failed"]:
                row["differ"] = differing(name, out, folder)
            print(f"{name}, round {turn + 1}: {took}", file=sys.stderr)
    return rows


def run(name: str, options: argparse.Namespace, folder: Path, out: Path) -> dict:
    """One measured process (tree)."""
    import psutil

    script = HEAD.replace("{threads}", str(name in THREADED)) + WORK[name]
    (folder / f"run_{name}.py").write_text(script)
    python = sys.executable if name == "data-tools" else options.python
    command = [
        python,
        str(folder / f"run_{name}.py"),
        str(options.corpus.resolve()),
        str(folder / "parts"),
    ]
    command += [str(options.tokenizer), str(folder / "twin"), str(out), str(options.workers)]
    environment = {**os.environ, "MEGATRON_LM": str(options.megatron_lm)}
    if name == "data-tools":
        environment["PYTHONPATH"] = sys.path[0]
    os.sync()  # what the tool before has left to write is not ours
    before, started = os.times(), time.perf_counter()
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak, done = [0], threading.Event()
        used: dict[int, float] = {}  # CPU seconds by process, as last seen

        def watch() -> None:
            while not done.wait(0.05):
                try:
                    one = psutil.Process(process.pid)
                    tree = [one, *one.children(recursive=True)]
                    # Shared pages are counted once: PSS, as the kernel divides them.
                    peak[0] = max(peak[0], sum(p.memory_full_info().pss for p in tree))
                    for p in tree:
                        times = p.cpu_times()
                        used[p.pid] = times.user + times.system
                except psutil.Error:
                    continue

        watcher = threading.Thread(target=watch)
        watcher.start()
        process.wait()
        wall, after = time.perf_counter() - started, os.times()
        done.set()
        watcher.join()
        if process.returncode:
            log.seek(0)
            print(f"{name} failed:\n{log.read()[-2000:]}", file=sys.stderr)
    cpu = sum(after[2:4]) - sum(before[2:4])
    # Processes that a tool never waits for are missing there, the last moments of all here.
    cpu = max(cpu, sum(used.values()))
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "peak_mb": round(peak[0] / 1e6),
        "failed": bool(process.returncode),
    }


def differing(name: str, out: Path, folder: Path) -> int | None:
    """Documents whose ids are not ours; None where the output has no documents to compare."""
    import numpy as np

    from data_tools import indexed

    def read_dolma(folder: Path) -> tuple:
        documents = {}
        for table in sorted(folder.glob("*.csv.gz")):
            ids = np.fromfile(str(table).replace(".csv.gz", ".npy"), dtype=np.uint16)
            with gzip.open(table, "rt") as rows:
                for start, end, number, *_ in csv.reader(rows):
                    documents[int(number)] = ids[int(start) : int(end)]
        found = [documents[number] for number in sorted(documents)]
        return np.concatenate(found), np.array([len(ids) for ids in found])

    def read(prefix: Path) -> tuple:
        if Path(f"{prefix}.lengths").exists():
            lengths = np.fromfile(f"{prefix}.lengths", dtype=np.int32)
            return np.fromfile(f"{prefix}.bin", dtype=np.uint16), lengths
        index = indexed.read_index(prefix)
        return np.asarray(indexed.open_tokens(prefix, index)), np.asarray(index.lengths)

    prefixes = [out]
    if not Path(f"{out}.bin").exists():  # they gave it a name of their own, or several
        prefixes = sorted(path.with_suffix("") for path in out.parent.glob(f"{out.name}*/**/*.idx"))
        prefixes += sorted(path.with_suffix("") for path in out.parent.glob(f"{out.name}_*.idx"))
        if not prefixes and name != "dolma":
            return None
    theirs = [read_dolma(out)] if name == "dolma" else [read(prefix) for prefix in prefixes]
    ids, lengths = (np.concatenate([pair[i] for pair in theirs]) for i in (0, 1))
    our_ids, our_lengths = read(folder / "data-tools-out")
    if len(lengths) != len(our_lengths):
        return abs(len(lengths) - len(our_lengths))
    ours = np.split(our_ids, np.cumsum(our_lengths)[:-1])
    both = zip(ours, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)
    return sum(not np.array_equal(a, b) for a, b in both)


def show(rows: dict[str, dict], options: argparse.Namespace) -> str:
    """The table, medians over rounds; ratios say how many times faster we are."""
    size = next(iter(rows.values()))["text_bytes"] / 1e6

    def middle(name: str, key: str) -> float:
        return median(one[key] for one in rows[name]["runs"])

    lines = [
        f"{size:.1f} MB of text, {options.workers} workers, {options.rounds} rounds, median",
        "| tool | wall s | MB/s | CPU s | MB/s a core | peak MB | we are, wall | a core | ids |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if any(one["failed"] for one in row["runs"]):
            lines.append(f"| {name} | failed | | | | | | | |")
            continue
        wall, cpu = middle(name, "wall_s"), middle(name, "cpu_s")
        differ = row.get("differ")
        ids = "not compared" if differ is None else "equal" if differ == 0 else f"{differ:,} differ"
        lines.append(
            f"| {name} | {wall:.2f} | {size / wall:.1f} | {cpu:.2f} | {size / cpu:.1f} | "
            f"{middle(name, 'peak_mb'):,.0f} | {wall / middle('data-tools', 'wall_s'):.1f}x | "
            f"{cpu / middle('data-tools', 'cpu_s'):.1f}x | {ids} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
