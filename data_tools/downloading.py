"""Fetch the files a manifest lists: in parallel, resumable, verified.

    download("urls.txt", "data/", connections=8)

A manifest is text: a URL a line (RedPajama's own lists), optionally with a checksum before or after
it ("sha256:..." or bare hex of md5, sha1, sha256), or `checksum  name` lines in a second file given
as `checksums` (RedPajama's sha256 lists). A file appears under its name only when it is whole: it
has its checksum, or else the length the server tells. Files keep the path of their URL below what
all URLs share. Refuses a path that leaves the folder, and a second download into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from queue import SimpleQueue
from typing import Any

from data_tools.errors import Failure, UserError
from data_tools.files import replace, write_file
from data_tools.lock import exclusive
from data_tools.progress import Progress

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}
_CHECKSUM = re.compile(r"(?:(md5|sha1|sha256):)?([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64})")
_BLOCK = 1 << 20
PAUSE_S = 1.0  # before the second attempt; doubled for each one after it


@dataclass(frozen=True)
class Item:
    """One file to fetch: its URL, its path below the output folder, "algorithm:hex" or ""."""

    url: str
    path: str
    checksum: str


def read_manifest(manifest: str, checksums: str | None = None) -> list[Item]:
    """The items of a manifest. Raises `UserError` naming the line that cannot be understood."""
    known = _read_checksums(checksums) if checksums else {}
    entries: list[tuple[str, str]] = []
    for number, line in enumerate(_read_text(manifest).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        urls = [word for word in words if "://" in word]
        sums = [word for word in words if _CHECKSUM.fullmatch(word)]
        if len(urls) != 1 or len(urls) + len(sums) != len(words) or len(sums) > 1:
            raise UserError(
                f"{manifest}:{number}: {line[:80]!r} is not a URL with or without a checksum"
            )
        try:
            url = _ascii(urls[0])
        except ValueError as error:
            raise UserError(f"{manifest}:{number}: {urls[0]} is not a URL ({error})") from error
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise UserError(
                f"{manifest}:{number}: {urls[0]} is neither http nor https: write one that is"
            )
        entries.append((url, _normal(sums[0]) if sums else ""))
    if not entries:
        raise UserError(f"{manifest} lists no URL: write one a line")
    paths = [PurePosixPath("/" + _path_of(url).lstrip("/")) for url, _ in entries]
    root = PurePosixPath(os.path.commonpath([str(path.parent) for path in paths]))
    items = []
    for (url, digest), path in zip(entries, paths, strict=True):
        relative = path.relative_to(root)
        if ".." in relative.parts or not path.name or not str(path).isprintable():
            raise UserError(
                f"{manifest}: {url} has no file name or leaves the output folder: mend it"
            )
        found = digest or next(
            (known[n] for n in (str(path).lstrip("/"), str(relative), path.name) if n in known), ""
        )
        items.append(Item(url, str(relative), found))
    files = Counter(item.path for item in items)
    if doubled := [path for path, times in files.items() if times > 1]:
        raise UserError(f"{manifest} lists {doubled[0]} twice: list every file once")
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    if both := sorted(folders & files.keys()):
        raise UserError(f"{manifest} makes {both[0]} a file and a folder: fetch them one by one")
    return items


def _ascii(url: str) -> str:
    """The URL as it goes over the wire (RFC 3986). Raises ValueError where there is none."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname and parts.scheme != "file":
        raise ValueError("it names no host")
    _ = parts.port  # raises what urlsplit lets pass
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=?~") for part in parts[2:4])
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def _path_of(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path)


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
    fetched = size = unseen = 0
    with (
        exclusive(folder / ".download.lock", f"--output {output}"),
        Progress("download", len(items), quiet) as progress,
        _fetching(items, folder, connections, attempts) as results,
    ):
        for done in range(1, len(items) + 1):
            item, found = results.get()
            if isinstance(found, Unwritable) or not isinstance(found, Failure | tuple):
                raise found
            if isinstance(found, Failure):
                failures.append(f"{item.path}: {found}")
            else:
                fetched += found[0]
                size += found[1]
                unseen += not item.checksum and not found[0]
            progress.update(done, done, 0, size)
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


def _normal(text: str) -> str:
    match = _CHECKSUM.fullmatch(text)
    assert match is not None
    algorithm, digits = match.groups()
    return f"{algorithm or _ALGORITHMS[len(digits)]}:{digits.lower()}"


def _read_checksums(path: str) -> dict[str, str]:
    """`sha256sum`'s format: digits, then a name."""
    found: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        words: Sequence[str] = line.split(maxsplit=1)
        if not words:
            continue
        if len(words) != 2 or not _CHECKSUM.fullmatch(words[0]):
            raise UserError(f"{path}:{number}: {line[:80]!r} is not a checksum and a name")
        found[words[1].lstrip("*").strip().removeprefix("./")] = _normal(words[0])
    return found


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): name a list of URLs") from error
