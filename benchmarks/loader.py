"""The loader beside megatron-core's own, in one run: index build, warm open, memory, samples/s.

    python benchmarks/loader.py --documents 1e7 --corpora 7 --gigabytes 20

Both read the same synthetic token files: a blend of corpora with log-normal documents of 1,000
tokens in the mean for the index (the .bin is sparse), and a .bin of real bytes for cold random
reads. megatron-core's own is its builder and memory map as they come; ours publishes the index by a
rename, names it after the data, and switches the kernel's read-ahead off. Each figure comes from a
process of its own, the two in turn, medians over --rounds; peak memory includes torch.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SEQUENCE_LENGTH = 2048


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        documents = int(float(options.documents))
        for number in range(options.corpora):
            write_sparse(Path(folder) / f"blend_{number}", documents // options.corpora, number)
        write_tokens(Path(folder) / "cold", int(options.gigabytes * 2**30))
        print(
            f"{documents:,} documents in {options.corpora} corpora, "
            f"sequence length {SEQUENCE_LENGTH:,}"
        )
        print(f"{'':38}{'megatron-core':>15}{'ours':>12}{'ratio':>9}")
        rows = [
            ("first", "build_s", "index build, s", 3),
            ("first", "peak_gb", "peak memory, GB", 2),
            ("warm", "build_s", "warm open, s", 4),
            ("warm", "samples_per_s", "hot samples a second", 0),
            ("cold", "reads_per_s", "cold random samples a second", 0),
            ("cold", "read_mb", "read from disk for them, MB", 1),
        ]
        runs: dict[tuple[str, str], list[dict[str, float]]] = {}
        for kind in ("first", "warm", "cold"):
            for _ in range(options.rounds):
                for who in ("theirs", "ours"):
                    runs.setdefault((kind, who), []).append(run(options, folder, kind, who))
        for kind, name, title, digits in rows:
            theirs, ours = (median(r[name] for r in runs[kind, who]) for who in ("theirs", "ours"))
            print(f"{title:38}{theirs:>15,.{digits}f}{ours:>12,.{digits}f}{ours / theirs:>9.2f}")


def run(options: argparse.Namespace, folder: str, kind: str, who: str) -> dict[str, float]:
    if kind == "first":
        shutil.rmtree(Path(folder) / who, ignore_errors=True)
        os.sync()
    command = [sys.executable, __file__, "--measure", kind, "--who", who, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The figures of one kind, in this process."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    from megatron_ext.config import load_config
    from megatron_ext.data import blend
    from megatron_ext.world import world

    folder = Path(options.folder)
    files = sorted(folder.glob("cold.idx" if options.measure == "cold" else "blend_*.idx"))
    prefixes = [file.with_suffix("") for file in files]
    tokens = sum(int(np.load(f"{prefix}.npy")) for prefix in prefixes)
    corpora = ", ".join(f"{prefix.name}: {{path: {prefix}}}" for prefix in prefixes)
    config_file = folder / "config.yaml"
    config_file.write_text(
        f"""\
