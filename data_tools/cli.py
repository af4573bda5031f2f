"""`data-tools`: from raw documents to Megatron's token files. See `data-tools COMMAND --help`.

Exit codes: 0 done, 2 the request was wrong (one sentence says what to write), 1 something failed.
Each command is one function here: arguments in, a library call, a few printed lines out. Modules
are imported by the command that needs them, so that every command starts at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from data_tools.errors import Failure, UserError

TOKENIZE_EXAMPLE = """examples:
  data-tools tokenize data/arxiv --tokenizer tokenizer.model --output tokens/arxiv --workers 16
  zstd -dc x.jsonl.zst | data-tools tokenize - --tokenizer tokenizer.json --eod-token '</s>' --output x
  data-tools tokenize data --tokenizer t.model --output tokens/all --task $SLURM_ARRAY_TASK_ID/64
  data-tools merge 'tokens/all.task-*.idx' --output tokens/all"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = build_parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        options.run(options)
        sys.stdout.flush()
    except (UserError, Failure) as error:
        print(f"data-tools {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `data-tools peek ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"data-tools {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="data-tools", description="From raw documents to token files."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=example,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print the result as JSON")
        made.set_defaults(run=run)
        return made

    _add_tokenize(command("tokenize", _tokenize, "encode documents to .bin/.idx", TOKENIZE_EXAMPLE))
    _add_train(
        command(
            "train-tokenizer",
            _train,
            "train a sentencepiece BPE tokenizer with LLaMA-like defaults",
            "example:\n  data-tools train-tokenizer data/ --vocab-size 32000 --output tokenizer.model",
        )
    )
    inspect = command(
        "inspect",
        _inspect,
        "counts and lengths of a .bin/.idx pair",
        "example:\n  data-tools inspect tokens/arxiv",
    )
    inspect.add_argument("prefix", help="PREFIX of PREFIX.bin and PREFIX.idx")
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs or - (JSONL plain, .gz, .zst, .bz2, .xz; Parquet)",
    )
    parser.add_argument(
        "--text-key",
        default="text,raw_content",
        help="key of the text; of several, the first that is present (%(default)s)",
    )


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    add = parser.add_argument
    add(
        "--tokenizer",
        required=True,
        help="sentencepiece .model, tokenizer.json, or a folder with either",
    )
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .receipt.json")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    switch = argparse.BooleanOptionalAction
    add("--append-eod", action=switch, default=True, help="end every document with EOD")
    add("--prepend-bos", action=switch, default=False, help="begin every document with BOS")
    add("--eod-token", help="the piece that ends a document, where the tokenizer does not say")
    add("--bos-token", help="the piece that begins a document, where the tokenizer does not say")
    add("--min-tokens", type=int, default=0, help="leave out shorter documents (%(default)s)")
    add("--max-line-bytes", type=int, default=64 << 20, help="reject longer lines (%(default)s)")
    add(
        "--shard-tokens",
        type=int,
        default=0,
        help="several pairs of about so many tokens (one pair)",
    )
    add("--seed", type=int, help="put documents in an order this seed decides (input order)")
    add(
        "--task",
        default="0/1",
        metavar="I/N",
        help="encode the I-th of N shares, from 0; then `merge`",
    )
    add(
        "--max-rejected",
        default="0.001",
        help="rejected lines allowed before exit code 2: a count, a share, or a percentage (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an output made from something else")
    add("--fast", action=switch, default=True, help="use the compiled kernel where it is exact")
    add("--quiet", action="store_true", help="no progress")


def _tokenize(given: argparse.Namespace) -> None:
    from data_tools.options import Options, parse_task
    from data_tools.tokenization import tokenize

    task = parse_task(given.task)
    options = Options(
        append_eod=given.append_eod,
        prepend_bos=given.prepend_bos,
        text_keys=_text_keys(given.text_key),
        min_tokens=given.min_tokens,
        max_line_bytes=given.max_line_bytes,
        shard_tokens=given.shard_tokens,
        seed=given.seed,
        task=task,
    )
    prefix = given.output
    if task[1] > 1:
        prefix = f"{prefix}.task-{task[0]:05d}-of-{task[1]:05d}"
    receipt = tokenize(
        given.inputs,
        given.tokenizer,
        prefix,
        options,
        workers=given.workers,
        max_rejected=given.max_rejected,
        eod_token=given.eod_token,
        bos_token=given.bos_token,
        overwrite=given.overwrite,
        fast=given.fast,
        quiet=given.quiet,
    )
    counts = receipt["counts"]
    rejected = sum(counts["rejected"].values())
    _print(
        given,
        receipt,
        f"{prefix}.bin/.idx: {_done(receipt)}, {counts['documents']:,} documents, "
        f"{counts['tokens']:,} tokens, {rejected:,} lines rejected"
        + (f" (see {prefix}.rejected.jsonl)" if rejected else ""),
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    add = parser.add_argument
    add("--vocab-size", type=int, required=True, help="pieces, control and byte pieces included")
    add(
        "--output",
        required=True,
        metavar="FILE",
        help="writes FILE (.model is added if it lacks it)",
    )
    add("--seed", type=int, default=0, help="which documents are drawn (%(default)s)")
    add("--sample-bytes", type=int, default=200_000_000, help="text to train on (%(default)s)")
    add(
        "--character-coverage",
        type=float,
        default=0.99995,
        help="share of characters that become pieces",
    )


def _train(given: argparse.Namespace) -> None:
    from data_tools.tokenizer_training import train_tokenizer

    receipt = train_tokenizer(
        given.inputs,
        given.output,
        given.vocab_size,
        sample_bytes=given.sample_bytes,
        seed=given.seed,
        character_coverage=given.character_coverage,
        text_keys=_text_keys(given.text_key),
    )
    model, sample = receipt["model"], receipt["sample"]
    _print(
        given,
        receipt,
        f"{model['path']}: {_done(receipt)}, {model['vocab_size']:,} pieces from "
        f"{sample['documents']:,} documents, {sample['bytes'] / 1e6:.1f} MB",
    )


def _inspect(given: argparse.Namespace) -> None:
    from data_tools.indexed import read_index

    index = read_index(given.prefix)
    print(
        f"{given.prefix}: {index.documents:,} documents, {index.tokens:,} tokens, {index.dtype.name}"
    )


def _text_keys(text: str) -> tuple[str, ...]:
    return tuple(key.strip() for key in text.split(","))


def _done(receipt: dict[str, Any]) -> str:
    return "already done" if receipt["reused"] else "written"


def _print(given: argparse.Namespace, result: Any, text: str) -> None:
    if given.json:
        import orjson

        print(orjson.dumps(result, option=orjson.OPT_INDENT_2).decode())
    else:
        print(text)


if __name__ == "__main__":
    raise SystemExit(main())
