"""Finished parts, in input order, to one growing pair of files that survives being killed.

    assembler = Assembler(work_folder, ...)      # goes on from the saved state, if there is one
    assembler.append(result)                     # parts in order; commits every few seconds

State and files agree at every moment: files are fsynced, then the state is replaced atomically,
then the part files it covers are removed. What lies beyond the state is cut off on the next start.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from data_tools.corpus import Source
from data_tools.files import COPY_BYTES, read_json, write_json
from data_tools.indexed import token_dtype
from data_tools.pair import PairWriter
from data_tools.parquet import rows_before
from data_tools.parts import COUNTED, PartResult
from data_tools.receipt import BINS
from data_tools.shares import Share

COMMIT_S = 5.0


@dataclass
class Totals:
    """What the receipt counts."""

    lines: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    literal: Counter[str] = field(default_factory=Counter)
    slices: dict[str, dict[str, int]] = field(default_factory=dict)
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, stats: dict[str, Any]) -> None:
        self.lines += stats["lines"]
        self.rejected.update(stats["rejected"])
        self.literal.update(stats["literal_control_tokens"])
        for name, numbers in stats["slices"].items():
            known = self.slices.setdefault(name, dict.fromkeys(COUNTED, 0))
            for key, number in zip(COUNTED, numbers, strict=True):
                known[key] += number
        self.histogram = [a + b for a, b in zip(self.histogram, stats["histogram"], strict=True)]

    def sum(self, key: str) -> int:
        return sum(numbers[key] for numbers in self.slices.values())

    def counts(self) -> dict[str, Any]:
        """As the receipt has them."""
        return {
            **{key: self.sum(key) for key in COUNTED},
            "lines": self.lines,
            "rejected": dict(sorted(self.rejected.items())),
            "literal_control_tokens": dict(sorted(self.literal.items())),
            "slices": dict(sorted(self.slices.items())),
        }


class Assembler:
    """The writer's end of `tokenize`. `next` is the place (share, part) of the next part."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        shares: Sequence[Share],
        vocab_size: int,
        shard_tokens: int,
    ) -> None:
        self.folder, self.sources, self.shares = folder, sources, shares
        self.state_file = folder / "state.json"
        self.rejects_file = folder / "rejected.jsonl"
        state = read_json(self.state_file) if self.state_file.exists() else None
        self.totals = Totals()
        self.next = (0, 0)
        self.part_counts: dict[int, int] = {}  # of shares whose number of parts is known
        self.lines = 0  # before the next part, in its source
        rejects_size = 0
        if state:
            totals = state["totals"]
            self.totals = Totals(
                totals["lines"],
                Counter(totals["rejected"]),
                Counter(totals["literal"]),
                totals["slices"],
                totals["histogram"],
            )
            self.next = (state["next"][0], state["next"][1])
            self.part_counts = {int(k): v for k, v in state["part_counts"].items()}
            self.lines = state["lines"]
            rejects_size = state["rejects_size"]
        self.writer = PairWriter(
            folder / "pairs",
            token_dtype(vocab_size),
            shard_tokens,
            state["writer"] if state else None,
        )
        self.rejects_file.touch()
        os.truncate(self.rejects_file, rejects_size)
        self.rejects = open(self.rejects_file, "ab", buffering=0)  # noqa: SIM115
        self.covered: list[Path] = []
        self.committed = time.monotonic()

    def skip_finished_shares(self) -> None:
        """Move `next` over shares whose parts have all been appended."""
        while (
            self.next[0] < len(self.shares)
            and self.part_counts.get(self.next[0], -1) == self.next[1]
        ):
            self.next = (self.next[0] + 1, 0)
            self.lines = 0

    def append(self, result: PartResult) -> None:
        """Append the part at `next`."""
        self.writer.append(result.ids(), result.lengths)
        if result.rejects:
            self._append_rejects(result.rejects)
        self.totals.add(result.stats)
        self.lines += result.stats["lines"]
        self.covered.append(result.path)
        self.next = (self.next[0], self.next[1] + 1)
        self.skip_finished_shares()
        if time.monotonic() - self.committed > COMMIT_S:
            self.commit()

    def _append_rejects(self, rejects: bytes) -> None:
        """Number the lines from the beginning of their file, not of their part."""
        share = self.shares[self.next[0]]
        before = self.lines + _lines_before(self.sources[share.source], share)
        records = [orjson.loads(line) for line in rejects.splitlines()]
        for record in records:
            record["line"] += before
        lines = (orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)
        self.rejects.write(b"".join(lines))

    def commit(self) -> None:
        """Make everything so far durable and forget the parts it came from."""
        os.fsync(self.rejects.fileno())
        state = {
            "writer": self.writer.state(),
            "next": list(self.next),
            "part_counts": self.part_counts,
            "lines": self.lines,
            "rejects_size": self.rejects.tell(),
            "totals": {
                "lines": self.totals.lines,
                "rejected": self.totals.rejected,
                "literal": self.totals.literal,
                "slices": self.totals.slices,
                "histogram": self.totals.histogram,
            },
        }
        write_json(
            self.state_file,
            {**state, "part_counts": {str(k): v for k, v in self.part_counts.items()}},
        )
        for path in self.covered:
            path.unlink(missing_ok=True)
        self.covered = []
        self.committed = time.monotonic()


def _lines_before(source: Source, share: Share) -> int:
    """Lines of a file, or rows, that begin before the share does (a task may start inside it)."""
    if share.start == 0:
        return 0
    if source.compression == "parquet":
        return rows_before(source, share.start)
    count, left = 1, share.start - 1
    with open(source.path, "rb", buffering=0) as stream:
        while left > 0:
            block = stream.read(min(left, COPY_BYTES))
            if not block:
                break
            count += block.count(b"\n")
            left -= len(block)
    return count