model: {{num_layers: 1, hidden_size: 8, ffn_hidden_size: 8, num_heads: 1, vocab_size: 65536}}
rope: {{base: 1e6, bound: "off"}}
data: {{corpora: {{{corpora}}}, cache_dir: {folder / options.who}}}
training:
  {{sequence_length: {SEQUENCE_LENGTH}, global_batch_size: 8, micro_batch_size: 8,
    steps: {int(tokens * 0.9) // SEQUENCE_LENGTH // 8}}}
optimizer: {{lr: 1}}
precision: {{dtype: fp32}}
"""
    )
    config = load_config(config_file)
    build: Callable = blend.build_datasets
    if options.who == "theirs":

        def build(config):  # its index with its own cache, and no madvise
            blend.SampleIndex, blend._AT_ONCE = GPTDataset, 1
            blend.mmap.MADV_RANDOM = blend.mmap.MADV_NORMAL
            return blend._open(config, folder / "theirs", built=False)

    with world(config):
        started = time.perf_counter()
        train, _ = build(config)
        build_s = time.perf_counter() - started
        if options.measure == "cold":
            return cold_reads(train, f"{prefixes[0]}.bin")
        rate = samples_per_s(train)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"build_s": build_s, "samples_per_s": rate, "peak_gb": peak}


def samples_per_s(dataset: Any, count: int = 3000) -> float:
    """Random samples that lie in the page cache."""
    order = np.random.default_rng(0).integers(0, len(dataset), count)
    for number in order:
        dataset[int(number)]
    started = time.perf_counter()
    for number in order:
        dataset[int(number)]
    return count / (time.perf_counter() - started)


def cold_reads(dataset: Any, bin_file: str, count: int = 2000) -> dict[str, float]:
    """Random samples of a file that is not in the page cache."""
    with open(bin_file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    order = np.random.default_rng(1).integers(0, len(dataset), count)
    before = disk_bytes()
    started = time.perf_counter()
    for number in order:
        dataset[int(number)]
    seconds = time.perf_counter() - started
    return {"reads_per_s": count / seconds, "read_mb": (disk_bytes() - before) / 1e6}


def disk_bytes() -> int:
    """Bytes that this process made the disk deliver."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    return 0


def write_index_of(prefix: Path, lengths: np.ndarray) -> None:
    """The .idx of documents of these lengths, in tokens, their sum in PREFIX.npy, and a receipt as
    `data-tools` leaves one: the files of the pair are not read to know them."""
    from data_tools.indexed import write_index
    from data_tools.receipt import FORMAT, write_receipt

    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, np.uint16, lengths)
    np.save(f"{prefix}.npy", lengths.sum(dtype=np.int64))
    counts = {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64))}
    pair: dict[str, Any] = {"prefix": prefix.name, **counts}
    for kind in ("bin", "idx"):
        name = f"{prefix}.{kind}"
        size = os.path.getsize(name)
        pair[kind] = {"path": name, "size": size, "checksum": "of the benchmark"}
    pair["bin"] |= {"block_bytes": 0, "blocks": []}
    made_from: dict[str, Any] = {"inputs": [], "tokenizer": {}, "options": {}}
    receipt = {
        "format": FORMAT,
        "kind": "tokens",
        "wanted": made_from,
        **made_from,
        "counts": {**counts, "rejected": None, "slices": None},
        "lengths": [],
        "outputs": {"dtype": "uint16", "pairs": [pair]},
    }
    write_receipt(prefix, receipt)


def write_sparse(prefix: Path, documents: int, seed: int) -> None:
    """Many documents whose tokens are holes in the file: only the index costs."""
    lengths = np.random.default_rng(seed).lognormal(np.log(1000) - 0.5, 1.0, documents)
    lengths = np.maximum(lengths, 1).astype(np.int32)
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))
    write_index_of(prefix, lengths)


def write_tokens(prefix: Path, size: int) -> None:
    """`size` bytes of real tokens in documents of 1,024. To be of use for cold reads it must be
    much larger than what read-ahead brings in for 2,000 of them: 8 MiB each on some disks."""
    block = np.random.default_rng(0).integers(0, 65000, 1 << 23, dtype=np.uint16).tobytes()
    blocks = max(1, size // len(block))
    with open(f"{prefix}.bin", "wb") as stream:
        for _ in range(blocks):
            stream.write(block)
        os.fsync(stream.fileno())
    write_index_of(prefix, np.full(blocks * len(block) // 2048, 1024, np.int32))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", default="1e7", help="documents of the synthetic corpus")
    parser.add_argument("--corpora", type=int, default=7, help="corpora they are divided over")
    parser.add_argument("--gigabytes", type=float, default=20, help="size of the file read cold")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to put the files; default: /tmp")
    parser.add_argument("--measure", choices=["first", "warm", "cold"], help=argparse.SUPPRESS)
    parser.add_argument("--who", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
