"""What the published tables mean where their columns do not say it.

    keeps_scores(work); layers_of_stage(work, stage, layer_parameters)
    stage, unit = reading(work)          # which rank's memory a source prints, in which bytes

Every rule here is a trap that was found by comparing rows of one source with each other; each says
what it rests on. A source that is not named is taken at its word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_ext.planning.workload import Column, Workloads

GB, GIB = 1e9, 2.0**30
Mask = NDArray[np.bool_]

# Narayanan et al. 2021, Megatron-LM's and NeMo's own recipes: norms, biases, dropout and
# activations run as fused kernels.
FUSED_STACKS = ("megatron", "nemo")
# Bandwidth between nodes where it is not the data sheet's: Jean Zay has four 100 Gb/s Omni-Path
# links a node of eight GPUs.
NETWORK_GB_PER_S = {"bigscience_tr11": 6.25}


def contains(column: NDArray[np.str_], *words: str) -> Mask:
    """Rows whose text holds one of the words, in any case."""
    lower = np.char.lower(column)
    return np.any([np.char.find(lower, word) >= 0 for word in words], axis=0)


def has_fused_kernels(w: Workloads) -> Mask:
    """Whether memory-bound layers run fused."""
    return contains(w.framework, *FUSED_STACKS)


def has_megatron_loss(w: Workloads) -> Mask:
    """Whether the cross-entropy is Megatron-Core's, which overwrites its float32 logits. Its fused
    one does not: each of its compiled parts writes a tensor of its own."""
    return contains(w.framework, *FUSED_STACKS, "mcore") & ~contains(w.model, "loss_fusion")


def keeps_scores(w: Workloads) -> Mask:
    """Whether the attention scores [heads, sequence, sequence] stay for the backward pass.

    flash_attn says so, except for Megatron-LM's golden values: peaks of one configuration there
    differ by exactly 5 bytes a score and layer. They are kept without Transformer Engine, in runs
    from scratch and on the older cluster, not kept in resumed runs and with context parallelism.
    """
    golden = w.source_id == "megatron_golden"
    fused = contains(w.model, "_te_") & contains(w.model, "resume")
    fused &= ~contains(w.framework, "dracooci")
    fused |= contains(w.model, "reshard", "memory_speed") | (w.cp > 1)
    return np.where(golden, ~fused, w.flash_attn == 0)


def waiting_tensors(w: Workloads, layers: Column) -> Column:
    """Whole inputs of a layer (2 bytes x tokens x hidden) that are dead but cannot be used again.

    What NCCL reads is free when its stream has passed; until then a CPU that runs ahead takes new
    memory. nanotron's sweep shows about 15, one for each of the stage's `layers` and one for each
    micro-batch in flight; kept inputs would grow with the product of the two, and do not.
    """
    return np.where((w.framework == "nanotron") & (w.tp > 1), 15 + layers + w.pp, 0.0)


def runs_ahead(w: Workloads, work: Column) -> Mask:
    """Whether they wait. Not where the CPU does: at two stages, which often wait for messages,
    unless `work` (multiply-adds of one layer on a rank) keeps the GPU busy long; and not where runs
    were several times slower, as most on 512 GPUs and most pipelines with tensor parallelism over
    many nodes."""
    alone = (w.pp == 1) & ((w.gpus < 512) | (w.tp > 16))
    two = (w.pp == 2) & (w.gpus <= 128) & (w.tp <= 8) & (work > 7e11)
    more = (w.pp > 2) & (w.gpus < 512) & (w.tp * w.gpus <= 2048)
    return alone | two | more


def keeps_half_gradients(w: Workloads) -> Mask:
    """Whether gradients exist in 16 bits as well, beside their float32 sums: DeepSpeed's bf16
    optimizer keeps both; nanotron adds PyTorch's up after each backward pass, or has them in
    DistributedDataParallel's buckets."""
    deepspeed = contains(w.framework, "deepspeed") & (w.precision == "bf16")
    return deepspeed | ((w.framework == "nanotron") & (w.dp > 1))


def reduces_everywhere(w: Workloads) -> Mask:
    """Whether a sharded optimizer's gradients are all-reduced, not reduced and scattered: nanotron
    does, and gathers the weights all the same."""
    return w.framework == "nanotron"


def gradient_messages(w: Workloads, params: Column) -> Column:
    """Collectives that the gradients of so many weights take. nanotron's are those of PyTorch's
    DistributedDataParallel, one for each 25 MB: its runs lose the more the more ranks a ring has,
    at equal bytes. Others' buckets are larger, Megatron-Core's the more so the more ranks."""
    return np.where(w.framework == "nanotron", np.ceil(2 * params / 25e6), 1.0)


