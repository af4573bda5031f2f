"""Chunks to files and back, in PyTorch's distributed checkpoint format (torch_dist).

    written = write_chunks(folder, rank, chunks)        # in any thread, without a collective
    write_index(folder, [written of every rank])        # rank 0
    read_chunks(folder, chunks)                         # into the chunks' own tensors

Each rank has one file, `__RANK_0.distcp`; `tensors.json` says where in them each chunk lies.
Megatron-Core and other tools look for the same in a pickle named `.metadata`, which is written for
them and never read here: only data comes out of a checkpoint. JSON can hold nothing else, the
`.distcp` files are opened by torch's weights-only reader, and an index that names any other file is
refused (UserError).
"""

import json
import math
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_ext.checkpoint.chunks import Chunk
from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.errors import UserError

INDEX = "tensors.json"
_SHARD = re.compile(r"__\d+_\d+\.distcp")


@dataclass(frozen=True)
class Written:
    """A rank's file: its facts for the manifest, and what lies in it where. Small."""

    name: str
    facts: dict[str, Any]
    places: list[dict[str, Any]]  # key, dtype, shape of the whole, offset, size, [byte, bytes]


def write_chunks(folder: Path, rank: int, chunks: Sequence[Chunk]) -> Written:
    """Write this rank's file and sync it. The checksum is of the bytes as they leave memory, so
    that no error on their way to the disk can enter it. Raises OSError or RuntimeError."""
    name = f"__{rank}_0.distcp"
    places = []
    with (folder / name).open("xb") as file:
        stream = _Hashing(file)
        for chunk in chunks:
            start = stream.bytes
            torch.save(chunk.tensor, stream)  # type: ignore[arg-type]
            places.append(
                {
                    "key": chunk.key,
                    "dtype": str(chunk.tensor.dtype).removeprefix("torch."),
                    "shape": chunk.shape,
                    "offset": chunk.offset,
                    "size": tuple(chunk.tensor.shape),
                    "at": (start, stream.bytes - start),
                }
            )
        file.flush()
        os.fsync(file.fileno())
    facts = {"bytes": stream.bytes, "xxh3_128": stream.digest.hexdigest()}
    return Written(name, facts, places)


def write_index(folder: Path, written: Sequence[Written]) -> None:
    """Write tensors.json, and beside it what Megatron-Core's own loader asks for. Raises
    RuntimeError when the chunks of all ranks are not whole tensors."""
    tensors: dict[str, Any] = {}
    for part in written:
        for place in part.places:
            whole = {"dtype": place["dtype"], "shape": place["shape"], "chunks": []}
            chunk = {name: place[name] for name in ("offset", "size", "at")}
            tensors.setdefault(place["key"], whole)["chunks"].append({"file": part.name, **chunk})
    for key, whole in tensors.items():
        saved = sum(math.prod(chunk["size"]) for chunk in whole["chunks"])
        if saved != math.prod(whole["shape"]):
            raise RuntimeError(f"{key}: {saved} of {math.prod(whole['shape'])} elements were saved")
    write_json(folder / INDEX, tensors)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(_as_torch_describes(tensors), file)
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    write_json(folder / "metadata.json", backends)
    torch.save({}, folder / "common.pt")


def read_index(folder: Path) -> Metadata:
    """What the files hold, and where. Raises UserError when the index is not one, or names a file
    that is no rank's."""
    try:
        index = _as_torch_describes(json.loads((folder / INDEX).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is no index of a checkpoint: {error!r}") from None
    for place in index.storage_data.values():
        if not _SHARD.fullmatch(place.relative_path):
            raise UserError(f"{folder / INDEX} names the foreign file {place.relative_path!r}")
    return index


def _as_torch_describes(tensors: dict[str, Any]) -> Metadata:
    described: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for key, whole in tensors.items():
        dtype = getattr(torch, whole["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{whole['dtype']} is no type of numbers")
        chunks: list[ChunkStorageMetadata] = []
        for chunk in whole["chunks"]:
            offset, size = torch.Size(chunk["offset"]), torch.Size(chunk["size"])
            start, length = chunk["at"]
            index = MetadataIndex(key, offset, len(chunks))
            storage[index] = _StorageInfo(chunk["file"], int(start), int(length))
            chunks.append(ChunkStorageMetadata(offset, size))
        properties = TensorProperties(dtype)
        described[key] = TensorStorageMetadata(properties, torch.Size(whole["shape"]), chunks)
    return Metadata(described, storage_data=storage)


def holds(index: Metadata, chunk: Chunk) -> bool:
    """Whether there is a tensor of this name and shape."""
    whole = index.state_dict_metadata.get(chunk.key)
    return isinstance(whole, TensorStorageMetadata) and tuple(whole.size) == chunk.shape


def read_chunks(folder: Path, chunks: Sequence[Chunk], index: Metadata | None = None) -> None:
    """Fill the chunks' tensors from files that any layout wrote; no collective. `index` saves
    reading it again. Raises UserError when a tensor is not there, or has another shape."""
    index = read_index(folder) if index is None else index
    items: list[ReadItem] = []
    targets: dict[MetadataIndex, torch.Tensor] = {}
    for chunk in chunks:
        whole = index.state_dict_metadata.get(chunk.key)
        if not isinstance(whole, TensorStorageMetadata) or tuple(whole.size) != chunk.shape:
            size = getattr(whole, "size", None)
            has = "missing" if size is None else f"of shape {tuple(size)}"
            raise UserError(
                f"{folder}: {chunk.key} is {has}, the model of this config needs {chunk.shape}: "
                "use the config that the checkpoint was trained with"
            )
        where = ChunkStorageMetadata(torch.Size(chunk.offset), chunk.tensor.shape)
        reads = create_read_items_for_chunk_list(chunk.key, whole, [where])
        if sum(read.lengths.numel() for read in reads) != chunk.tensor.numel():
            raise UserError(f"{folder}: {chunk.key} is not there as a whole")
        for read in reads:  # all into this chunk, which its key and offset identify
            targets[read.dest_index] = chunk.tensor
        items += reads
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(index, is_coordinator=False)
    try:
        reader.read_data(LoadPlan(items), _Into(targets)).wait()
    except pickle.UnpicklingError as error:
        raise UserError(f"{folder}: a file holds something else than tensors: {error}") from None


class _Into(LoadPlanner):
    """Tells PyTorch's reader which live tensor each read goes into. The plan is made above: what
    else the abstract class demands is never called."""

    def __init__(self, targets: dict[MetadataIndex, torch.Tensor]) -> None:
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.targets[read_item.dest_index]
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dim, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """The reader has copied into the view already."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError


class _Hashing:
    """A file being written, with the checksum and the number of its bytes."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.digest = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        count = len(memoryview(data).cast("B"))
        self.bytes += count
        self.file.write(data)
        return count

    def flush(self) -> None:
        self.file.flush()
