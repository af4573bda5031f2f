"""Which files hold the documents, how they are compressed, and which slice they belong to.

    sources = find_sources(["data/", "more/*.jsonl.zst"])      # sorted, each once
    for block in read_blocks(sources[0], 16 << 20): ...        # decompressed, cut anywhere

JSONL plain, .gz, .zst (any number of frames), .bz2, .xz, and "-" for standard input.
Refuses inputs that match nothing, a file named twice, and a name that contradicts the content;
a truncated or corrupt archive is a `Failure` that names the file, never a silent end; one that
needs more memory than `window_bytes` is a `UserError`: its author decided how much.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import lzma
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from stat import S_ISREG
from typing import Any, BinaryIO, NoReturn, cast

from data_tools.errors import Failure, UserError

_MAGIC = {
    "gz": b"\x1f\x8b",
    "zst": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "parquet": b"PAR1",
}
_SUFFIXES = {
    ".gz": "gz",
    ".zst": "zst",
    ".zstd": "zst",
    ".bz2": "bz2",
    ".xz": "xz",
    ".parquet": "parquet",
}
_IN_FOLDERS = re.compile(
    r"\.(jsonl|json|ndjson)(\.(gz|zst|zstd|bz2|xz))?$|\.parquet$", re.IGNORECASE
)
_OTHER_ARCHIVES = re.compile(r"\.(jsonl|json|ndjson)\.(lz4|lzma|br|sz|zip|7z|Z)$", re.IGNORECASE)
_BESIDE_DOCUMENTS = ("quality_signals", "duplicates", "minhash")  # in RedPajama v2
# RedPajama's slices as they appear in paths; the first match in the path wins.
_SLICES = {
    "common_crawl": r"common_?crawl|cc",
    "c4": "c4",
    "github": "github",
    "arxiv": "arxiv",
    "book": "books?|pg19|gutenberg",
    "wikipedia": "wikipedia|wiki",
    "stackexchange": "stack_?exchange",
}
_SLICE = re.compile(
    "|".join(f"(?P<{name}>(?<![a-z0-9])(?:{words})(?![a-z0-9]))" for name, words in _SLICES.items())
)
_V2_SLICE = re.compile(r"(?<![a-z])([a-z]{2})_(head|middle|tail)(?![a-z])")
_READ_BYTES = 1 << 20
SUBSET = "red_pajama_subset"
_SMALLEST_WINDOW, LARGEST_WINDOW = 1 << 20, 1 << 31  # the largest: zstd --long=31
WINDOW_BYTES = 128 << 20  # zstd's own bound, unless it is told otherwise; xz -9 needs 65 MiB


@dataclass(frozen=True)
class Source:
    """One input file. `compression` is "", "gz", "zst", "bz2", "xz" or "parquet"; `window_bytes`
    is how much memory it may take as it was made: a .zst or .xz for its window, a .parquet for its
    metadata and pages."""

    path: str
    compression: str
    size: int
    mtime_ns: int
    slice: str
    window_bytes: int = WINDOW_BYTES

    @property
    def divisible(self) -> bool:
        """Whether its lines, or row groups, can be read from any byte on."""
        return self.compression in ("", "parquet") and self.path != "-"


def find_sources(inputs: Sequence[str], window_bytes: int = WINDOW_BYTES) -> list[Source]:
    """Files, folders (searched through), globs and "-" to sources, in the order given."""
    if not _SMALLEST_WINDOW <= window_bytes <= LARGEST_WINDOW:
        raise UserError(
            f"--max-window-bytes {window_bytes} is outside 1 MiB to 2 GiB: write "
            f"{LARGEST_WINDOW} for all that zstd --long=31 makes"
        )
    names: list[str] = []
    for text in inputs:
        if text == "-":
            names.append(text)
        elif os.path.isdir(text):
            found = sorted(_files_below(text))
            if not found:
                raise UserError(
                    f"folder {text} holds no .jsonl, .json or .parquet file (plain, .gz, .zst, "
                    ".bz2, .xz): name one that does"
                )
            names += found
        elif os.path.exists(text):
            names.append(text)
        else:
            found = sorted(p for p in glob.glob(text, recursive=True) if os.path.isfile(p))
            if not found:
                raise UserError(
                    f"input {text} matches no file: name a file, a folder, a glob or - for "
                    "standard input"
                )
            names += found
    if not names:
        raise UserError("no input was given: name a file, a folder, a glob or - for standard input")
    seen: dict[str, str] = {}
    for name in names:
        real = os.path.realpath(name) if name != "-" else "-"
        if real in seen:
            raise UserError(
                f"input {name} is given twice (also as {seen[real]}): name every file once"
            )
        seen[real] = name
    sources = [replace(describe(name), window_bytes=window_bytes) for name in names]
    for source in sources:  # now, not in the middle of the night; later frames when they come
        if window_bytes < LARGEST_WINDOW and first_window(source) > window_bytes:
            raise _too_wide(source)
    return sources


def _files_below(folder: str) -> Iterator[str]:
    """Files of documents in a folder and those below it, links followed; the same names on every
    machine. Left out are hidden files and folders, what these tools write beside their outputs,
    and what RedPajama v2 has beside its documents."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(
            f"folder {error.filename} cannot be read ({error.strerror}): make it readable, or name "
            "the files that are meant"
        )

    walked = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in walked:  # a link in a circle, or a second one to the same folder
            folders.clear()
            continue
        walked.add(real)
        beside = _BESIDE_DOCUMENTS if "documents" in folders else ()
        meant = [f for f in folders if not f.startswith(".") and not f.endswith(".work")]
        # A folder before the links to it, which are then passed over.
        folders[:] = sorted(
            {*meant} - {*beside, "lost+found"},
            key=lambda name: (os.path.islink(os.path.join(place, name)), name),
        )
        for name in files:
            path = os.path.join(place, name)
            if name.startswith(".") or name.endswith((".receipt.json", ".rejected.jsonl")):
                continue
            if _OTHER_ARCHIVES.search(name):
                raise UserError(
                    f"{path} is compressed in a way that is not read here: compress it as .gz, "
                    ".zst, .bz2 or .xz, or name the files that are meant"
                )
            if _IN_FOLDERS.search(name) and os.path.isfile(path):
                yield path