def bucket_bytes(w: Workloads) -> Column:
    """Buffers of the data-parallel collectives. DeepSpeed's ZeRO: 9 GB at its default bucket size
    of 5e8 elements (4.5 buckets of 2 bytes for reducing, as many for gathering, which its users are
    told to count with overlap_comm; BigScience's rows lack about as much without it). Megatron-
    Core's are the gradients themselves."""
    buckets = 2 * 4.5 * 5e8 * 2
    return np.where(contains(w.framework, "deepspeed") & (w.zero_stage > 0), buckets, 0.0)


def defers_output_gradient(w: Workloads) -> Mask:
    """Golden values that compute the output weight's gradient at the end of a step: gradients of
    logits of two micro-batches more are alive, 2 bytes each."""
    return (w.source_id == "megatron_golden") & contains(w.model, "defer_embedding_wgrad")


def stage_layers(w: Workloads) -> tuple[Column, Column, Column]:
    """Transformer layers of the first, a middle and the last pipeline stage: what is said of the
    ends, else an even share of the rest. Where the layers do not divide but do with two more, the
    embedding and the output projection count as one each (BLOOM's 70 layers on 12 stages)."""
    with_ends = (w.num_layers + 2) / w.pp
    as_layers = (w.num_layers % w.pp != 0) & (with_ends % 1 == 0) & (w.pp > 1)

    def end(said: Column) -> Column:
        return np.where(w.pp > 1, np.where(as_layers & (said == 0), with_ends - 1, said), 0)

    first, last = end(w.first_layers), end(w.last_layers)
    ends = (first > 0) * 1.0 + (last > 0)
    even = (w.num_layers - first - last) / np.maximum(1, w.pp - ends)
    return np.where(first > 0, first, even), even, np.where(last > 0, last, even)


def layers_of_stage(w: Workloads, stage: Column, layer_parameters: Column) -> Column:
    """Those of one stage; but nanotron fills a stage until its share of all weights, the output
    projection among them, is passed, so the first ones hold more. Where the share is met exactly
    (its 1B model on 2 and 4 stages), some runs hold one layer more and some do not: half of it."""
    first, middle, last = stage_layers(w)
    even = np.select([stage == 0, stage == w.pp - 1], [first, last], middle)
    share = (w.num_layers + w.vocab * w.hidden / layer_parameters) / w.pp
    passed = np.where(share == np.round(share), share + 0.5, np.ceil(share))
    most = np.minimum(passed, w.num_layers)
    rest = np.maximum(1.0, w.num_layers - most * (w.pp - 1))
    balanced = np.where(stage == w.pp - 1, rest, most)
    return np.where((w.framework == "nanotron") & (w.pp > 1), balanced, even)


def network_gb_per_s(w: Workloads) -> Column:
    """Between nodes, each way, GB/s a GPU."""
    known = np.array([NETWORK_GB_PER_S.get(str(source), np.nan) for source in w.source_id])
    return np.where(np.isnan(known), w.gpu.network_gb_per_s, known)


def reading(w: Workloads) -> tuple[Column, Column]:
    """Stage whose memory is printed (-1 the last, nan the fullest) and bytes of the unit.

    From mem_kind, or from the source where that is empty: nanotron prints the first rank in GiB,
    the golden values the last stage in 10^9 bytes; everybody else the fullest rank in GiB.
    """
    golden = (w.source_id == "megatron_golden") | contains(w.mem_kind, "last rank")
    first = (w.source_id == "nanotron_ultrascale") | contains(w.mem_kind, "rank 0")
    stage = np.select([golden, first], [-1.0, 0.0], np.nan)
    return stage, np.where(golden | contains(w.mem_kind, "gb=1e9"), GB, GIB)


def prints_tensors_only(w: Workloads) -> Mask:
    """Whether the bytes of live tensors are printed, not those that the allocator took."""
    return (w.source_id == "megatron_golden") | contains(w.mem_kind, "allocated_bytes")


def usable_for_time(w: Workloads) -> Mask:
    """Rows whose step time is fitted: nanotron's pipelined runs, those beyond one node of tensor
    parallelism and those on more than 128 GPUs stalled (their throughput jumps tenfold)."""
    nanotron = w.source_id == "nanotron_ultrascale"
    return ~nanotron | ((w.pp == 1) & (w.tp <= 8) & (w.gpus <= 128))
