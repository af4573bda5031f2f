"""Write .bin/.idx pairs from streams of ids, with checksums, in memory that does not grow.

    writer = PairWriter(folder, dtype, shard_tokens=0)
    writer.append(blocks_of_bytes, lengths)          # again and again, in document order
    pairs = writer.complete("out/corpus")            # writes the indexes; what the receipt lists
    publish(folder, "out/corpus", pairs)             # rename into place

`state()` can be saved and given to `PairWriter(..., state=...)`: whatever was written after it is
cut off, so a killed writer goes on exactly there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from data_tools import indexed
from data_tools.files import COPY_BYTES, fsync_folder

CHECKED_BYTES = 16 << 20  # of .bin under one checksum each, so that damage can be located
_LENGTHS = CHECKED_BYTES // 4


class _Digest:
    """Checksums of a growing file: of all of it, and of every block of `CHECKED_BYTES`."""

    def __init__(self) -> None:
        self.whole = xxhash.xxh3_128()
        self.block = xxhash.xxh3_64()
        self.filled = 0
        self.blocks: list[str] = []

    def update(self, data: bytes | memoryview) -> None:
        self.whole.update(data)
        view = memoryview(data)
        while len(view):
            piece = view[: CHECKED_BYTES - self.filled]
            self.block.update(piece)
            self.filled += len(piece)
            view = view[len(piece) :]
            if self.filled == CHECKED_BYTES:
                self._close()

    def _close(self) -> None:
        self.blocks.append(self.block.hexdigest())
        self.block.reset()
        self.filled = 0

    def result(self) -> dict[str, Any]:
        blocks = [*self.blocks, self.block.hexdigest()] if self.filled else list(self.blocks)
        return {
            "checksum": f"xxh128:{self.whole.hexdigest()}",
            "block_bytes": CHECKED_BYTES,
            "blocks": blocks,
        }


class PairWriter:
    """Pairs under construction in `folder`: 00000.bin and 00000.lengths, and so on for each shard.

    A shard ends with the first document that brings it to `shard_tokens` (0: there is one pair).
    """

    def __init__(
        self, folder: Path, dtype: Any, shard_tokens: int = 0, state: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, np.dtype(dtype), shard_tokens
        self.done: list[dict[str, Any]] = []  # finished shards: documents, tokens, digest of .bin
        self.documents = self.tokens = 0  # of the open shard
        self.digest = _Digest()
        folder.mkdir(parents=True, exist_ok=True)
        if state:
            self.done = list(state["done"])
            self.documents, self.tokens = state["documents"], state["tokens"]
        self._open(fresh=state is None)

    def _path(self, ending: str, shard: int | None = None) -> Path:
        return self.folder / f"{len(self.done) if shard is None else shard:05d}.{ending}"

    def _open(self, fresh: bool) -> None:
        wanted = {"bin": self.tokens * self.dtype.itemsize, "lengths": self.documents * 4}
        streams = {}
        for ending, size in wanted.items():
            path = self._path(ending)
            if fresh or not path.exists():
                path.write_bytes(b"")
            if path.stat().st_size < size:
                raise OSError(f"{path} is shorter than the state beside it says")
            os.truncate(path, size)
            streams[ending] = open(path, "r+b", buffering=0)  # noqa: SIM115
        self.digest = _Digest()
        while block := streams["bin"].read(COPY_BYTES):
            self.digest.update(block)
        streams["lengths"].seek(0, os.SEEK_END)
        self.bin: BinaryIO = streams["bin"]
        self.lengths: BinaryIO = streams["lengths"]

    def append(self, blocks: Iterable[bytes | memoryview], lengths: np.ndarray) -> None:
        """Append documents: `lengths` int32 [documents] in tokens, `blocks` their ids as bytes."""
        if not self.shard_tokens:
            for block in blocks:
                self._write(block)
            self._close_documents(lengths)
            return
        stream = _Bytes(blocks)
        while len(lengths):
            sums = np.cumsum(lengths, dtype=np.int64)
            count = int(np.searchsorted(sums, self.shard_tokens - self.tokens)) + 1
            head, lengths = lengths[:count], lengths[count:]
            for block in stream.take(int(sums[len(head) - 1]) * self.dtype.itemsize):
                self._write(block)
            self._close_documents(head)
            if self.tokens >= self.shard_tokens:
                self._finish_shard()
                self._open(fresh=True)

    def _write(self, block: bytes | memoryview) -> None:
        self.digest.update(block)
        view = memoryview(block)
        while len(view):
            view = view[self.bin.write(view) :]

    def _close_documents(self, lengths: np.ndarray) -> None:
        self.lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def _finish_shard(self) -> None:
        self._sync()
        self.bin.close()
        self.lengths.close()
        self.done.append(
            {"documents": self.documents, "tokens": self.tokens, **self.digest.result()}
        )
        self.documents = self.tokens = 0

    def _sync(self) -> None:
        os.fsync(self.bin.fileno())
        os.fsync(self.lengths.fileno())

    def state(self) -> dict[str, Any]:
        """Make what was written so far durable, and describe it."""
        self._sync()
        return {"done": self.done, "documents": self.documents, "tokens": self.tokens}

    def complete(self, prefix: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Finish the files and write the indexes; returns what the receipt lists, by pair."""
        if self.documents or not self.done:
            self._finish_shard()
        else:
            self.bin.close()
            self.lengths.close()
        name = Path(prefix).name
        pairs = []
        for shard, done in enumerate(self.done):
            index = _Digest()
            with open(self._path("idx", shard), "wb") as stream:
                for piece in indexed.index_bytes(
                    self.dtype, lambda shard=shard: self._read_lengths(shard), done["documents"]
                ):
                    index.whole.update(piece)
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
                size = stream.tell()
            final = f"{name}-{shard:05d}" if self.shard_tokens else name
            digest = {key: done[key] for key in ("checksum", "block_bytes", "blocks")}
            bin_size = done["tokens"] * self.dtype.itemsize
            pairs.append(
                {
                    "prefix": final,
                    "documents": done["documents"],
                    "tokens": done["tokens"],
                    "bin": {"path": f"{final}.bin", "size": bin_size, **digest},
                    "idx": {
                        "path": f"{final}.idx",
                        "size": size,
                        "checksum": f"xxh128:{index.whole.hexdigest()}",
                    },
                }
            )
        return pairs

    def _read_lengths(self, shard: int) -> Iterator[np.ndarray]:
        with open(self._path("lengths", shard), "rb") as stream:
            while block := stream.read(_LENGTHS):
                yield np.frombuffer(block, dtype=np.int32)

    def read(self, shard: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of a completed shard, memory-mapped."""
        arrays = []
        for ending, dtype in (("bin", self.dtype), ("lengths", np.dtype(np.int32))):
            path = self._path(ending, shard)
            size = path.stat().st_size // dtype.itemsize
            arrays.append(
                np.memmap(path, dtype, "r", shape=(size,)) if size else np.empty(0, dtype)
            )
        return arrays[0], arrays[1]


class _Bytes:
    """A stream of blocks that gives exactly as many bytes as asked for."""

    def __init__(self, blocks: Iterable[bytes | memoryview]) -> None:
        self.blocks = iter(blocks)
        self.rest = memoryview(b"")

    def take(self, count: int) -> Iterator[memoryview]:
        while count:
            if not len(self.rest):
                self.rest = memoryview(next(self.blocks))
            piece, self.rest = self.rest[:count], self.rest[count:]
            count -= len(piece)
            yield piece


def publish(folder: Path, prefix: str | os.PathLike[str], pairs: list[dict[str, Any]]) -> None:
    """Rename completed pairs into place; harmless to repeat after being killed in the middle."""
    target = Path(prefix).parent
    target.mkdir(parents=True, exist_ok=True)
    for shard, pair in enumerate(pairs):
        for ending in ("bin", "idx"):
            source = folder / f"{shard:05d}.{ending}"
            if source.exists():
                os.replace(source, target / pair[ending]["path"])
    fsync_folder(target)


def shuffled(source: PairWriter, folder: Path, seed: int, shard_tokens: int) -> PairWriter:
    """All documents of a completed one-pair writer in an order that `seed` decides.

    Two passes over files, both sequential in what is written: documents are dealt out to buckets of
    some 256 MiB, then each bucket is permuted. Memory does not grow with the number of documents.
    """
    ids, lengths = source.read()
    item = source.dtype.itemsize
    buckets = int(min(200, max(1, len(ids) * item >> 28)))  # two open files each
    rng = np.random.Generator(np.random.Philox(seed))
    folder.mkdir(parents=True, exist_ok=True)
    names = [(folder / f"{b}.bin", folder / f"{b}.lengths") for b in range(buckets)]
    with contextlib.ExitStack() as stack:
        streams = [[stack.enter_context(open(name, "wb")) for name in pair] for pair in names]
        position = 0
        for first in range(0, len(lengths), 1 << 16):
            chunk = lengths[first : first + (1 << 16)]
            choice = rng.integers(0, buckets, size=len(chunk))
            for length, bucket in zip(chunk.tolist(), choice.tolist(), strict=True):
                streams[bucket][0].write(ids[position : position + length].data)
                position += length
            for bucket in range(buckets):
                streams[bucket][1].write(chunk[choice == bucket].tobytes())
    writer = PairWriter(folder / "out", source.dtype, shard_tokens)
    for bin_path, length_path in names:
        sizes = np.fromfile(length_path, dtype=np.int32)
        if len(sizes):
            tokens = np.memmap(bin_path, source.dtype, "r")
            ends = np.cumsum(sizes, dtype=np.int64)
            order = rng.permutation(len(sizes))
            for first in range(0, len(order), 4096):
                part = order[first : first + 4096]
                writer.append(
                    (tokens[ends[i] - sizes[i] : ends[i]].data for i in part), sizes[part]
                )
        bin_path.unlink()
        length_path.unlink()
    return writer
