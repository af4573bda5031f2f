"""The demo's corpus: text that every machine has, or your own, as RedPajama-style JSONL.

    facts = build_corpus(Path("runs/demo/data/corpus.jsonl.zst"))
    build_corpus(path, own=Path("my_texts/"))       # .txt, .md, .py, .jsonl(.gz, .zst); a folder

One document a line: {"text": ..., "meta": {"redpajama_set_name": ..., "path": ...}}. Without `own`
the documents are the modules of the interpreter's standard library and the language reference that
`help()` prints. Refuses a path that is missing, and texts too small to train on.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from data_tools.files import write_file
from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.errors import UserError

Document = dict[str, Any]

LEAST_BYTES = 1_000_000  # a vocabulary of 2,048 and a few hundred steps want at least so much
_ENOUGH = 8_000_000  # the library's own tests are read only where the rest is less than this
_PLAIN = {".txt", ".md", ".rst", ".py"}
_JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def build_corpus(output: Path, own: Path | None = None) -> dict[str, Any]:
    """Write `output` (.jsonl.zst) and, last, the facts about it beside it; returns the facts.

    A finished corpus of the same origin is left alone. Raises UserError.
    """
    facts_file = output.with_name("corpus.json")
    origin = "standard library" if own is None else str(own.resolve())
    if facts_file.is_file():
        facts = json.loads(facts_file.read_text())
        if facts["origin"] == origin and output.is_file():
            return {**facts, "reused": True}
        raise UserError(
            f"{output.parent} holds a corpus made from {facts['origin']}, not from {origin}: "
            "delete that folder's parent, or write --output with another folder"
        )
    documents = sorted(
        standard_library() if own is None else own_texts(own),
        # An order that owes nothing to the folder's: the last documents are the validation set.
        key=lambda document: hashlib.sha256(document["meta"]["path"].encode()).digest(),
    )
    size = sum(len(document["text"].encode()) for document in documents)
    if size < LEAST_BYTES:
        raise UserError(
            f"{origin} holds {size:,} bytes of text, less than the {LEAST_BYTES:,} that the demo "
            "needs: name more files"
        )
    write_file(output, compressed(documents))
    facts = {"origin": origin, "documents": len(documents), "bytes": size}
    write_json(facts_file, facts)
    return {**facts, "reused": False}


def compressed(documents: Iterable[Document]) -> bytes:
    """A .jsonl.zst, one document a line."""
    return zstandard.compress(b"".join(json.dumps(d).encode() + b"\n" for d in documents))


def standard_library() -> list[Document]:
    """The interpreter's own modules and its reference texts; no installed package."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if _is_text(p.relative_to(root).parts)]
    tests = {p for p in files if {"test", "tests", "idle_test"} & set(p.relative_to(root).parts)}
    documents = reference() + [_code(p, root) for p in files if p not in tests]
    size = sum(len(document["text"]) for document in documents)
    for path in sorted(tests):
        if size >= _ENOUGH:
            break
        documents.append(_code(path, root))
        size += len(documents[-1]["text"])
    return [document for document in documents if document["text"].strip()]


def reference() -> list[Document]:
    """The language reference, one document a topic, as `help("topic")` prints it."""
    from pydoc_data import topics

    return [
        {"text": text, "meta": {"redpajama_set_name": "RedPajamaBook", "path": f"help/{name}"}}
        for name, text in topics.topics.items()
    ]


def own_texts(path: Path) -> list[Document]:
    """Documents of a file or of all files below a folder. Raises UserError."""
    if not path.exists():
        raise UserError(f"corpus {path} does not exist: name a file or a folder of texts")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    documents: list[Document] = []
    for file in files:
        if file.name.endswith(_JSONL):
            documents += _jsonl(file)
        elif file.suffix in _PLAIN or file == path:
            text = file.read_text(encoding="utf-8", errors="replace")
            meta = {"redpajama_set_name": "RedPajamaBook", "path": str(file)}
            documents.append({"text": text, "meta": meta})
    return [document for document in documents if document["text"].strip()]


def _is_text(parts: tuple[str, ...]) -> bool:
    # Installed packages are not the standard library; the code pages are tables, not text; the
    # reference is read topic by topic instead.
    skipped = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
    return not skipped & set(parts)


def _code(path: Path, root: Path) -> Document:
    text = path.read_text(encoding="utf-8", errors="replace")
    meta = {"redpajama_set_name": "RedPajamaGithub", "path": str(path.relative_to(root))}
    return {"text": text, "meta": meta}


def _jsonl(file: Path) -> Iterator[Document]:
    from data_tools.corpus import describe
    from data_tools.documents import parse_line
    from data_tools.lines import read_lines

    for line in read_lines(describe(str(file))):
        document = parse_line(line.data)
        if document.reason is None:
            meta = {"path": f"{file}:{line.number}"}
            yield {"text": document.text.decode(), "meta": meta}
