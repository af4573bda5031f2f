"""The list of files to download: URLs, where each goes, the checksum it must have.

    for item in read_manifest("urls.txt", "SHA256SUMS"): item.url, item.path, item.checksum

A manifest is text: a URL a line (RedPajama's own lists), optionally with a checksum before or after
it ("sha256:..." or bare hex of md5, sha1, sha256), or `checksum  name` lines in a second file
(RedPajama's sha256 lists). Files keep the path of their URL below what all URLs share. Refuses what
is not http or https, two URLs of one path, and a path that leaves the folder.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_tools.errors import UserError

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}
_CHECKSUM = re.compile(r"(?:(md5|sha1|sha256):)?([0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64})")


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
