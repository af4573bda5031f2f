"""What is predicted: models, layouts and machines, as columns of numbers.

    work = read_rows(Path("rows.csv"))           # one workload a row, see COLUMNS
    work.hidden[0], work.gpu.peak_tflops[0]

A table of one row and a table of four thousand are computed alike, by numpy. Refuses (UserError)
files without the columns, numbers that are none and GPUs that the table of GPUs does not hold.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_ext.errors import UserError

Column = NDArray[np.float64]
Names = NDArray[np.str_]

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpus:
    """Data sheets, one GPU a row; megatron_ext/planning/gpus.json says where numbers come from."""

    peak_tflops: Column
    """Dense bf16 or fp16."""
    fp8_tflops: Column
    """Dense fp8; that of bf16 where the GPU has none."""
    matmul_tflops: Column
    """Best that a large bf16 matmul was measured to reach."""
    attention_tflops: Column
    """What causal FlashAttention reaches, forward and backward, at head dim 128."""
    memory_gib: Column
    """Memory that a process can use, GiB."""
    memory_gb_per_s: Column
    """HBM, GB/s."""
    nvlink_gb_per_s: Column
    """Each way, GB/s a GPU."""
    network_gb_per_s: Column
    """Between nodes, each way, GB/s a GPU."""
    sms: Column
    """Streaming multiprocessors."""


@dataclass(frozen=True)
class Workloads:
    """Models on layouts: one value a row in every field."""

    row_id: Names
    source_id: Names
    model: Names
    framework: Names
    mem_kind: Names
    """What memory a published table prints, in its words."""
    gpu_name: Names
    gpu: Gpus
    gpus: Column
    num_layers: Column
    hidden: Column
    heads: Column
    kv_heads: Column
    head_dim: Column
    ffn: Column
    gated: Column
    vocab: Column
    tied: Column
    seq_len: Column
    tp: Column
    pp: Column
    vpp_chunks: Column
    cp: Column
    dp: Column
    first_layers: Column
    """Layers of the first pipeline stage; 0 is an even share."""
    last_layers: Column
    """Layers of the last one."""
    seq_parallel: Column
    zero_stage: Column
    micro_batch: Column
    global_batch: Column
    recompute: Names
    """none, selective (the attention core), mlp, selective_block (every second layer), full."""
    flash_attn: Column
    precision: Names
    """fp16, bf16 or fp8; of fp16 gradients are 16 bits wide, else float32."""
    loss_chunk: Column
    """Tokens whose logits exist at once, made again in the backward pass; 0 is all, made once."""

    def __len__(self) -> int:
        return len(self.row_id)

    @property
    def query_width(self) -> Column:
        """Of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> Column:
        """Of the keys, or of the values."""
        return self.kv_heads * self.head_dim

    @property
    def micro_batches(self) -> Column:
        """Micro-batches of one step on each rank."""
        return np.maximum(1.0, np.round(self.global_batch / (self.dp * self.micro_batch)))

    @property
    def tokens(self) -> Column:
        """Tokens of a step."""
        return self.global_batch * self.seq_len

    def where(self, chosen: Any) -> Workloads:
        """The rows of a mask or index."""
        columns: dict[str, Any] = {
            f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "gpu"
        }
        gpu = Gpus(**{f.name: getattr(self.gpu, f.name)[chosen] for f in fields(Gpus)})
        return Workloads(gpu=gpu, **columns)


TEXT = (
    "row_id", "source_id", "model", "framework", "mem_kind", "gpu_name", "recompute", "precision",
)  # fmt: skip
COLUMNS = tuple(
    "gpu" if f.name == "gpu_name" else f.name for f in fields(Workloads) if f.name != "gpu"
)
# What a row may leave empty, and what that means.
DEFAULTS = {
    "source_id": "", "model": "", "framework": "", "mem_kind": "", "gated": 1,
    "tied": 0, "tp": 1, "pp": 1, "vpp_chunks": 1, "cp": 1, "first_layers": 0,
    "last_layers": 0, "seq_parallel": 0, "zero_stage": 1,
    "recompute": "none", "flash_attn": 1,
    "precision": "bf16", "loss_chunk": 0,
}  # fmt: skip

