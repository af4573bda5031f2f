"""The small study's token files: real text among documents that ask for what they said before.

    python -m megatron_ext.study.small_corpus                      # into runs/small/data
    python -m megatron_ext.study.small_corpus --context 2048 --documents 120000 --output FOLDER

Everything is made of what a machine with Python has: the texts are the interpreter's standard
library and its language reference (`demo_corpus`), and the others are prompts of the task passkey
with their answers, drawn by a fixed seed. So a tiny model is asked in the words that it was trained
on, for numbers that only the prompt can tell. The same interpreter gives the same files; finished
ones are left alone. Exit codes: 0, 1 when a step failed.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.files import write_file
from megatron_ext.evaluation.prompts import NOISE
from megatron_ext.evaluation.tasks import PASSKEY_FACT, PASSKEY_INTRODUCTION, PASSKEY_QUESTION
from megatron_ext.study.demo import StageFailed, run
from megatron_ext.study.demo_corpus import Document, compressed, standard_library

OUTPUT = Path("runs/small/data")
SEED = 20240523
VOCAB_SIZE = 1024
END = "<|endoftext|>"  # of a document
CONTEXT = 256  # tokens that a document with a pass key has at most, about
DOCUMENTS = 36_000  # with a pass key: 4.4M tokens
TEXT_BYTES = 1_200_000  # of real text: 0.5M tokens
MOST_QUESTIONS = 4  # of one document


def passkey_document(rng: np.random.Generator, context: int = CONTEXT) -> str:
    """The prompt of the task passkey and its answer, the key at any depth, asked for once or more
    often. Fillers of 1 to 10 words are as frequent as those of 10 to 100: where most documents are
    short, a tiny model learns to look back at all, and then farther."""
    most = max(2, int(0.75 * (context - 90)))  # 1.3 tokens a word, and 90 for the rest
    words, asked = int(most ** rng.random()), int(rng.integers(1, MOST_QUESTIONS + 1))
    before, *after = np.diff([0, *np.sort(rng.integers(words + 1, size=asked)), words])
    key = int(rng.integers(1, 50001))
    questions = "\n".join(f"{_noise(count)}{PASSKEY_QUESTION} {key}" for count in after)
    return f"{PASSKEY_INTRODUCTION}\n{_noise(before)}{PASSKEY_FACT.format(key=key)}{questions}\n"


def documents(
    count: int = DOCUMENTS, context: int = CONTEXT, text_bytes: int = TEXT_BYTES
) -> list[Document]:
    """`count` with a pass key and real text, in an order that owes nothing to their kind: the last
    are for validation."""
    made = [
        {
            "text": passkey_document(np.random.default_rng([SEED, number]), context),
            "meta": {"path": f"passkey/{number}"},
        }
        for number in range(count)
    ]
    made += _texts(text_bytes)
    return [made[place] for place in np.random.default_rng(SEED).permutation(len(made))]


def build(output: Path, made: Sequence[Document]) -> Path:
    """corpus.jsonl.zst, tokenizer.json and corpus.bin/.idx in `output`; returns the prefix of the
    token files. Raises StageFailed."""
    output.mkdir(parents=True, exist_ok=True)
    source, tokenizer, prefix = (
        output / name for name in ("corpus.jsonl.zst", "tokenizer.json", "corpus")
    )
    _write(source, compressed(made))
    _write(tokenizer, train_tokenizer([document["text"] for document in made]).encode())
    words = ("tokenize", source, "--tokenizer", tokenizer, "--eod-token", END, "--output", prefix)
    run(sys.executable, "-m", "data_tools", *words)
    return prefix


def train_tokenizer(texts: Sequence[str]) -> str:
    """Byte-level BPE in which a number is read in pairs of digits, as larger models read it in
    threes: digit by digit, the order within a number costs a tiny model more than finding it."""
    tokenizer = Tokenizer(models.BPE())
    number = pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [number, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ext.study.small_corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"[{OUTPUT}]")
    add = parser.add_argument
    add("--documents", type=int, default=DOCUMENTS, metavar="N", help=f"with a key [{DOCUMENTS}]")
    add("--context", type=int, default=CONTEXT, metavar="TOKENS", help=f"their most [{CONTEXT}]")
    options = parser.parse_args(arguments)
    try:
        build(options.output, documents(options.documents, options.context))
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _texts(size: int) -> Iterator[Document]:
    """Modules and chapters of the standard library, of all kinds, until they have `size` bytes."""

    def place(document: Document) -> bytes:
        return hashlib.sha256(document["meta"]["path"].encode()).digest()

    for document in sorted(standard_library(), key=place):
        if size <= 0:
            return
        yield document
        size -= len(document["text"].encode())


def _noise(words: int) -> str:
    unit = NOISE.split(" ")
    return " ".join((unit * (words // len(unit) + 1))[:words])


def _write(file: Path, content: bytes) -> None:
    """The same bytes are not written anew: token files name the time of what they were made
    from."""
    if not file.is_file() or file.read_bytes() != content:
        write_file(file, content)


if __name__ == "__main__":
    sys.exit(main())
