"""`megatron-ext COMMAND`: theory, evaluation and reports beside `pretrain.py`.

    megatron-ext --help
    megatron-ext bound --context 32768
    python -m megatron_ext.cli doctor

A command is one module here with a function of its name: write `cli/plan.py` with `def plan(..)`
and add "plan" to COMMANDS. Only the module of the command in hand is imported, so that one which
needs torch slows no other down; modules import torch within their function.

Exit codes: 0, 2 for the user's mistake (one sentence, no traceback), 1 for a failure.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from megatron_ext.errors import UserError

COMMANDS = (
    "bound",
    "plan",
    "schema",
    "evaluate",
    "checkpoint",
    "export-hf",
    "import-hf",
    "report",
    "sweep",
    "status",
    "doctor",
)


class _Commands(TyperGroup):
    """Finds a command by its name and imports its module only then."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        function = getattr(importlib.import_module(f"megatron_ext.cli.{name}"), name)
        one = typer.Typer(add_completion=False, rich_markup_mode=None)
        one.command(cmd_name)(function)
        return typer.main.get_command(one)


app = typer.Typer(
    cls=_Commands,
    name="megatron-ext",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _program() -> None:
    """How the base of RoPE bounds context length: theory, evaluation, reports.

    Training itself is `python pretrain.py CONFIG`. Example: megatron-ext bound --context 32768
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; ends the process with the exit code."""
    try:
        app(list(arguments) if arguments is not None else None, prog_name="megatron-ext")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
