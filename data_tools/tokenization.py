"""Documents to Megatron's .bin/.idx with the exact ids of the tokenizer, and a receipt.

    receipt = tokenize(["data/"], "tokenizer.model", "out/corpus")
    receipt["counts"]["tokens"], receipt["reused"]

Input order is kept and the bytes are the same for any number of workers. Killed anywhere and called
again, it goes on; finished and called again, it says so. Work in progress lies in PREFIX.work/,
PREFIX.* appears when all is done. Refuses a tokenizer without EOD when EOD is asked for, outputs
made from something else (unless `overwrite`), and more bad lines than `max_rejected` allows.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools import indexed
from data_tools.assembly import Assembler
from data_tools.corpus import WINDOW_BYTES, Source, find_sources
from data_tools.documents import HARMLESS
from data_tools.encoding import Encoder, make_encoder
from data_tools.errors import Failure, UserError
from data_tools.files import checksum, write_json
from data_tools.options import Allowance, Options
from data_tools.pair import shuffled
from data_tools.parts import Part, read_part
from data_tools.progress import Progress
from data_tools.publication import finished, publish_all, work_folder
from data_tools.receipt import FORMAT, command_line, describe_tokenizer, read_receipt, versions
from data_tools.shares import SPOOLED, Share, share_out
from data_tools.spool import spool_parts
from data_tools.tokenizer import Tokenizer
from data_tools.workers import Setup, Workers

_PARTS_AHEAD = 512  # finished ones that may lie on the disk while an earlier one is at work


def tokenize(
    inputs: Sequence[str],
    tokenizer: str | os.PathLike[str],
    prefix: str | os.PathLike[str],
    options: Options = Options(),
    *,
    workers: int = 1,
    max_rejected: str = "0.001",
    eod_token: str | None = None,
    bos_token: str | None = None,
    overwrite: bool = False,
    window_bytes: int = WINDOW_BYTES,
    fast: bool = True,
    quiet: bool = True,
) -> dict[str, Any]:
    """Write PREFIX.bin, .idx, .receipt.json (and .rejected.jsonl); returns the receipt.

    `receipt["reused"]` is true when the files were already there, made from the same things.
    Raises `UserError` (exit code 2) and `Failure` (exit code 1).
    """
    prefix = indexed.prefix(prefix, "--output ")
    allowance = Allowance.parse(max_rejected)
    if workers < 1:
        raise UserError(f"--workers {workers} does no work: write 1 or more")
    sources = find_sources(inputs, window_bytes)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our processes are the parallelism
    setup = Setup(
        sources,
        str(tokenizer),
        eod_token,
        bos_token,
        fast,
        prefix.with_name(f"{prefix.name}.work") / "parts",
    )
    loaded = setup.tokenizer()
    _refuse_missing_tokens(loaded, options)
    encoder = make_encoder(loaded, fast)
    if not encoder.note:  # the kernel takes texts of any length, which is another output
        options = replace(options, max_uncut_bytes=0)
    wanted = {
        "inputs": [{"path": s.path, "size": s.size, "mtime_ns": s.mtime_ns} for s in sources],
        "tokenizer": {"hash": loaded.hash, "eod_id": loaded.eod_id, "bos_id": loaded.bos_id},
        "options": options.recorded(),
    }
    known = finished(prefix, wanted, overwrite)
    if known is not None:
        return known
    with work_folder(prefix, wanted, overwrite) as folder:
        if not (folder / "publish.json").exists():
            run = _Run(
                folder, sources, loaded, encoder, options, prefix, allowance, setup, workers, quiet
            )
            receipt = {
                "format": FORMAT,
                "kind": "tokens",
                "wanted": wanted,
                **run.run(),
                "versions": versions(),
                "command": command_line(),
            }
            write_json(folder / "publish.json", receipt)
        return publish_all(folder, prefix)


def _refuse_missing_tokens(tokenizer: Tokenizer, options: Options) -> None:
    for asked, found, flag, other in (
        (options.append_eod, tokenizer.eod_id, "--append-eod", "--eod-token"),
        (options.prepend_bos, tokenizer.bos_id, "--prepend-bos", "--bos-token"),
    ):
        if asked and found is None:
            control = ", ".join(list(tokenizer.control_tokens())[:8]) or "none"
            raise UserError(
                f"{flag} needs a token that {tokenizer.path} does not name: write {other} with "
                f"one of its control tokens ({control}), or --no{flag[1:]}"
            )


class _Run:
    """One run over all parts, from wherever the last one stopped."""

    def __init__(
        self,
        folder: Path,
        sources: list[Source],
        tokenizer: Tokenizer,
        encoder: Encoder,
        options: Options,
        prefix: Path,
        allowance: Allowance,
        setup: Setup,
        workers: int,
        quiet: bool,
    ) -> None:
        self.folder, self.sources = folder, sources
        self.tokenizer, self.encoder = tokenizer, encoder
        self.options, self.prefix, self.allowance = options, prefix, allowance
        self.setup, self.worker_count, self.quiet = setup, workers, quiet
        self.shares = share_out(sources, options)
        # A shuffle deals out whole documents again, so shards are made after it.
        shard_tokens = options.shard_tokens if options.seed is None else 0
        self.assembler = Assembler(folder, sources, self.shares, tokenizer.vocab_size, shard_tokens)
        self.ready: set[tuple[int, int]] = set()  # finished parts that were not appended yet
        self.consumed = 0  # bytes of the compressed file at hand, by the last part appended

    def run(self) -> dict[str, Any]:
        """Encode, assemble, complete; returns the receipt's body."""
        for stale in (*self.setup.folder.glob("*.spool"), *self.setup.folder.glob(".*.tmp*")):
            stale.unlink(missing_ok=True)
        if self.encoder.note:
            print(f"tokenize: {self.encoder.note}", file=sys.stderr)
        total = sum(share.end - share.start for share in self.shares)
        with (
            Workers(
                self.worker_count, self.setup, self.options, self.tokenizer, self.encoder
            ) as workers,
            Progress("tokenize", total, self.quiet) as self.progress,
        ):
            self._report()  # what an earlier run did is no part of this one's rate
            self._encode_all(workers)
        self.assembler.commit()
        self._check_rejected(final=True)
        pairs, folder = self._complete()
        entries = self._describe_inputs()
        return {
            "inputs": entries,
            "tokenizer": describe_tokenizer(self.tokenizer),
            "encoder": self.encoder.note or "the compiled kernel",
            "options": self.options.recorded(),
            "counts": self.assembler.totals.counts(),
            "lengths": self.assembler.totals.histogram,
            "outputs": {"dtype": self.assembler.writer.dtype.name, "pairs": pairs},
            "pairs_folder": str(folder.relative_to(self.folder)),
        }

    def _encode_all(self, workers: Workers) -> None:
        tasks = self._tasks()
        pending: set[Future[Part]] = set()
        exhausted = False
        try:
            while True:
                # Twice as many as workers: none ever waits, and memory and spool files stay
                # bounded.
                while (
                    not exhausted
                    and len(pending) < 2 * workers.count
                    and len(self.ready) < _PARTS_AHEAD
                ):
                    part = next(tasks, None)
                    if part is None:
                        exhausted = True
                    else:
                        pending.add(workers.submit(part))
                    if workers.pool is None:
                        break
                done, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    part = future.result()
                    self.ready.add((part.source, part.number))
                self._assemble()
                if exhausted and not pending:
                    break
        except BrokenProcessPool as error:
            raise Failure(
                "a worker process died (out of memory?); what is finished is kept: run the same "
                "command again, with fewer --workers if memory was short"
            ) from error
        if self.assembler.next[0] != len(self.shares):
            raise Failure(f"parts are missing in {self.setup.folder}: run the same command again")

    def _tasks(self) -> Iterator[Part]:
        """Parts that still have to be encoded, in input order; finished ones become ready."""
        for number, share in enumerate(self.shares):
            if share.mode == SPOOLED:
                count = yield from self._spooled(number, share)
            else:
                count = share.part_count(self.options.part_bytes)
                for part in share.parts(self.options.part_bytes):
                    if self._needed(number, part):
                        yield part
            self.assembler.part_counts[number] = count
            self.assembler.skip_finished_shares()

    def _spooled(self, number: int, share: Share):  # -> Generator[Part, None, int]
        if self.assembler.part_counts.get(number) is not None and self.assembler.next[0] > number:
            return self.assembler.part_counts[number]  # no need to decompress it again
        source = self.sources[share.source]

        def needed(k: int) -> bool:
            return self._needed(number, Part(share.source, k, 0, 0))

        return (
            yield from spool_parts(source, share.source, self.options, self.setup.folder, needed)
        )

    def _needed(self, number: int, part: Part) -> bool:
        if (number, part.number) < self.assembler.next:
            return False
        path = part.file(self.setup.folder)
        if path.exists():
            if read_part(path, verify=True) is not None:
                self.ready.add((part.source, part.number))
                return False
            path.unlink()
        return True

    def _assemble(self) -> None:
        """Append the parts that are next in line."""
        assembler = self.assembler
        while assembler.next[0] < len(self.shares):
            number, k = assembler.next
            key = (self.shares[number].source, k)
            if key not in self.ready:
                break
            self.ready.remove(key)
            result = read_part(Part(*key, 0, 0).file(self.setup.folder))
            if result is None:
                raise Failure(
                    f"a part in {self.setup.folder} is damaged: run the same command again"
                )
            assembler.append(result)
            self.consumed = result.stats["consumed"]
            self._check_rejected(final=False)
        self._report()

    def _report(self) -> None:
        assembler = self.assembler
        self.progress.update(
            self._bytes_done(),
            assembler.totals.sum("bytes"),
            documents=assembler.totals.sum("documents"),
            tokens=assembler.totals.sum("tokens"),
        )

    def _bytes_done(self) -> int:
        number, k = self.assembler.next
        done = sum(share.end - share.start for share in self.shares[:number])
        if number < len(self.shares) and k:
            share = self.shares[number]
            reached = self.consumed if share.mode == SPOOLED else k * self.options.part_bytes
            done += min(reached, share.end - share.start)
        return done

    def _check_rejected(self, final: bool) -> None:
        totals = self.assembler.totals
        rejected = sum(n for reason, n in totals.rejected.items() if reason not in HARMLESS)
        if not self.allowance.exceeded(rejected, totals.lines, final):
            return
        self.assembler.commit()
        listed = self.assembler.rejects_file
        if read_receipt(self.prefix) is None:  # else the list beside it is of what is finished
            listed = Path(f"{self.prefix}.rejected.jsonl")
            shutil.copyfile(self.assembler.rejects_file, listed)
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in totals.rejected.most_common())
        raise UserError(
            f"{rejected:,} of {totals.lines:,} lines were rejected ({reasons}), more than "
            f"--max-rejected {self.allowance.text}: look at {listed}, then allow more (the work is "
            "kept), or mend the input and write --overwrite"
        )

    def _complete(self) -> tuple[list[dict[str, Any]], Path]:
        writer = self.assembler.writer
        pairs = writer.complete(self.prefix)
        if self.options.seed is None:
            return pairs, writer.folder
        folder = self.folder / "shuffle"
        shutil.rmtree(folder, ignore_errors=True)
        writer = shuffled(writer, folder, self.options.seed, self.options.shard_tokens)
        return writer.complete(self.prefix), writer.folder

    def _describe_inputs(self) -> list[dict[str, Any]]:
        """Inputs with the checksum of their shares: what begins in one may end after it."""

        def describe(share: Share) -> dict[str, Any]:
            source = self.sources[share.source]
            entry: dict[str, Any] = {
                "path": source.path,
                "size": source.size,
                "slice": source.slice,
            }
            if source.path == "-":
                return {**entry, "checksum": ""}
            stat = os.stat(source.path)
            if (stat.st_size, stat.st_mtime_ns) != (source.size, source.mtime_ns):
                raise Failure(
                    f"{source.path} changed while it was read: run again with --overwrite"
                )
            if (share.start, share.end) != (0, source.size):
                entry |= {"start": share.start, "end": share.end}
            return {**entry, "checksum": checksum(source.path, share.start, share.end)}

        with ThreadPoolExecutor(max(1, self.worker_count)) as pool:
            return list(pool.map(describe, self.shares))
