"""Files that are whole or absent (temporary name, fsync, rename), and their checksums.

    with atomic_write(path) as stream: stream.write(b"...")
    write_file(path, "text or bytes")
    write_json(path, {"a": 1})
    checksum(path)                  # "xxh128:..."; the digits are those of the `xxh128sum` command

Refuses nothing; an exception inside `atomic_write` leaves no file behind.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import xxhash

# Written at once, the pages of more come from memory that a virtual machine's host may have taken
# back, which is ten times slower.
COPY_BYTES = 1 << 20


def cache_folder(name: str) -> Path:
    """The user's cache folder for `name`, or a temporary one where that cannot be written."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "megatron-ext" / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the latter of a user without a home
        # Compiled code is loaded from here: never from a place that others can foresee and fill.
        return Path(tempfile.mkdtemp(prefix=f"megatron-ext-{name}-"))


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(temporary: Path, final: Path) -> None:
    """Rename a finished, fsynced file into place, durably."""
    os.replace(temporary, final)
    fsync_folder(final.parent)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary stream that becomes `path` only when the block ends without an exception. Several
    processes, on several machines, may write the same file at once: the last one stays."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write UTF-8 text or bytes, atomically."""
    with atomic_write(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` as `write_json` writes it."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file."""
    return orjson.loads(Path(path).read_bytes())


def checksum(path: str | os.PathLike[str], start: int = 0, end: int | None = None) -> str:
    """xxh3-128 of the bytes [start, end) of a file, as "xxh128:<hex>"."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as stream:
        stream.seek(start)
        left = (os.fstat(stream.fileno()).st_size if end is None else end) - start
        while left > 0:
            block = stream.read(min(COPY_BYTES, left))
            if not block:
                break
            digest.update(block)
            left -= len(block)
    return f"xxh128:{digest.hexdigest()}"
