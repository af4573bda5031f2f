"""Bytes that each rank of a layout holds at its peak.

    parts = memory(work, stage=0)        # the first pipeline stage, or any other
    parts.total / 2**30                  # GiB a rank, one a row
    peak_memory(work)                    # the stage that a source reads, else the fullest one

Counted from shapes, not fitted: weights, gradients and optimizer state from the layout, activations
as in Korthikanti et al. 2022 (section 4), micro-batches in flight from the pipeline schedule
(Narayanan et al. 2021, section 2.2). Fitted are two numbers: what libraries take and how far the
allocator's peak is above the tensors in it. Needs numpy, not torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.planning.sources import (
    BEYOND_ALLOCATOR_GIB,
    GIB,
    bucket_bytes,
    chunks,
    defers_output_gradient,
    has_megatron_loss,
    keeps_half_gradients,
    keeps_scores,
    layers_of_stage,
    prints_tensors_only,
    reading,
    runs_ahead,
    waiting_tensors,
)
from megatron_ext.planning.workload import Column, Workloads


@dataclass(frozen=True)
class MemoryConstants:
    """Shared by all sources."""

    libraries_gib: float = 0.5
    """CUDA context within the process, NCCL and cuBLAS workspaces."""
    allocator: float = 1.1
    """What the allocator takes for tensors that come and go, relative to them. Weights, gradient
    buffers and optimizer state are allocated once, without gaps."""


@dataclass(frozen=True)
class Memory:
    """Bytes a rank, by cause; one a row."""

    weights: Column
    gradients: Column
    optimizer: Column
    activations: Column
    recomputed_layer: Column
    logits: Column
    communication: Column
    allocator: Column

    @property
    def total(self) -> Column:
        """Their sum."""
        return sum((getattr(self, f.name) for f in fields(self)), np.zeros_like(self.weights))


def memory(w: Workloads, stage: Column | int, c: MemoryConstants) -> Memory:
    """Of one rank of pipeline stage `stage` (0 .. pp - 1; -1 is the last)."""
    stage = np.where(np.asarray(stage) < 0, w.pp - 1, stage)
    first, last = stage == 0, stage == w.pp - 1
    layers = layers_of_stage(w, stage, layer_parameters(w))
    per_layer = layer_parameters(w) / w.tp
    table = w.vocab * w.hidden / w.tp
    # A tied output projection is a copy of the embedding, on the last stage its own.
    tables = first * table + last * np.where((w.pp == 1) & (w.tied > 0), 0, table)
    params = layers * per_layer + tables
    # In a pipeline they stay gathered until the last micro-batch is through.
    dp_of_weights = np.where((w.zero_stage >= 3) & (w.pp == 1), w.dp, 1)
    dp_of_gradients = np.where((w.zero_stage >= 2) & (w.pp == 1), w.dp, 1)
    weights = 2 * params / dp_of_weights + np.where(w.zero_stage >= 3, 2 * 2 * per_layer, 0)
    grad_bytes = np.where(w.precision == "fp16", 2, 4) + 2 * keeps_half_gradients(w)
    gradients = grad_bytes * params / dp_of_gradients
    optimizer = 12 * params / np.where(w.zero_stage >= 1, w.dp * w.cp, 1)

    tokens = w.micro_batch * w.seq_len / w.cp
    kept = kept_bytes(w) * tokens
    whole = layer_bytes(w) * tokens
    in_flight = micro_batches_in_flight(w, stage)
    activations = in_flight * layers * kept
    logits = last * loss_bytes(w, tokens)
    # A layer is recomputed when the logits are gone: the larger of the two is the peak.
    recomputed = np.where(w.recompute == "none", 0, np.maximum(0, whole - kept - logits))
    inputs = 2 * tokens * w.hidden
    spread = np.where(w.seq_parallel > 0, w.tp, 1)
    communication = np.where(w.pp > 1, 2 * inputs / spread, 0) + np.where(w.tp > 1, 2 * inputs, 0)
    communication = communication + bucket_bytes(w)
    moving = activations + recomputed + logits
    allocator = (c.allocator - 1) * moving + c.libraries_gib * GIB
    held = weights + gradients + optimizer + moving + communication + allocator
    waiting = waiting_tensors(w, layers) * inputs
    # Before it gives up, the allocator waits for them.
    room = (w.gpu.memory_gib - BEYOND_ALLOCATOR_GIB) * GIB
    ahead = runs_ahead(w, tokens * per_layer) & (held + waiting <= room)
    allocator = allocator + np.where(ahead, waiting, 0)
    return Memory(
        weights, gradients, optimizer, activations, recomputed, logits, communication, allocator
    )


def layer_parameters(w: Workloads) -> Column:
    """Weights of one transformer layer, all tensor-parallel ranks together."""
    attention = 2 * w.hidden * (w.query_width + w.kv_width)
    return attention + (2 + w.gated) * w.hidden * w.ffn


def layer_bytes(w: Workloads) -> Column:
    """Activations of one layer that its backward pass reads, bytes a token (Korthikanti et al.
    2022, equations 1 to 4, with the widths of grouped queries and of a gated MLP)."""
    h, query, kv = w.hidden, w.query_width, w.kv_width
    spread = np.where(w.seq_parallel > 0, w.tp, 1)
    dropout = np.where(w.gated > 0, 0, 2 * h)
    outside = 8 * h + dropout  # inputs and outputs of both norms, and the dropout masks
    rotated = np.where(w.gated > 0, 2 * (query + kv), 0)
    inside = 2 * (query + 2 * kv) + 2 * query + rotated + within_mlp(w)
    return outside / spread + inside / w.tp + score_bytes(w)


def within_mlp(w: Workloads) -> Column:
    """Of them, over all tensor-parallel ranks, those between the MLP's matrices."""
    return np.where(w.gated > 0, 8 * w.ffn, 4 * w.ffn)


