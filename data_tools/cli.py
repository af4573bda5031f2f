"""`data-tools`: from raw documents to Megatron's token files. See `data-tools COMMAND --help`.

Exit codes: 0 done, 2 the request was wrong (one sentence says what to write), 1 something failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data_tools.errors import Failure, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (UserError, Failure) as error:
        print(f"data-tools {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="data-tools", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train-tokenizer", allow_abbrev=False)
    train.add_argument("inputs", nargs="+")
    train.add_argument("--vocab-size", type=int, required=True)
    train.add_argument("--output", required=True)
    train.add_argument("--seed", type=int, default=0)
    train.set_defaults(run=_train)

    tokenize = commands.add_parser("tokenize", allow_abbrev=False)
    tokenize.add_argument("inputs", nargs="+")
    tokenize.add_argument("--tokenizer", required=True)
    tokenize.add_argument("--output", required=True)
    tokenize.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True)
    tokenize.set_defaults(run=_tokenize)

    inspect = commands.add_parser("inspect", allow_abbrev=False)
    inspect.add_argument("prefix")
    inspect.set_defaults(run=_inspect)
    return parser


def _train(options: argparse.Namespace) -> None:
    from data_tools.vocabulary import train_tokenizer

    receipt = train_tokenizer(options.inputs, options.output, options.vocab_size, seed=options.seed)
    model = receipt["model"]
    done = "already done" if receipt["reused"] else "written"
    print(
        f"{model['path']}: {done}, {model['vocab_size']:,} pieces from {receipt['sample']['bytes'] / 1e6:.1f} MB"
    )


def _tokenize(options: argparse.Namespace) -> None:
    from data_tools.tokenization import tokenize

    receipt = tokenize(
        options.inputs, options.tokenizer, options.output, append_eod=options.append_eod
    )
    counts = receipt["counts"]
    done = "already done" if receipt["reused"] else "written"
    print(
        f"{options.output}.bin/.idx: {done}, {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
        f"{sum(counts['rejected'].values()):,} lines rejected"
    )


def _inspect(options: argparse.Namespace) -> None:
    from data_tools.indexed import read_index

    index = read_index(options.prefix)
    print(
        f"{options.prefix}: {index.documents:,} documents, {index.tokens:,} tokens, {index.dtype.name}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
