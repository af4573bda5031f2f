"""Fetch the files a manifest lists: in parallel, resumable, verified.

    download("urls.txt", "data/", connections=8)

A manifest is text: a URL a line (RedPajama's own lists), optionally with a checksum before or after
it ("sha256:..." or bare hex of md5, sha1, sha256), or `checksum  name` lines in a second file given
as `checksums` (RedPajama's sha256 lists). A file appears under its name only when it is whole.
Files keep the path of their URL below what all URLs share. Refuses a path that leaves the folder.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.errors import Failure, UserError
from data_tools.files import replace
from data_tools.progress import Progress

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}
_CHECKSUM = re.compile(r"(?:(md5|sha1|sha256):)?([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64})")
_BLOCK = 1 << 20


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
        if urllib.parse.urlsplit(urls[0]).scheme not in ("http", "https", "file"):
            raise UserError(
                f"{manifest}:{number}: {urls[0]} is neither http nor https: write one that is"
            )
        entries.append((urls[0], _normal(sums[0]) if sums else ""))
    if not entries:
        raise UserError(f"{manifest} lists no URL: write one a line")
    paths = [
        PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(url).path)) for url, _ in entries
    ]
    root = PurePosixPath(os.path.commonpath([str(path.parent) for path in paths]))
    items = []
    for (url, digest), path in zip(entries, paths, strict=True):
        relative = path.relative_to(root)
        if ".." in relative.parts or not path.name:
            raise UserError(
                f"{manifest}: {url} has no file name or leaves the output folder: mend it"
            )
        found = digest or next(
            (known[n] for n in (str(path).lstrip("/"), str(relative), path.name) if n in known), ""
        )
        items.append(Item(url, str(relative), found))
    doubled = (
        {item.path for item in items if sum(i.path == item.path for i in items) > 1}
        if len(items) < 5000
        else set()
    )
    if doubled:
        raise UserError(f"{manifest} lists {sorted(doubled)[0]} twice: list every file once")
    return items


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
    fetched = size = 0
    with (
        ThreadPoolExecutor(connections) as pool,
        Progress("download", len(items), quiet) as progress,
    ):
        futures = {pool.submit(_fetch, item, folder, attempts): item for item in items}
        for done, (future, item) in enumerate(futures.items(), 1):
            try:
                new, length = future.result()
                fetched += new
                size += length
            except Failure as error:
                failures.append(f"{item.path}: {error}")
            progress.update(done, done, 0, size)
    if failures:
        raise Failure(
            f"{len(failures)} of {len(items)} files could not be fetched (the same command goes "
            "on): " + "; ".join(failures[:5])
        )
    return {
        "files": len(items),
        "fetched": fetched,
        "bytes": size,
        "without_checksum": sum(not item.checksum for item in items),
    }


def _fetch(item: Item, folder: Path, attempts: int) -> tuple[bool, int]:
    """Fetch one file unless it is there and right; returns whether it was fetched, and its size."""
    final = folder / item.path
    if final.is_file():
        if not item.checksum or _matches(final, item.checksum):
            return False, final.stat().st_size
        final.unlink()  # damaged since: fetch it again
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.part")
    problem = "no attempt was made"
    for attempt in range(attempts):
        if attempt:
            time.sleep(min(30.0, 0.5 * 2**attempt))
        try:
            _receive(item.url, partial)
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} from {item.url}"
            if error.code == 416:  # the partial file does not fit the remote one: begin again
                partial.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
            continue
        except (OSError, http.client.HTTPException) as error:
            problem = f"{error} ({item.url})"
            continue
        if item.checksum and not _matches(partial, item.checksum):
            partial.unlink()
            problem = f"the content does not have the checksum {item.checksum}"
            continue
        replace(partial, final)
        return True, final.stat().st_size
    raise Failure(problem)


def _receive(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks. Raises when the connection ends early."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = have > 0 and getattr(response, "status", None) == 206
        with open(partial, "ab" if resumed else "wb") as stream:
            received = 0
            while block := response.read(_BLOCK):
                stream.write(block)
                received += len(block)
            stream.flush()
            os.fsync(stream.fileno())
        expected = response.headers.get("Content-Length")
        if expected is not None and received != int(expected):
            raise OSError(f"the connection ended after {received:,} of {int(expected):,} bytes")


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