def describe(path: str) -> Source:
    """Look at one file: size, compression (by its first bytes, checked against its name), slice."""
    if path == "-":
        return Source("-", "", 0, 0, "stdin")
    if not _is_utf8(path):
        raise UserError(f"input {path!r} has a name that is not UTF-8: rename it")
    try:
        stat = os.stat(path)
        if not S_ISREG(stat.st_mode):  # it could be read only once, and its size is not known
            raise UserError(
                f"input {path} is no regular file: pipe what it gives into the command, and write "
                "- in its place"
            )
        with open(path, "rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise UserError(
            f"input {path} cannot be read ({error.strerror}): make it readable or leave it out"
        ) from error
    compression = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")
    if (
        not compression
        and len(head) >= 4
        and 0x184D2A50 <= struct.unpack("<I", head[:4])[0] <= 0x184D2A5F
    ):
        compression = "zst"  # begins with a skippable frame
    named = _SUFFIXES.get(os.path.splitext(path)[1].lower(), "")
    if named != compression and named:
        raise Failure(
            f"{path} is named .{named} but "
            + ("is empty" if not stat.st_size else f"begins with {head[:4].hex(' ')}")
            + ": it is truncated, corrupt or misnamed"
        )
    return Source(path, compression, stat.st_size, stat.st_mtime_ns, slice_of_path(path))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def slice_of_path(path: str) -> str:
    """RedPajama's slice as the path tells it, or "unknown"."""
    text = path.replace(os.sep, "/").lower()
    v2 = _V2_SLICE.search(text.rsplit("/", 1)[-1])
    if v2 and "/documents/" in text:
        return f"v2_{v2[1]}_{v2[2]}"
    # The file's own name says more than the folders above it, the nearest folder more than the
    # root.
    for part in reversed(text.split("/")):
        match = _SLICE.search(re.sub(r"[_\-]+like", " like", part).replace("-", " "))
        if match is None:
            match = _SLICE.search(part.replace("_", " ").replace("-", " "))
        if match:
            return str(match.lastgroup)
    return "unknown"


def slice_of_document(document: dict) -> str | None:
    """The slice a document names itself (RedPajama v1 and SlimPajama), or None."""
    subset = document.get(SUBSET)
    meta = document.get("meta")
    if isinstance(meta, dict):
        subset = subset or meta.get("redpajama_set_name") or meta.get("source")
    if isinstance(subset, bytes):  # Parquet without the note that they are text
        subset = subset.decode(errors="replace")
    if not isinstance(subset, str):
        return None
    words = subset.removeprefix("RedPajama").lower().split("/", 1)[0]
    match = _SLICE.fullmatch(words) or _SLICE.fullmatch({"commoncrawl": "cc"}.get(words, words))
    return str(match.lastgroup) if match else None


def open_stream(source: Source, raw: BinaryIO) -> BinaryIO:
    """The decompressed bytes of the open file `raw`. Reading may raise what `archive_errors`
    lists.
    """
    if source.compression == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if source.compression == "bz2":
        return cast(BinaryIO, _Streams(raw, bz2.BZ2Decompressor, padded=False))
    if source.compression == "xz":
        new = partial(lzma.LZMADecompressor, memlimit=source.window_bytes)
        return cast(BinaryIO, _Streams(raw, new, padded=True))
    if source.compression == "zst":
        import zstandard

        check_zstd_is_whole(source.path)
        decompressor = zstandard.ZstdDecompressor(max_window_size=source.window_bytes)
        return cast(BinaryIO, decompressor.stream_reader(raw, read_across_frames=True))
    return raw


