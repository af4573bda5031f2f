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
    memory. nanotron's sweep shows about 20, one for each of the stage's `layers` and one for each
    micro-batch in flight; kept inputs would grow with the product of the two, and do not. A step of
    one micro-batch has none of an earlier backward pass: three quarters.
    """
    several = np.where(w.micro_batches > 1, 1.0, 0.75)
    sweep = (w.framework == "nanotron") & (w.tp > 1)
    return np.where(sweep, (20 + layers + w.pp) * several, 0.0)


# GiB of a GPU that the allocator cannot have: the context and the buffers of NCCL's communicators.
# Hardly a run of nanotron's sweep that waiting tensors would bring within 10 GiB of the GPU's
# memory holds them; a little below it most do.
BEYOND_ALLOCATOR_GIB = 10.0


def runs_ahead(w: Workloads, work: Column) -> Mask:
    """Whether they wait. Not where the CPU does, or has no time to get ahead: without a pipeline in
    steps of 8 sequences a rank and fewer; at two stages, which wait for messages, unless `work`
    (multiply-adds of one layer on a rank) keeps the GPU busy for longer than the CPU and tensor
    parallelism's messages need; and not where runs were several times slower, as most on 512 GPUs,
    with tensor parallelism over four nodes, and of the larger models on 256 GPUs (no cause known).
    """
    alone = (w.pp == 1) & (w.global_batch / w.dp > 8)
    two = (w.pp == 2) & (w.gpus <= 128) & (work > 2.5e11 * np.sqrt(w.tp))
    more = (w.pp > 2) & (w.tp <= 16) & (w.gpus < np.where(w.hidden < 4096, 512, 256))
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


def chunks(w: Workloads) -> Column:
    """Virtual stages of a rank. A golden test has two where its column says one: its name and its
    configuration in Megatron-LM (num-virtual-stages-per-pipeline-rank) say so."""
    two = (w.source_id == "megatron_golden") & contains(w.model, "_pp4_vp2_account")
    return np.where(two, 2, w.vpp_chunks)


def stage_layers(w: Workloads) -> tuple[Column, Column, Column]:
    """Transformer layers of the first, a middle and the last pipeline stage: what is said of the
    ends, else an even share of the rest. Where the layers do not divide but do with two more, the
    embedding and the output projection count as one each (BLOOM's 70 layers on 12 stages). A golden
    test of uneven stages has 2 at either end, by its configuration in Megatron-LM."""
    with_ends = (w.num_layers + 2) / w.pp
    as_layers = (w.num_layers % w.pp != 0) & (with_ends % 1 == 0) & (w.pp > 1)

    def end(said: Column) -> Column:
        return np.where(w.pp > 1, np.where(as_layers & (said == 0), with_ends - 1, said), 0)

    uneven = (w.source_id == "megatron_golden") & contains(w.model, "_uneven_pipeline")
    first, last = (end(np.where(uneven, 2, said)) for said in (w.first_layers, w.last_layers))
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
    most = np.minimum(np.ceil(share), w.num_layers)
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
