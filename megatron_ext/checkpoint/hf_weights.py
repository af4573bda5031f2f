"""Weights by name, one tensor at a time: ours from a checkpoint, theirs from a folder.

    ours = CheckpointWeights(checkpoint)
    for name, tensor in layer_to_hf(config.model, 0, ours.read): ...
    theirs = FolderWeights(folder)
    fill(model, Imported(config.model, theirs, norm_head=False))

Llama's names; q, k and v are rows of one matrix of ours, key-value head by key-value head (its
query heads, its key, its value), gate and up the halves of another. No more than one tensor and
what it is made of are in memory. Only safetensors and tensors of `torch.load(weights_only=True)`
are read, so a folder runs no code. Refuses (UserError) folders without weights or without one of
the names.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext.checkpoint.chunks import Chunk, state_chunks
from megatron_ext.checkpoint.hf_config import check_installed, is_norm_head, read_hf_config
from megatron_ext.checkpoint.storage import read_chunks, read_index
from megatron_ext.config import Model
from megatron_ext.errors import UserError

Read = Callable[..., Tensor]
Named = Iterator[tuple[str, Tensor]]

EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
FINAL_NORM = ("decoder.final_layernorm.weight", "model.norm.weight")
OUTPUT = ("output_layer.weight", "lm_head.weight")
_QKV = "self_attention.linear_qkv"
_GATE_UP = "mlp.linear_fc1.weight"
_ALIKE = {  # of a layer: ours -> theirs
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def layer_to_hf(model: Model, layer: int, read: Read) -> Named:
    """Their names and tensors of one layer. `read(key, layer)` gives ours."""
    for ours, theirs in _ALIKE.items():
        yield f"model.layers.{layer}.{theirs}", read(f"decoder.layers.{ours}", layer)
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        parts = unpack_qkv(read(f"decoder.layers.{_QKV}.{kind}", layer), model)
        for name, part in zip("qkv", parts, strict=True):
            yield f"model.layers.{layer}.self_attn.{name}_proj.{kind}", part
    gate, up = read(f"decoder.layers.{_GATE_UP}", layer).chunk(2)
    yield f"model.layers.{layer}.mlp.gate_proj.weight", gate
    yield f"model.layers.{layer}.mlp.up_proj.weight", up


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, model: Model) -> Tensor:
    """[heads d, ..], [kv_heads d, ..] twice -> [(heads + 2 kv_heads) d, ..], group by group."""
    groups, rest = model.num_kv_heads, q.shape[1:]
    parts = [x.reshape(groups, -1, *rest) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def unpack_qkv(packed: Tensor, model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_qkv`."""
    groups, d, rest = model.num_kv_heads, model.head_dim, packed.shape[1:]
    sizes = (model.num_heads // groups * d, d, d)
    q, k, v = packed.reshape(groups, -1, *rest).split(sizes, dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


class CheckpointWeights:
    """Tensors of a checkpoint, whatever layout wrote it; needs no process group."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.index = read_index(checkpoint)

    def dtype(self) -> torch.dtype:
        """That of the embedding, and thus of the model."""
        return self._entry(EMBEDDING[0]).properties.dtype

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """One whole tensor, or its part of one layer, on the CPU in the dtype it is stored in."""
        entry = self._entry(key)
        offset, size = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offset[0], size[0] = layer, 1
        target = torch.empty(size, dtype=entry.properties.dtype)
        chunk = Chunk(key, tuple(entry.size), tuple(offset), target)
        read_chunks(self.checkpoint, [chunk], self.index)
        return target if layer is None else target[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.index.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.checkpoint} holds no {key}: it is no checkpoint of a Llama")
        return entry


class FolderWeights:
    """Tensors of a Hugging Face folder: safetensors, or PyTorch files read without running code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: tuple[str, Any] = ("", None)  # one file at a time
        for stem in ("model.safetensors", "pytorch_model.bin"):
            if (folder / f"{stem}.index.json").is_file():
                index = json.loads((folder / f"{stem}.index.json").read_text())
                self.files: dict[str, str] = index["weight_map"]
                return
            if (folder / stem).is_file():
                self.files = dict.fromkeys(_open(folder / stem).keys(), stem)
                return
        raise UserError(
            f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor an index of "
            "several: name the folder of a Hugging Face model"
        )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its dtype."""
        if name not in self.files:
            raise UserError(f"{self.folder} has no weight {name}: it is not what config.json says")
        if self.opened[0] != self.files[name]:
            self.opened = (self.files[name], _open(self.folder / self.files[name]))
        file = self.opened[1]
        return file.get_tensor(name) if hasattr(file, "get_tensor") else file[name]


def _open(file: Path) -> Any:
    if file.suffix == ".safetensors":
        check_installed("safetensors")
        from safetensors import safe_open

        return safe_open(file, framework="pt")
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


class Imported:
    """A folder's weights under our keys.

    norm_head: rows of the output layer are divided by their norms, in their dtype, as Baichuan 2's
    code does. A vocabulary larger than the folder's is filled up with the mean of the output rows,
    whose logit is the mean logit: never the greatest, and exp(loss) grows by no more than the share
    of rows added (Jensen's inequality).
    """

    def __init__(self, model: Model, folder: FolderWeights, norm_head: bool = False) -> None:
        self.model = model
        self.folder = folder
        self.norm_head = norm_head

    @functools.lru_cache(maxsize=1)  # noqa: B019 - gate and up are asked for one after the other
    def read(self, key: str, layer: int) -> Tensor:
        """The whole tensor of ours; `layer` counts for keys of layers only."""
        if key == FINAL_NORM[0]:
            return self.folder.read(FINAL_NORM[1])
        if key in (EMBEDDING[0], OUTPUT[0]):
            return self._table(EMBEDDING[1] if key == EMBEDDING[0] else OUTPUT[1])
        name = key.removeprefix("decoder.layers.")
        theirs = f"model.layers.{layer}."
        if name in _ALIKE:
            return self.folder.read(theirs + _ALIKE[name])
        if name == _GATE_UP:
            halves = [self.folder.read(f"{theirs}mlp.{x}_proj.weight") for x in ("gate", "up")]
            return torch.cat(halves)
        if name.startswith(_QKV):
            return self._qkv(f"{theirs}self_attn.", name.rsplit(".", 1)[1])
        raise UserError(f"a folder of Hugging Face has nothing for {key}")

    def _table(self, name: str) -> Tensor:
        table = self.folder.read(name)
        if name == OUTPUT[1] and self.norm_head:
            table = F.normalize(table)
        missing = self.model.vocab_size - len(table)
        if missing < 0:
            raise UserError(
                f"{name} has {len(table)} rows, more than vocab_size={self.model.vocab_size} of "
                "config.json"
            )
        if missing:
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            table = torch.cat((table, mean.expand(missing, -1)))
        return table

    def _qkv(self, prefix: str, kind: str) -> Tensor:
        if f"{prefix}W_pack.{kind}" in self.folder:  # Baichuan: rows of q, then k, then v
            q, k, v = self.folder.read(f"{prefix}W_pack.{kind}").chunk(3)
        else:
            q, k, v = (self.folder.read(f"{prefix}{x}_proj.{kind}") for x in "qkv")
        return pack_qkv(q, k, v, self.model)


@torch.no_grad()
def fill(model: GPTModel, weights: Imported) -> None:
    """Set this rank's part of every parameter, in any layout."""
    for chunk in state_chunks([model]):
        # In a checkpoint, and so in a chunk's place, the layers of a matrix are its first axis.
        layer = [chunk.offset[0]] if chunk.key.startswith("decoder.layers.") else []
        whole = weights.read(chunk.key, *layer or [0])
        if tuple(whole.shape) != chunk.shape[len(layer) :]:
            raise UserError(
                f"{chunk.key} would be {list(whole.shape)}, config.json wants "
                f"{list(chunk.shape[len(layer) :])}"
            )
        for axis, start in enumerate(chunk.offset[len(layer) :]):
            whole = whole.narrow(axis, start, chunk.tensor.shape[len(layer) + axis])
        chunk.tensor.copy_(whole.view(chunk.tensor.shape))


def load_folder(folder: Path, shape: Model, model: GPTModel) -> None:
    """Fill the model with the weights of a Hugging Face folder. Raises UserError."""
    norm_head = is_norm_head(read_hf_config(folder))
    fill(model, Imported(shape, FolderWeights(folder), norm_head))
