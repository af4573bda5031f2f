"""The documents that an evaluation reads: a run's validation documents, or one's own text files.

    texts = validation_texts(config)             # the last validation_fraction of every corpus
    texts = own_texts(tokenizer, [Path("book.txt")])
    chosen, notes = choose(texts, longest=4096, max_tokens=1_000_000)

A document is tokens only; nothing is put before it, as nothing was in training, and documents are
never joined. Refuses missing or unreadable files, and texts without two tokens. Needs no torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data_tools.indexed import open_tokens, read_index
from data_tools.tokenizer import Tokenizer
from megatron_ext.config import Config
from megatron_ext.errors import UserError

Tokens = NDArray[Any]


@dataclass(frozen=True)
class Texts:
    """Documents as token ids, and where they come from, in a form that two runs can compare."""

    documents: list[Tokens]
    source: dict[str, Any]


def validation_texts(config: Config) -> Texts:
    """Every validation document of the run's corpora, as `megatron.core.datasets` divides them."""
    documents, source = [], {}
    for name, corpus in config.data.corpora.items():
        index = read_index(corpus.path)
        tokens = open_tokens(corpus.path, index)
        # The rounding is Megatron-Core's (blended_megatron_dataset_builder.py:470).
        first = round((1 - config.data.validation_fraction) * index.documents)
        for document in range(first, index.documents):
            start, end = index.span(document)
            documents.append(tokens[start:end])
        source[name] = {"documents": index.documents - first, "tokens": index.tokens}
    return Texts(documents, {"kind": "validation documents", "corpora": source})


def own_texts(tokenizer: Tokenizer, files: Sequence[Path]) -> Texts:
    """Each file is one document. Raises UserError."""
    documents, source = [], {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"--text {file} does not exist: name a UTF-8 text file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file} cannot be read as UTF-8 text: {error}") from None
        documents.append(tokenizer.encode(text))
        source[file.name] = hashlib.sha256(text.encode()).hexdigest()
    return Texts(documents, {"kind": "text files", "sha256": source, "tokenizer": tokenizer.hash})


def choose(texts: Texts, longest: int, max_tokens: int) -> tuple[list[Tokens], list[str]]:
    """The documents to score, the same at every length up to `longest`, and remarks on the choice.

    Documents of at least `longest` tokens, each cut to twice that (so that the books of a corpus
    are many rather than long), as many as `max_tokens` hold. Where no document is that long, the
    longest ones. Raises UserError when no document has two tokens.
    """
    long = [document for document in texts.documents if len(document) >= longest]
    notes = []
    if not long:
        long = sorted(texts.documents, key=len, reverse=True)[:8]
        most = len(long[0]) if long else 0
        if most < 2:
            raise UserError("the texts hold no document of two tokens: name longer ones by --text")
        notes.append(
            f"no document reaches {longest} tokens: the {len(long)} longest were taken, the "
            f"longest of {most} tokens, so no context beyond that was measured"
        )
    chosen, left = [], max_tokens
    for document in long:
        if left < 2:
            break
        chosen.append(document[: min(2 * longest, left)])
        left -= len(chosen[-1])
    if len(chosen) < len(long):
        notes.append(
            f"{len(chosen)} of {len(long)} documents long enough were scored: "
            f"evaluation.max_tokens={max_tokens}"
        )
    return [document for document in chosen if len(document) > 1], notes
