"""Everything that decides the output of `tokenize`, in one frozen value.

    options = Options(append_eod=True, min_tokens=5)

Two runs with equal options, inputs and tokenizer give the same bytes; `recorded` is what receipts
and resumption compare. Refuses values that make no sense, in the words of the command line.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from data_tools.documents import DEFAULT_TEXT_KEYS
from data_tools.errors import UserError
from data_tools.lines import MAX_LINE_BYTES
from data_tools.long_texts import PIECE


def available_cores() -> int:
    """Those that this process may use, as Slurm allots them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# Of inputs into parts and tasks; raised when the same options come to mean another one, so that
# neither the parts of two versions are put together nor their tasks.
DIVISION = 2


@dataclass(frozen=True)
class Options:
    """`task` is (i, n): the i-th of n contiguous shares of the input, from 0."""

    append_eod: bool = True
    prepend_bos: bool = False
    text_keys: tuple[str, ...] = DEFAULT_TEXT_KEYS
    min_tokens: int = 0
    max_line_bytes: int = MAX_LINE_BYTES
    max_uncut_bytes: int = 4 * PIECE  # that a tokenizer's library is given at once; 0: any number
    shard_tokens: int = 0  # 0: one pair of files
    seed: int | None = None  # None: documents stay in input order
    task: tuple[int, int] = (0, 1)
    part_bytes: int = 16 << 20  # of input, the step of work and of resumption

    def __post_init__(self) -> None:
        check_count("--min-tokens", self.min_tokens)
        check_count("--shard-tokens", self.shard_tokens)
        if not 1 << 10 <= self.max_line_bytes <= 1 << 30:
            raise UserError(
                f"--max-line-bytes {self.max_line_bytes} is outside 1 KiB to 1 GiB: longer lines "
                "cannot be held in memory, shorter ones are no documents"
            )
        if self.max_uncut_bytes:  # pieces are of PIECE characters, of up to four bytes
            check_count("--max-uncut-bytes", self.max_uncut_bytes, 4 * PIECE)
        check_seed(self.seed)
        if not 0 <= self.task[0] < self.task[1]:
            raise UserError(
                f"--task {self.task[0]}/{self.task[1]} is no share: tasks of n are numbered 0/n "
                "to n-1/n"
            )
        if self.task[1] > 1 and (self.seed is not None or self.shard_tokens):
            raise UserError(
                "--task does not go with --seed or --shard-tokens: give those to `merge` of the "
                "tasks"
            )
        if not self.text_keys or not all(self.text_keys):
            raise UserError("--text-key is empty: name the key that holds the text")

    def recorded(self) -> dict[str, Any]:
        """As JSON values, with what else decides which lines a part or a task holds."""
        lists = {"text_keys": list(self.text_keys), "task": list(self.task)}
        return {**asdict(self), **lists, "division": DIVISION}


def check_count(flag: str, value: int, least: int = 0) -> None:
    """Raise `UserError` for a number of things below `least`."""
    if value < least:
        what = "negative" if value < 0 else "too small"
        raise UserError(f"{flag} {value} is {what}: write {least} or more")


def check_seed(seed: int | None) -> None:
    """Raise `UserError` for what the generators and hashes cannot be seeded with."""
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UserError(f"--seed {seed} is not in 0 .. 2^63 - 1: choose one that is")


def parse_task(text: str) -> tuple[int, int]:
    """ "3/16" to (3, 16)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise UserError(f"--task {text} is not of the form i/n: write 0/16 for the first of 16")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Allowance:
    """How many lines may be rejected: a count ("100") or a share of all lines ("0.001", "0.1%")."""

    text: str
    count: int | None
    share: float

    @staticmethod
    def parse(text: str) -> Allowance:
        try:
            if re.fullmatch(r"\d+", text):
                return Allowance(text, int(text), 1.0)
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
            if 0 <= share <= 1:
                return Allowance(text, None, share)
        except ValueError:
            pass
        raise UserError(
            f"--max-rejected {text} is neither a count nor a share: write 100, 0.001 or 0.1%"
        )

    def exceeded(self, rejected: int, lines: int, final: bool) -> bool:
        """Whether the run must stop. A share is judged at the end, or once the run is hopeless."""
        if self.count is not None:
            return rejected > self.count
        if final:
            return rejected > self.share * lines
        return lines >= 10_000 and rejected > max(self.share, 0.5) * lines
