"""`data-tools`: from raw documents to Megatron's token files. See `data-tools COMMAND --help`.

Exit codes: 0 done, 2 the request was wrong (one sentence says what to write), 1 something failed,
130 interrupted, 143 ended by SIGTERM. What the commands do is in commands.py; here is only what
they are called.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from data_tools import commands
from data_tools.corpus import WINDOW_BYTES
from data_tools.errors import Failure, UserError
from data_tools.lines import MAX_LINE_BYTES
from data_tools.options import Options, available_cores

EXAMPLES = {
    "tokenize": """examples:
  data-tools tokenize data/arxiv --tokenizer tokenizer.model --output tokens/arxiv --workers 16
  zstd -dc x.jsonl.zst | data-tools tokenize - --tokenizer hf_folder --eod-token '</s>' --output x
  data-tools tokenize data --tokenizer t.model --output tokens/all --task $SLURM_ARRAY_TASK_ID/64
  data-tools merge 'tokens/all.task-*.idx' --output tokens/all""",
    "train-tokenizer": """example:
  data-tools train-tokenizer data/ --vocab-size 32000 --output tokenizer.model""",
    "merge": """examples:
  data-tools merge tokens/arxiv tokens/book --output tokens/both
  data-tools merge 'tokens/all.task-*.idx' --output tokens/all --seed 1""",
    "verify": "example:\n  data-tools verify tokens/arxiv",
    "inspect": "example:\n  data-tools inspect tokens/arxiv",
    "lengths": "example:\n  data-tools lengths tokens/arxiv --contexts 4096,32768",
    "peek": "examples:\n  data-tools peek tokens/arxiv 0 -1\n  data-tools peek tokens/arxiv "
    "--sample 3",
    "split": "example:\n  data-tools split tokens/all --shares train=0.98,valid=0.01,test=0.01",
    "download": """example:
  data-tools download urls.txt --output data/ --checksums arxiv_SHA256SUMS.txt""",
    "dedup": """examples:
  data-tools dedup data/ --report duplicates.jsonl
  data-tools dedup data/ --report near.jsonl --near --output clean/""",
}


_RESUMED = ("tokenize", "download")  # the others begin anew


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence, as every refusal, instead of all usage lines."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = build_parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        given.run(given)
        sys.stdout.flush()
    except (UserError, Failure) as error:
        print(f"data-tools {given.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `data-tools peek ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A full disk does not say itself which file it was that had no place.
        place = error.filename or getattr(given, "output", None) or getattr(given, "prefix", None)
        words = f"{error.strerror} ({place})" if place and error.strerror else str(error)
        print(f"data-tools {given.command}: {words}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"data-tools {given.command}: not enough memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = ": the same command goes on where it was" if given.command in _RESUMED else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="data-tools", description="From raw documents to Megatron's token files.")
    made = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Any:
        added = made.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXAMPLES[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print the result as JSON")
        added.set_defaults(run=run)
        return added.add_argument

    _add_tokenize(command("tokenize", commands.run_tokenize, "encode documents to .bin/.idx"))
    _add_train(
        command("train-tokenizer", commands.run_train, "train a sentencepiece BPE tokenizer")
    )
    _add_download(command("download", commands.run_download, "fetch what a list of URLs names"))
    _add_dedup(command("dedup", commands.run_dedup, "report, and on request remove, duplicates"))

    add = command("merge", commands.run_merge, "join .bin/.idx pairs by copying bytes")
    add("inputs", nargs="+", metavar="PREFIX", help="prefixes, or globs of .idx files")
    _add_output(add)
    add("--seed", type=int, help="put documents in an order this seed decides (as given)")
    add("--shard-tokens", type=int, default=0, help="several pairs of about so many tokens (one)")

    add = command("split", commands.run_split, "train, validation and test sets by document hash")
    add("prefix", metavar="PREFIX")
    add("--shares", default="train=0.98,valid=0.01,test=0.01", help="NAME=SHARE,... (%(default)s)")
    add("--seed", type=int, default=0, help="another seed, another split (%(default)s)")
    add("--overwrite", action="store_true", help="replace outputs made from something else")

    add = command("verify", commands.run_verify, "find damage in a .bin/.idx pair, and say where")
    add("prefixes", nargs="+", metavar="PREFIX")
    add = command("inspect", commands.run_inspect, "counts, percentiles and histogram of lengths")
    add("prefix", metavar="PREFIX")
    add = command(
        "lengths", commands.run_lengths, "share of tokens in documents longer than contexts"
    )
    add("prefix", metavar="PREFIX")
    add("--contexts", default="4096,8192,32768,131072", help="tokens (%(default)s)")
    add = command("peek", commands.run_peek, "decode documents")
    add("prefix", metavar="PREFIX")
    add("documents", nargs="*", type=int, help="numbers from 0; negative ones from the end")
    add("--sample", type=int, default=0, help="and so many at random")
    add("--seed", type=int, default=0, help="which ones (%(default)s)")
    add("--tokenizer", help="where the receipt's tokenizer is now")
    add("--max-tokens", type=int, default=0, help="cut longer documents (whole ones)")
    return parser


def _add_inputs(add: Any) -> None:
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs or - (JSONL plain, .gz, .zst, .bz2, .xz; Parquet)",
    )
    add(
        "--text-key",
        default="text,raw_content",
        help="key of the text; of several, the first that is present (%(default)s)",
    )
    add(
        "--max-window-bytes",
        type=int,
        default=WINDOW_BYTES,
        help="memory that the window of one .zst or .xz, or metadata and pages of one .parquet, "
        "may take: 1 MiB to 2 GiB (%(default)s)",
    )


def _add_output(add: Any) -> None:
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .receipt.json")
    add("--overwrite", action="store_true", help="replace an output made from something else")


def _add_tokenize(add: Any) -> None:
    _add_inputs(add)
    _add_output(add)
    add("--tokenizer", required=True, help="sentencepiece .model, tokenizer.json, or their folder")
    add("--workers", type=int, default=available_cores(), help="processes (%(default)s)")
    switch = argparse.BooleanOptionalAction
    add("--append-eod", action=switch, default=True, help="end every document with EOD (yes)")
    add("--prepend-bos", action=switch, default=False, help="begin every document with BOS (no)")
    add("--eod-token", help="the piece that ends a document, where the tokenizer does not say")
    add("--bos-token", help="the piece that begins a document, where the tokenizer does not say")
    add("--min-tokens", type=int, default=0, help="leave out shorter documents (%(default)s)")
    longest = MAX_LINE_BYTES
    add("--max-line-bytes", type=int, default=longest, help="reject longer lines (%(default)s)")
    add(
        "--max-uncut-bytes",
        type=int,
        default=Options.max_uncut_bytes,
        help="reject texts with a longer piece (or one that normalising makes that many characters "
        "of) that only the tokenizer's own library can encode, in up to 400 times its size of "
        "memory; 0 takes all (%(default)s)",
    )
    add("--shard-tokens", type=int, default=0, help="several pairs of about so many tokens (one)")
    add("--seed", type=int, help="put documents in an order this seed decides (input order)")
    add("--task", default="0/1", metavar="I/N", help="encode the I-th of N shares; then `merge`")
    add(
        "--max-rejected",
        default="0.001",
        help="rejected lines allowed: a count, a share, or a percentage (%(default)s)",
    )
    add("--fast", action=switch, default=True, help="use the compiled kernel where exact (yes)")
    add("--quiet", action="store_true", help="no progress")


def _add_train(add: Any) -> None:
    _add_inputs(add)
    add("--vocab-size", type=int, required=True, help="pieces, control and byte pieces included")
    add("--output", required=True, metavar="FILE", help="writes FILE (.model is added to a prefix)")
    add("--overwrite", action="store_true", help="replace a model made from something else")
    add("--seed", type=int, default=0, help="which documents are drawn (%(default)s)")
    add("--sample-bytes", type=int, default=200_000_000, help="text to train on (%(default)s)")
    add("--character-coverage", type=float, default=0.99995, help="share that becomes pieces")
    add(
        "--slice-shares",
        default="",
        metavar="SLICE=SHARE,..",
        help="of the text to train on, by slice; unset: as in the inputs",
    )


def _add_download(add: Any) -> None:
    add("manifest", help="a URL a line, with or without its checksum")
    add("--output", required=True, metavar="FOLDER")
    add("--checksums", help="a file of `checksum  name` lines")
    add("--connections", type=int, default=8, help="files fetched at once (%(default)s)")
    add("--quiet", action="store_true", help="no progress")


def _add_dedup(add: Any) -> None:
    _add_inputs(add)
    add("--report", required=True, metavar="FILE", help="one JSON line a duplicate")
    add("--near", action="store_true", help="also similar documents (MinHash)")
    add("--threshold", type=float, default=0.8, help="Jaccard similarity (%(default)s)")
    add("--output", metavar="FOLDER", help="write the inputs (JSONL files) without duplicates here")
    add("--overwrite", action="store_true", help="replace files that are there, inputs never")


if __name__ == "__main__":
    raise SystemExit(main())