_MAY_BE_ZERO = (
    "gated", "tied", "seq_parallel", "zero_stage", "flash_attn", "first_layers", "last_layers",
    "loss_chunk",
)  # fmt: skip


def read_rows(path: Path, gpu_file: Path | None = None) -> Workloads:
    """Workloads of a CSV file with the columns COLUMNS; further columns are not looked at."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a CSV file") from None
    if not rows:
        raise UserError(f"{path} has no rows: write a header and one workload a line")
    may_lack = {*DEFAULTS, "kv_heads", "head_dim", "dp"}
    missing = [c for c in COLUMNS if c not in rows[0] and c not in may_lack]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: add them to its header")
    return from_rows(rows, gpu_table(gpu_file))


def from_rows(
    rows: Iterable[Mapping[str, Any]], gpus: Mapping[str, Mapping[str, float]] | None = None
) -> Workloads:
    """Workloads of dictionaries with the keys COLUMNS, values as numbers or as text.

    Empty values become DEFAULTS, kv_heads heads, head_dim hidden / heads, dp gpus / (tp pp cp),
    micro_batch 1 in a pipeline and else at most 4.
    """
    complete = [_complete(row) for row in rows]
    columns = {
        name: np.array([row[name] for row in complete], dtype=str if name in TEXT else float)
        for name in complete[0]
    }
    known = gpu_table() if gpus is None else gpus
    sheets = [known[_gpu_key(name, known)] for name in columns["gpu_name"]]
    gpu = Gpus(**{f.name: np.array([s[f.name] for s in sheets], float) for f in fields(Gpus)})
    return Workloads(gpu=gpu, **columns)


def gpu_table(file: Path | None = None) -> dict[str, dict[str, float]]:
    """Data sheets by name; those of `file` (the same JSON form) replace or join ours."""
    text = resources.files(__package__).joinpath("gpus.json").read_text()
    table = {k: v for k, v in json.loads(text).items() if not k.startswith("_")}
    if file is not None:
        try:
            table.update(json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"--gpu-file {file} is no JSON file of GPUs: {error}") from None
        for name, sheet in table.items():
            lacking = [f.name for f in fields(Gpus) if f.name not in sheet]
            if lacking:
                raise UserError(
                    f"--gpu-file {file}: {name} lacks {', '.join(lacking)}; give each of them"
                )
    return table


def _gpu_key(name: str, known: Mapping[str, Any]) -> str:
    key = name.lower().replace("-", "_")
    if key in ("", "unknown"):
        return "a100_80gb"
    matches = [k for k in known if k == key or k == key + "_80gb"]
    if not matches:
        raise UserError(
            f"gpu {name} is unknown: choose {', '.join(known)}, or describe it with --gpu-file"
        )
    return matches[0]


def _complete(row: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in COLUMNS:
        given = row.get(name)
        if given is None or given == "":
            given = DEFAULTS.get(name, "")
        if name == "gpu":
            values["gpu_name"] = str(given)
        elif name in TEXT:
            values[name] = str(given)
        elif given != "":
            values[name] = _number(given, name, row)
    values.setdefault("kv_heads", values.get("heads"))
    if "hidden" in values and "heads" in values:
        values.setdefault("head_dim", values["hidden"] / values["heads"])
    ranks = values["tp"] * values["pp"] * values["cp"]
    values.setdefault("dp", max(1.0, values.get("gpus", ranks) / ranks))
    if "micro_batch" not in values and "global_batch" in values:
        local = max(1.0, values["global_batch"] / values["dp"])
        values["micro_batch"] = 1.0 if values["pp"] > 1 else min(4.0, local)
    for name in COLUMNS:
        key = "gpu_name" if name == "gpu" else name
        if values.get(key) is None:
            raise UserError(f"row {row.get('row_id', '?')} has no {name}: fill it in")
    return values


def _number(value: Any, name: str, row: Mapping[str, Any]) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    least = 0 if name in _MAY_BE_ZERO else 1
    if not number >= least or number == float("inf"):
        raise UserError(
            f"row {row.get('row_id', '?')}: {name}={value} is no number of at least {least}"
        )
    return number