def loss_bytes(w: Workloads, tokens: Column) -> Column:
    """Logits of one micro-batch of so many tokens, and what is made of them. In chunks: those of
    one chunk (bf16, float32, and a float32 result of PyTorch's), and the float32 sum of the output
    weight's gradient with the bf16 part that joins it."""
    vocab = w.vocab / w.tp
    in_chunks = 12 * np.minimum(w.loss_chunk, tokens) * vocab + 6 * w.hidden * vocab
    return np.where(w.loss_chunk > 0, in_chunks, logit_bytes(w) * tokens * vocab)


def logit_bytes(w: Workloads) -> Column:
    """Bytes alive for each logit at the loss. PyTorch's cross-entropy: bf16 logits 2, float32 4,
    log-probabilities 4, bf16 gradient 2. nanotron makes the gradient in place of the probabilities.
    Megatron-Core overwrites the float32 ones as well."""
    bytes_a_logit = np.select([has_megatron_loss(w), w.framework == "nanotron"], [6.5, 10.0], 12.0)
    return bytes_a_logit + 4 * defers_output_gradient(w)


def score_bytes(w: Workloads) -> Column:
    """Attention scores, softmax and dropout mask of one layer without FlashAttention, bytes a
    token."""
    return np.where(keeps_scores(w), 5 * w.heads * w.seq_len / w.tp, 0)


def kept_bytes(w: Workloads) -> Column:
    """What of it stays until the backward pass, by recompute mode."""
    whole, scores = layer_bytes(w), score_bytes(w)
    inputs = 2 * w.hidden / np.where(w.seq_parallel > 0, w.tp, 1)
    kept = {
        "full": inputs,
        "selective": whole - scores,
        "mlp": whole - within_mlp(w) / w.tp,
        "selective_block": (whole + inputs) / 2,
    }
    return np.select([w.recompute == mode for mode in kept], list(kept.values()), whole)


def micro_batches_in_flight(w: Workloads, stage: Column) -> Column:
    """Micro-batches whose activations a stage holds at once: 1F1B's warm-up and one; with virtual
    stages in units of a whole stage (Megatron-Core's schedule)."""
    ahead = w.pp - 1 - stage
    plain = np.minimum(ahead + 1, w.micro_batches)
    virtual = chunks(w)
    in_units = np.minimum(2 * ahead + (virtual - 1) * w.pp + 1, w.micro_batches * virtual)
    return np.where(virtual > 1, in_units / virtual, plain)


def peak_memory(w: Workloads, c: MemoryConstants) -> tuple[Column, Column]:
    """Bytes of the fullest rank, and of the one that the source of a row reads."""
    # The second stage may hold more layers than the first; later ones fewer micro-batches.
    stages = [memory(w, stage, c) for stage in (0, np.minimum(1, w.pp - 1), -1)]
    fullest = np.maximum.reduce([stage.total for stage in stages])
    printed = [s.total - np.where(prints_tensors_only(w), s.allocator, 0) for s in stages]
    which, _ = reading(w)
    return fullest, np.select(
        [which == 0, which == -1], [printed[0], printed[-1]], np.maximum.reduce(printed)
    )
