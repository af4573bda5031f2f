"""Fetch the files a manifest lists: in parallel, resumable, verified.

    download("urls.txt", "data/", connections=8)

A file appears under its name only when it is whole: it has its checksum, or else the length that
the server tells. Refuses a second download into one folder. What a manifest is: manifest.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data_tools.errors import Failure, UserError
from data_tools.files import replace, write_file
from data_tools.lock import exclusive
from data_tools.manifest import Item, read_manifest
from data_tools.progress import Progress

_BLOCK = 1 << 20
PAUSE_S = 1.0  # before the second attempt; doubled for each one after it


def download(
    manifest: str,
    output: str | os.PathLike[str],
    *,
    checksums: str | None = None,
    connections: int = 8,
    attempts: int = 5,
    quiet: bool = True,
) -> dict[str, Any]:
    """Fetch what is missing; returns how many files there are, were fetched, and lack a checksum.

    Raises `Failure` that names every file that could not be fetched whole; the others stay.
    """
    if connections < 1:
        raise UserError(f"--connections {connections} fetches nothing: write 1 or more")
    items = read_manifest(manifest, checksums)
    folder = Path(output)
    failures: list[str] = []
    fetched = size = received = unseen = 0
    # What is whole is of use in a folder that nobody may write, too.
    whole = all((folder / item.path).is_file() for item in items)
    lock = None if whole else exclusive(folder / ".download.lock", f"--output {output}")
    with (
        lock or contextlib.nullcontext(),
        Progress("download", len(items), quiet, unit=" files") as progress,
        _fetching(items, folder, connections, attempts) as results,
    ):
        for done in range(len(items)):
            progress.update(done, received, files=done)
            item, found = results.get()
            if isinstance(found, Unwritable) or not isinstance(found, Failure | tuple):
                raise found
            if isinstance(found, Failure):
                failures.append(f"{item.path}: {found}")
            else:
                fetched += found[0]
                size += found[1]
                received += found[1] * found[0]
                unseen += not item.checksum and not found[0]
    if failures:
        raise Failure(
            f"{len(failures)} of {len(items)} files could not be fetched (the same command goes "
            "on): " + "; ".join(sorted(failures)[:5])
        )
    return {
        "files": len(items),
        "fetched": fetched,
        "bytes": size,
        "without_checksum": sum(not item.checksum for item in items),
        "not_compared": unseen,
    }


class Unwritable(Failure):
    """The output cannot be written: no other file has a better chance."""


class _Stopped(Exception):
    """The run ends before this file does."""


@contextlib.contextmanager
def _fetching(
    items: Sequence[Item], folder: Path, connections: int, attempts: int
) -> Iterator[SimpleQueue]:
    """Threads that fetch, and the queue of (item, result or exception).

    Daemons: a server that falls silent keeps no thread of theirs, and so not the process, from
    ending. What is partly there stays for the next run.
    """
    todo: SimpleQueue[Item | None] = SimpleQueue()
    results: SimpleQueue[tuple[Item, Any]] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set() and (item := todo.get()) is not None:
            try:
                results.put((item, _fetch(item, folder, attempts, stop)))
            except _Stopped:
                return
            except Exception as error:
                results.put((item, error))

    threads = [
        threading.Thread(target=work, daemon=True) for _ in range(min(connections, len(items)))
    ]
    for entry in (*items, *[None] * len(threads)):
        todo.put(entry)
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        stop.set()
        deadline = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _fetch(item: Item, folder: Path, attempts: int, stop: threading.Event) -> tuple[bool, int]:
    """Fetch one file unless it is there and right; returns whether it was fetched, and its size."""
    final = folder / item.path
    try:
        if final.is_file() and (not item.checksum or _matches(final, item.checksum)):
            return False, final.stat().st_size
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritable(f"{final}: {error.strerror}") from error
    partial = final.with_name(f".{final.name}.part")
    problem = "no attempt was made"
    for attempt in range(attempts):
        if stop.wait(min(30.0, PAUSE_S * 2 ** (attempt - 1)) if attempt else 0):
            raise _Stopped
        try:
            _receive(item, partial, stop)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} from {item.url}"
            if error.code == 416:  # the partial file does not fit the remote one: begin again
                _discard(partial)
            elif error.code < 500 and error.code not in (408, 429):
                break
            continue
        except (OSError, http.client.HTTPException) as error:
            problem = f"{error} ({item.url})"
            continue
        if item.checksum and not _matches(partial, item.checksum):
            _discard(partial)
            problem = f"the content does not have the checksum {item.checksum}"
            continue
        with _writing(final):
            replace(partial, final)
        _discard(partial)
        return True, final.stat().st_size
    raise Failure(problem)


def _tag_file(partial: Path) -> Path:
    """Holds what the server called the version of which `partial` is the beginning."""
    return partial.with_suffix(".tag")


def _discard(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _tag_file(partial).unlink(missing_ok=True)


def _receive(item: Item, partial: Path, stop: threading.Event) -> None:
    """Append to `partial` what it lacks. Raises when the connection ends early.

    It goes on only where the server confirms that the file is still the same (If-Range, RFC 9110,
    section 13.1.5), or a checksum will tell.
    """
    tag_file = _tag_file(partial)
    tag = tag_file.read_text() if tag_file.exists() else ""
    have = partial.stat().st_size if partial.exists() and (tag or item.checksum) else 0
    headers = {"Range": f"bytes={have}-", **({"If-Range": tag} if tag else {})} if have else {}
    request = urllib.request.Request(item.url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = have > 0 and response.status == 206
        total = _total_bytes(response, resumed)
        if total is None and not item.checksum:
            raise Failure(
                "the server tells neither its length nor its end, so nothing shows whether it is "
                "whole: give a checksum"
            )
        size = have if resumed else 0
        with _writing(partial):
            stream = open(partial, "ab" if resumed else "wb", buffering=0)  # noqa: SIM115
            if not resumed:  # only now is nothing left of what an older tag belongs to
                write_file(tag_file, _strong_tag(response))
        with stream:
            while block := response.read1(_BLOCK):
                if stop.is_set():
                    raise _Stopped
                view = memoryview(block)
                with _writing(partial):
                    while len(view):
                        view = view[stream.write(view) :]
                size += len(block)
            with _writing(partial):
                os.fsync(stream.fileno())
    if total is not None and total >= 0 and size != total:
        if size > total:
            _discard(partial)
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")


def _total_bytes(response: http.client.HTTPResponse, resumed: bool) -> int | None:
    """Length of the whole file; -1 where chunks mark its end, None where nothing does."""
    if resumed:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdigit() else -1 if response.chunked else None


def _strong_tag(response: http.client.HTTPResponse) -> str:
    tag = response.headers.get("ETag", "")
    return "" if tag.startswith("W/") else tag or response.headers.get("Last-Modified", "")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the disk are no errors of the network: trying again mends nothing."""
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{path} cannot be written ({error.strerror})") from error


def _matches(path: Path, checksum: str) -> bool:
    algorithm, digits = checksum.split(":")
    digest = hashlib.new(algorithm)
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == digits