class _Streams:
    """Concatenated bzip2 or xz streams, all of which have to be whole.

    bz2.BZ2File and lzma.LZMAFile take whatever is no stream after the first one for the end.
    `padded`: zeros, a multiple of four, may follow a stream (.xz file format, section 2.2).
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any], padded: bool) -> None:
        self.raw, self.new, self.padded = raw, new, padded
        self.one, self.input = new(), b""

    def read(self, size: int) -> bytes:
        while not self.one.eof or self._begin_next():
            if self.one.needs_input and not self.input:
                self.input = self.raw.read(_READ_BYTES)
                if not self.input:
                    raise EOFError("it ends inside a stream")
            data, self.input = self.input, b""
            if block := self.one.decompress(data, size):
                return bytes(block)
        return b""

    def _begin_next(self) -> bool:
        """Go on behind a finished stream; False where the file ends."""
        rest, zeros = self.one.unused_data, 0
        while (rest := rest or self.raw.read(_READ_BYTES)) and self.padded and not rest[0]:
            zeros += len(rest) - len(rest := rest.lstrip(b"\0"))
        if zeros % 4:
            raise EOFError(f"{zeros:,} zeros follow a stream, not a multiple of four")
        if rest:
            self.one, self.input = self.new(), rest
        return bool(rest)


def first_window(source: Source) -> int:
    """Bytes of window that the first frame of a .zst asks for; 0 for other files."""
    if source.compression != "zst":
        return 0
    import zstandard

    with open(source.path, "rb") as stream, contextlib.suppress(zstandard.ZstdError):
        return int(zstandard.get_frame_parameters(stream.read(18)).window_size)
    return 0  # no whole header: reading it will say so


def _too_wide(source: Source) -> UserError:
    return UserError(
        f"{source.path} needs more memory to be decompressed than --max-window-bytes "
        f"{source.window_bytes}, as zstd --long and xz --lzma2=dict make them: write up to "
        f"{LARGEST_WINDOW} (2 GiB), or compress it again"
    )


def archive_errors() -> tuple[type[BaseException], ...]:
    """What decompressors raise on truncated or corrupt input."""
    import zstandard

    return (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def read_blocks(
    source: Source, block_bytes: int = _READ_BYTES, raw: BinaryIO | None = None
) -> Iterator[bytes]:
    """Decompressed content in pieces of at most `block_bytes`. Raises `Failure` naming a bad file,
    and `UserError` for one that needs more than `source.window_bytes`.

    `raw` may be the file, already open: its position tells how far the reading has come.
    """
    with contextlib.ExitStack() as stack:
        try:
            if raw is None:
                raw = (
                    sys.stdin.buffer
                    if source.path == "-"
                    else stack.enter_context(open(source.path, "rb"))
                )
            stream = open_stream(source, raw)
            while block := stream.read(block_bytes):
                yield block
        except archive_errors() as error:
            # As zstandard and lzma say it. The largest bound is met by damaged headers only.
            wide = re.search("too much memory|[Mm]emory usage limit", str(error))
            if wide and source.window_bytes < LARGEST_WINDOW:
                raise _too_wide(source) from error
            raise Failure(f"{source.path} is truncated or corrupt: {error}") from error


def check_zstd_is_whole(path: str) -> None:
    """Raise `Failure` if a .zst ends inside a frame.

    The streaming decompressor takes the end of a truncated file for the end of the data, so the
    frames are walked first, header by header (RFC 8878, section 3.1): no byte is decompressed.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        position = 0

        def take(count: int) -> bytes:
            nonlocal position
            stream.seek(position)
            data = stream.read(count)
            position += count
            if len(data) < count:
                raise Failure(f"{path} is truncated: it ends at byte {size:,}, inside a zstd frame")
            return data

        while position < size:
            start = position
            magic = struct.unpack("<I", take(4))[0]
            if 0x184D2A50 <= magic <= 0x184D2A5F:
                content = struct.unpack("<I", take(4))[0]
                position += content
            elif magic == 0xFD2FB528:
                flags = take(1)[0]
                single = flags >> 5 & 1
                take(
                    (0 if single else 1)
                    + (0, 1, 2, 4)[flags & 3]
                    + ((1 if single else 0), 2, 4, 8)[flags >> 6]
                )
                last = False
                while not last:
                    header = int.from_bytes(take(3), "little")
                    last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
                    if kind == 3:
                        raise Failure(
                            f"{path} is corrupt: a reserved zstd block at byte {position - 3:,}"
                        )
                    position += 1 if kind == 1 else length  # a run-length block stores one byte
                position += 4 if flags >> 2 & 1 else 0
            else:
                raise Failure(f"{path} is corrupt: no zstd frame begins at byte {start:,}")
        if position > size:
            raise Failure(f"{path} is truncated: it ends at byte {size:,} of at least {position:,}")
