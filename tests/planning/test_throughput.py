"""Step time against what no machine can break and what the schedule says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.planning.throughput import TimeConstants, step_time
from tests.planning.rows import row


def seconds(**different: Any) -> float:
    return float(step_time(row(**different), TimeConstants()).total[0])


def test_the_bubble_is_that_of_narayanan_et_al() -> None:
    # (p - 1) / m of the time of the layers, and divided by the chunks when interleaved.
    parts = step_time(row(pp=4, dp=2), TimeConstants())
    layers = sum(
        getattr(parts, name)
        for name in ("matmul", "attention", "memory_bound", "launch", "recompute")
    )
    micro_batches = 64 / (2 * 4)
    assert (parts.pipeline_bubble / layers)[0] == pytest.approx(3 / micro_batches)
    chunked = step_time(row(pp=4, dp=2, vpp_chunks=2), TimeConstants())
    assert (chunked.pipeline_bubble / layers)[0] == pytest.approx(1.5 / micro_batches)


@given(
    tp=st.sampled_from([1, 2, 4, 8]), pp=st.sampled_from([1, 2, 4]), b=st.integers(1, 8),
    h=st.sampled_from([512, 2048, 8192]), s=st.sampled_from([512, 4096, 65536]),
    gpu=st.sampled_from(["a100_40gb", "h100", "b200"]), flash=st.booleans(),
)  # fmt: skip
def test_nothing_is_faster_than_the_data_sheet(
    tp: int, pp: int, b: int, h: int, s: int, gpu: str, flash: bool
) -> None:
    work = row(
        tp=tp, pp=pp, dp=2, gpus=2 * tp * pp, micro_batch=b, global_batch=16 * b, hidden=h,
        ffn=4 * h, seq_len=s, gpu=gpu, flash_attn=int(flash),
    )  # fmt: skip
    flops = 16 * b * s * (24 * (6 * 12 * h**2 + 6 * h * s) + 6 * h * 51200)  # causal attention
    best = flops / (2 * tp * pp * float(work.gpu.peak_tflops[0]) * 1e12)
    parts = step_time(work, TimeConstants())
    assert parts.total[0] >= best
    assert all((values >= 0).all() for values in vars(parts).values())
    assert parts.total[0] == pytest.approx(sum(float(v[0]) for v in vars(parts).values()))


def test_recompute_costs_a_forward_pass() -> None:
    ratio = seconds(recompute="full", micro_batch=8) / seconds(micro_batch=8)
    assert 1.2 < ratio < 1.4  # a third of forward and backward, less what is not of the layers
    # Two thirds of the weights of a GPT layer are its MLP's, and less of its time.
    none, mlp, full = (
        seconds(recompute=mode, micro_batch=8, flash_attn=1) for mode in ("none", "mlp", "full")
    )
    assert 0.5 < (mlp - none) / (full - none) < 2 / 3


def test_small_layers_wait_for_the_cpu_and_large_ones_do_not() -> None:
    small = step_time(row(hidden=512, ffn=2048, seq_len=512, micro_batch=1), TimeConstants())
    large = step_time(row(hidden=8192, ffn=32768, micro_batch=4), TimeConstants())
    assert small.launch[0] > small.matmul[0]
    assert large.launch[0] == 0


def test_tensor_parallelism_across_nodes_is_slower_than_within() -> None:
    within = step_time(row(tp=8, dp=2, gpus=16), TimeConstants()).tensor_parallel[0]
    across = step_time(row(tp=16, dp=1, gpus=16), TimeConstants()).tensor_parallel[0]
    assert across > within


def test_many_small_gradient_messages_cost_the_more_the_more_ranks() -> None:
    # Bytes over the bandwidth hardly differ between 64 and 128 ranks; buckets of 25 MB do.
    def grows(framework: str) -> float:
        times = [
            step_time(row(framework=framework, gpus=n, dp=n, global_batch=512), TimeConstants())
            for n in (64, 128)
        ]
        return float(times[1].data_parallel[0] / times[0].data_parallel[0])

    assert grows("Megatron-LM") < 1.02
    assert 1.02 < grows("nanotron") < 2


def test_narrow_heads_cost_more_a_flop() -> None:
    # Dao 2023, figure 4 (A100, causal, forward and backward): 171 TFLOP/s at 64, 187 at 128.
    def attention(heads: int, head_dim: int) -> float:
        work = row(flash_attn=1, heads=heads, head_dim=head_dim)
        return float(step_time(work, TimeConstants()).attention[0])

    assert attention(32, 64) / attention(16, 128) == pytest.approx(187 / 171, rel=0.02)
    # 80 are padded to 96.
    assert attention(16, 80) == pytest.approx(attention(16, 96))


def test_the_stage_with_the_output_projection_is_waited_for() -> None:
    # As many layers in sum; two fewer on the last stage make room for its 250,000 logits.
    even = seconds(pp=4, dp=2, vocab=250880)
    assert seconds(pp=4, dp=2, vocab=250880, last_layers=3) < even
    assert seconds(pp=4, dp=2, vocab=250880, last_layers=9) > even


def test_a_table_is_its_rows() -> None:
    one = [seconds(micro_batch=b) for b in (1, 2, 4)]
    from megatron_ext.planning.workload import from_rows
    from tests.planning.rows import GPT

    work = from_rows([{**GPT, "micro_batch": b} for b in (1, 2, 4)])
    np.testing.assert_allclose(step_time(work, TimeConstants()).total, one)
