"""Worker processes that encode parts: they share nothing, end with their parent, and never hang it.

    with Workers(count, setup, options, tokenizer, encoder) as workers:
        future = workers.submit(part)

A worker that dies (killed for memory, say) ends the run with a `Failure`; what was finished stays.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus import Source
from data_tools.encoding import Encoder, make_encoder
from data_tools.options import Options
from data_tools.parts import Part, Worker, encode_part
from data_tools.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Setup:
    """What a worker needs to build its tokenizer and find its input."""

    sources: list[Source]
    tokenizer_path: str
    eod_token: str | None
    bos_token: str | None
    fast: bool
    folder: Path

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(
            self.tokenizer_path, eod_token=self.eod_token, bos_token=self.bos_token
        )


_worker: Worker | None = None  # one a process
_prepared: tuple[Tokenizer, Encoder] | None = None  # made before forking, inherited


class Workers:
    """`count` processes; with one, the work is done in this process, part by part."""

    def __init__(
        self, count: int, setup: Setup, options: Options, tokenizer: Tokenizer, encoder: Encoder
    ) -> None:
        global _prepared
        self.count, self.options = count, options
        self.pool: ProcessPoolExecutor | None = None
        self.local = Worker(setup.sources, tokenizer, encoder, setup.folder)
        if count > 1:
            # Forking is quickest (tables and compiled code are shared), and safe without threads.
            fork = sys.platform == "linux" and threading.active_count() == 1
            _prepared = (tokenizer, encoder)
            self.pool = ProcessPoolExecutor(
                count,
                multiprocessing.get_context("fork" if fork else "spawn"),
                _start,
                (setup, os.getpid()),
            )

    def submit(self, part: Part) -> Future[Part]:
        """Encode a part, now or in a worker."""
        if self.pool is not None:
            return self.pool.submit(_encode, part, self.options)
        future: Future[Part] = Future()
        future.set_result(_encode_in(self.local, part, self.options))
        return future

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        global _prepared
        _prepared = None
        if self.pool is None:
            return
        if kind is not None:  # do not wait for work nobody wants
            for process in list((self.pool._processes or {}).values()):
                process.kill()
        self.pool.shutdown(wait=True, cancel_futures=True)


def _start(setup: Setup, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if _prepared is not None:
        tokenizer, encoder = _prepared
    else:
        tokenizer = setup.tokenizer()
        encoder = make_encoder(tokenizer, setup.fast)
    _worker = Worker(setup.sources, tokenizer, encoder, setup.folder)


def _end_with(parent: int) -> None:
    """A killed parent cannot tell its workers: they look."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode(part: Part, options: Options) -> Part:
    assert _worker is not None
    return _encode_in(_worker, part, options)


def _encode_in(worker: Worker, part: Part, options: Options) -> Part:
    parquet = worker.sources[part.source].compression == "parquet"
    _reuse_memory(large=not parquet and not worker.encoder.note)
    return encode_part(part, options, worker)


def _reuse_memory(large: bool) -> None:
    """Keep freed memory for the next document: by default the C library returns large blocks to the
    system, and a document of 16 MB then spends as long on fresh pages as on its ids. Beside the
    pages of a Parquet file, or what a tokenizer's library needs, there is no room for that: those
    of 31 MiB and more go back then."""
    if hasattr(library := ctypes.CDLL(None), "mallopt"):  # glibc's
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        library.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        library.mallopt(M_MMAP_THRESHOLD, 31 << 20)  # it takes no more than 32
        library.mallopt(M_MMAP_MAX, 0 if large else 1 << 16)
