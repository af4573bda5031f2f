"""Build the benchmark corpus from text this machine already has.

    python benchmarks/build_corpus.py OUTPUT.jsonl [--megabytes 200] [--also ../shared/data]

One document a file: the interpreter's library, the installed packages, headers and documentation,
and the files named with --also (JSONL of any compression, .txt, .txt.gz). Long books come whole.
Documents are unique and in a seeded order; the same machine gives the same corpus. When the text
runs out before the size is reached, the corpus is what there is; the size is printed.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson
import xxhash

from data_tools.corpus import find_sources
from data_tools.documents import parse_line
from data_tools.files import atomic_write
from data_tools.lines import read_lines

PROSE = {".txt", ".md", ".rst", ".html", ".tex", ".adoc"}
CODE = {
    ".py",
    ".pyi",
    ".h",
    ".hpp",
    ".c",
    ".cc",
    ".cpp",
    ".cu",
    ".cuh",
    ".js",
    ".css",
    ".ts",
    ".sh",
}
DATA = {".json", ".xml", ".yaml", ".yml", ".toml", ".csv"}
LARGEST = {
    **dict.fromkeys(PROSE, 8 << 20),
    **dict.fromkeys(CODE, 2 << 20),
    **dict.fromkeys(DATA, 1 << 18),
}


def also(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """Texts of the files and folders given by hand, all of them."""
    for root in paths:
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        for file in files:
            if file.name.endswith((".txt", ".txt.gz")):
                data = (
                    gzip.decompress(file.read_bytes())
                    if file.suffix == ".gz"
                    else file.read_bytes()
                )
                yield "book", data.decode("utf-8", "replace")
            elif ".jsonl" in file.name:
                source = find_sources([str(file)])[0]
                for line in read_lines(source):
                    document = parse_line(line.data)
                    if not document.reason:
                        yield source.slice, document.text.decode()


def machine() -> Iterator[tuple[str, str]]:
    """Text files of the interpreter, its packages and the system, in a fixed order."""
    roots = {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    }
    folders = [*sorted(roots), "/usr/share/doc", "/usr/include", "/usr/lib", "/usr/share"]
    for folder in folders:
        for file in sorted(Path(folder).rglob("*")):
            limit = LARGEST.get(file.suffix.lower(), 0)
            try:
                if not limit or not file.is_file() or not 200 <= file.stat().st_size <= limit:
                    continue
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            yield ("github" if file.suffix in CODE else "c4"), text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    seen: set[int] = set()
    documents: list[bytes] = []
    size = 0
    for texts in (also(options.also), machine()):
        for name, text in texts:
            data = text.encode()
            key = xxhash.xxh3_64_intdigest(data)
            if key in seen:
                continue
            seen.add(key)
            documents.append(orjson.dumps({"text": text, "meta": {"source": name}}))
            size += len(data)
            if size >= options.megabytes * 1e6:
                break
    random.Random(0).shuffle(documents)
    with atomic_write(options.output) as stream:
        for document in documents:
            stream.write(document + b"\n")
    print(f"{options.output}: {len(documents):,} documents, {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
