"""Bytes of a rank against the formulas of the papers, written down here a second time."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.planning.memory import (
    Memory,
    MemoryConstants,
    kept_bytes,
    layer_bytes,
    layer_parameters,
    memory,
    micro_batches_in_flight,
)
from tests.planning.rows import row

H, A, S = 2048, 16, 2048


def test_activations_are_those_of_korthikanti_et_al() -> None:
    # Equations 1, 2, 4 and 6, per token: a layer without parallelism, with tensor and with
    # sequence parallelism, and with selective recompute.
    t = 4
    assert layer_bytes(row())[0] == H * (34 + 5 * A * S / H)
    assert layer_bytes(row(tp=t, dp=2))[0] == H * (10 + 24 / t + 5 * A * S / (H * t))
    assert layer_bytes(row(tp=t, dp=2, seq_parallel=1))[0] == H / t * (34 + 5 * A * S / H)
    assert kept_bytes(row(recompute="selective"))[0] == H * 34
    assert kept_bytes(row(recompute="mlp", flash_attn=1))[0] == H * 18  # less 2 x 2 bytes x 4 H
    assert kept_bytes(row(recompute="full"))[0] == 2 * H
    assert kept_bytes(row(flash_attn=1))[0] == H * 34


def test_weights_gradients_and_optimizer_are_eighteen_bytes_a_parameter() -> None:
    parameters = 24 * 12 * H**2 + 51200 * H
    parts = memory(row(), 0, MemoryConstants())
    held = parts.weights + parts.gradients + parts.optimizer
    assert held[0] == 18 * parameters
    # ZeRO (Rajbhandari et al. 2020, figure 1): stage 1 leaves 12 / N of the optimizer's bytes.
    sharded = memory(row(zero_stage=1), 0, MemoryConstants())
    assert sharded.optimizer[0] == 12 * parameters / 8


def test_half_precision_gradients_make_it_sixteen() -> None:
    parts = memory(row(precision="fp16"), 0, MemoryConstants())
    assert (parts.weights + parts.gradients + parts.optimizer)[0] == 16 * (
        24 * 12 * H**2 + 51200 * H
    )


@pytest.mark.parametrize("stage", range(4))
def test_earlier_stages_hold_more_micro_batches(stage: int) -> None:
    # Narayanan et al. 2021, section 2.2: at most as many as stages are still to come, and its own.
    work = row(pp=4, dp=2)
    assert micro_batches_in_flight(work, np.array([stage]))[0] == 4 - stage


def test_a_pipeline_holds_no_more_micro_batches_than_there_are() -> None:
    assert micro_batches_in_flight(row(pp=8, dp=1, global_batch=8), np.array([0]))[0] == 2


def test_interleaved_stages_hold_more() -> None:
    # Megatron-Core's warm-up on the first of 4 stages with 3 chunks: 2 x 3 + 2 x 4 chunks, and one.
    work = row(pp=4, dp=2, vpp_chunks=3)
    assert micro_batches_in_flight(work, np.array([0]))[0] == pytest.approx(15 / 3)


def test_only_the_last_stage_has_logits_and_the_tables_lie_at_both_ends() -> None:
    work = row(pp=4, dp=2)
    parts = [memory(work, stage, MemoryConstants()) for stage in range(4)]
    assert [p.logits[0] > 0 for p in parts] == [False, False, False, True]
    table = 2 * 51200 * H
    assert parts[0].weights[0] - parts[1].weights[0] == table
    assert parts[3].weights[0] - parts[1].weights[0] == table


@given(
    tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), b=st.integers(1, 8),
    zero=st.integers(0, 3), sp=st.booleans(), recompute=st.sampled_from(["none", "mlp", "full"]),
)  # fmt: skip
def test_splitting_more_never_takes_more(
    tp: int, pp: int, b: int, zero: int, sp: bool, recompute: str
) -> None:
    def total(**different: object) -> float:
        one = {"tp": tp, "pp": pp, "dp": 4, "micro_batch": b, "global_batch": 64 * b,
               "zero_stage": zero, "seq_parallel": int(sp), "recompute": recompute}  # fmt: skip
        parts: Memory = memory(row(**{**one, **different}), 0, MemoryConstants())
        assert parts.total[0] == pytest.approx(sum(float(v[0]) for v in vars(parts).values()))
        return float(parts.total[0] - parts.communication[0] * 1.2)

    assert total(tp=2 * tp) <= total()
    assert total(zero_stage=min(1, zero + 1)) <= total(zero_stage=0)
    assert total(recompute="full") <= total(recompute="none")
    assert total(micro_batch=2 * b) >= total()


def test_layer_parameters_of_a_llama_with_grouped_queries() -> None:
    # Llama 3 8B: 4 heads x 1024, three matrices 4096 x 14336.
    work = row(hidden=4096, heads=32, kv_heads=8, ffn=14336, gated=1)
    assert layer_parameters(work)[0] == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336


def test_heads_may_be_wider_than_the_model() -> None:
    # Gemma-like: 16 heads of 256 on a width of 2048; q, k, v and the output are twice as large.
    wide, plain = row(head_dim=256), row()
    assert layer_parameters(wide)[0] - layer_parameters(plain)[0] == 4 * H**2
    assert (kept_bytes(wide) - kept_bytes(plain))[0] == 8 * H  # q, k, v and what comes of them


def test_only_what_comes_and_goes_leaves_gaps() -> None:
    c = MemoryConstants(libraries_gib=0, allocator=1.25)
    parts = memory(row(), 0, c)
    assert parts.allocator[0] == pytest.approx(0.25 * (parts.activations + parts.logits)[0])
    assert memory(row(micro_batch=8), 0, c).allocator[0] == pytest.approx(2 * parts.allocator[0])


def test_a_layer_is_recomputed_when_the_logits_are_gone() -> None:
    parts = memory(row(recompute="full"), 0, MemoryConstants())
    tokens = 4 * S
    layer = (layer_bytes(row())[0] - 2 * H) * tokens
    assert (parts.recomputed_layer + parts.logits)[0] == max(layer, 6.5 * tokens * 51200)


def test_stages_that_count_the_embedding_have_a_layer_less_at_the_ends() -> None:
    # BLOOM: 70 layers on 12 stages are 5 + 10 x 6 + 5.
    work = row(num_layers=70, pp=12, tp=1, dp=1, global_batch=4)
    stages = [memory(work, stage, MemoryConstants()) for stage in range(12)]
    table = 2 * 51200 * H
    weights = [round(float(s.weights[0]) - table * (i in (0, 11))) for i, s in enumerate(stages)]
    assert [w / (2 * 12 * H**2) for w in weights] == [5, *[6] * 10, 5]


def test_sharded_weights_stay_whole_in_a_pipeline() -> None:
    def held(pp: int) -> float:
        parts = memory(row(pp=pp, dp=8 // pp, zero_stage=3), 1 if pp > 2 else 0, MemoryConstants())
        return float((parts.weights + parts.gradients)[0])

    layers = 24 // 4 * 12 * H**2  # of a middle stage
    assert held(4) == 6 * layers + 4 * 12 * H**2
    assert held(1) < held(4)


LLAMA_1B = {
    "framework": "nanotron", "num_layers": 16, "heads": 32, "gated": 1, "vocab": 131072,
    "seq_len": 4096, "global_batch": 256, "micro_batch": 1, "zero_stage": 1, "flash_attn": 1,
}  # fmt: skip


def test_inputs_that_wait_for_a_collective_are_neither_kept_ones_nor_beyond_the_gpu() -> None:
    def waiting(**different: Any) -> float:
        work = row(**{**LLAMA_1B, "seq_parallel": 1, **different})
        parts = memory(work, 0, MemoryConstants(libraries_gib=0, allocator=1))
        return float(parts.allocator[0] / (2 * work.micro_batch * 4096 * H)[0])

    alone = waiting(tp=8, gpus=64)
    # Eight stages hold eight micro-batches of a few layers: kept inputs would be as many as alone.
    assert 15 < waiting(tp=8, pp=8, gpus=64) < alone < 60
    assert waiting(tp=8, gpus=64, micro_batch=4) == pytest.approx(alone)
    assert waiting(tp=8, gpus=64, micro_batch=64) == 0  # 60 GiB without them: the allocator waits
    assert waiting(tp=1, gpus=64) == waiting(tp=8, gpus=64, framework="Megatron-LM") == 0


def test_the_first_stages_hold_the_layers_that_fill_their_share() -> None:
    # The output projection weighs as much as 4 layers: each of 2 stages has a share of exactly 10.
    def layers(pp: int) -> float:
        work = row(**LLAMA_1B, tp=1, pp=pp, gpus=64)
        weights = memory(work, 0, MemoryConstants()).weights[0] - 2 * 131072 * H
        return float(weights / 2 / layer_parameters(work)[0])

    assert [layers(pp) for pp in (2, 4, 8)] == [10, 5, 3]


def test_messages_between_stages_are_split_like_activations() -> None:
    def message(**different: Any) -> float:
        parts = [memory(row(**different, pp=pp, dp=1), 0, MemoryConstants()) for pp in (1, 2)]
        return float(parts[1].communication[0] - parts[0].communication[0])

    whole = 2 * 2 * 4 * S * H  # one that comes and one that goes
    assert message(tp=4) == whole
    assert message(tp=4, seq_parallel=1) == whole / 4
