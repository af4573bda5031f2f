"""Rules that join several settings; what can be divided is asked of Megatron-Core itself."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.config import Config, load_config, rope_verdict, validate
from megatron_ext.config.layout import in_layout
from megatron_ext.config.rules import short_number
from megatron_ext.errors import ConfigError


def config(**changes: object) -> Config:
    """A valid config with dotted settings changed (`model__num_heads=8`); rules not asked."""
    values: dict = {
        "model": {
            "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_heads": 4,
            "vocab_size": 1536,
        },
        "rope": {"base": 1e4},
        "training": {
            "sequence_length": 256, "global_batch_size": 24, "micro_batch_size": 1, "steps": 100,
        },
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return Config.model_validate(values).resolved()


def refusal(given: Config, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(given, world_size)
    return str(caught.value)


def test_a_valid_config_has_no_warnings() -> None:
    assert validate(config()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__num_heads": 3}, "num_heads=3 does not divide model.hidden_size=256: choose 1, 2"),
        ({"model__num_kv_heads": 3}, "num_kv_heads=3 does not divide model.num_heads=4: choose 1,"),
        ({"model__head_dim": 33}, "head_dim=33 is odd"),
        ({"rope__rotary_fraction": 0.05}, "write 0.0625"),
        ({"rope__rotary_fraction": 1e-3}, "write 0.03125"),
        ({"parallel__tensor": 3}, "tensor=3 does not divide model.num_heads=4: choose 1, 2 or 4"),
        ({"parallel__tensor": 2, "model__ffn_hidden_size": 705}, "ffn_hidden_size=705: choose 1"),
        ({"parallel__tensor": 2, "model__vocab_size": 1537}, "vocab_size=1537: choose 1"),
        ({"parallel__pipeline": 3}, "pipeline=3 does not divide model.num_layers=4: choose 1, 2"),
        (
            {"parallel__overlap_param_gather": True},
            "overlap_param_gather=true needs parallel.distributed_optimizer=true: set it, or leave",
        ),
        (
            {"parallel__overlap_param_gather": True, "parallel__distributed_optimizer": True},
            "overlap_param_gather=true needs parallel.overlap_grad_reduce=true",
        ),
        (
            {"parallel__overlap_p2p_comm": True, "parallel__pipeline": 2},
            "of interleaved stages, but parallel.virtual_pipeline=1: raise it",
        ),
        (
            {"parallel__overlap_p2p_comm": False, "parallel__pipeline": 2,
             "parallel__virtual_pipeline": 2},
            "for each other: leave the setting out, or set parallel.virtual_pipeline=1",
        ),
        ({"parallel__tensor_overlap": True}, "tensor_overlap=true needs parallel.sequence=true"),
        ({"precision__fp8": "mxfp8", "precision__dtype": "fp16"}, "mxfp8 needs precision.dtype=bf"),
        (
            {"precision__dtype": "fp16", "precision__grad_reduce": "bf16"},
            "grad_reduce=bf16 needs precision.dtype=bf16, not fp16: set precision.grad_reduce=fp32",
        ),
        (
            {"precision__fp8": "tensorwise", "model__ffn_hidden_size": 776},
            "multiples of 16, but model.ffn_hidden_size over the tensor-parallel ranks is 776: cho",
        ),
        (
            {"precision__fp8": "blockwise", "training__sequence_length": 96},
            "multiples of 128, but the length of a rank's micro-batch is 96: choose 128, or",
        ),
        (
            {"data__mask_documents": True, "kernels__attention": "flash"},
            "data.mask_documents=true does not go with kernels.attention=flash: use kernels.att",
        ),
        (
            {"data__reset_positions": True, "kernels__backend": "transformer_engine"},
            "data.reset_positions=true does not go with kernels.backend=transformer_engine: use",
        ),
        (
            {"data__reset_positions": True,
             "rope__scaling": {"type": "dynamic", "factor": 2, "original_context_length": 64}},
            "data.reset_positions=true does not go with rope.scaling.type=dynamic, which goes by",
        ),
        ({"parallel__virtual_pipeline": 2}, "virtual_pipeline=2 divides pipeline stages, but"),
        (
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 4},
            "virtual_pipeline=4 does not divide the layers of every stage, 2 + 2: choose 1 or 2",
        ),
        (
            {"parallel__pipeline": 2, "parallel__first_stage_layers": 3,
             "parallel__last_stage_layers": 3},
            "first_stage_layers=3 and parallel.last_stage_layers=3 of model.num_layers=4 leave -2",
        ),
        (
            {"parallel__pipeline": 3, "parallel__first_stage_layers": 1},
            "leave 3 layers for 2 other stages: the rest must be a multiple",
        ),
        (
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2,
             "training__micro_batch_size": 8},
            "no multiple of 2 x 8: choose 32",
        ),
        ({"parallel__context": 3}, "6 chunks, which do not divide training.sequence_length=256: "
                                   "choose 258"),
        ({"parallel__sequence": True}, "parallel.tensor=1: raise it, or set parallel.sequence=fa"),
        (
            {"parallel__sequence": True, "parallel__tensor": 4, "training__sequence_length": 255},
            "choose 256 tokens",
        ),
        ({"parallel__world_size": 3, "parallel__tensor": 2}, "world size 3: start 4 processes"),
        ({"training__micro_batch_size": 5}, "size=5 x 1 data-parallel ranks = 5: choose 25"),
        ({"schedule__min_lr": 2e-3}, "min_lr=0.002 is above its peak, optimizer.lr=0.001"),
        ({"schedule__warmup_steps": 101}, "warmup_steps=101 is more than training.steps=100"),
        (
            {"schedule__warmup_steps": 50, "schedule__decay_steps": 51},
            "choose decay_steps of at most 50",
        ),
        (
            {"precision__dtype": "fp32", "precision__grad_reduce": "bf16"},
            "set precision.grad_reduce=fp32",
        ),
        ({"checkpoint__keep_every": 1500}, "choose 2000"),
        ({"rope__base": 100}, "rope.base=100 does not support training.sequence_length=256"),
        ({"rope__bound": "expect_violation"}, "rope.base=10000 supports"),
    ],
)  # fmt: skip
def test_a_broken_rule_names_values_and_fix(changes: dict, sentence: str) -> None:
    assert sentence in refusal(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__num_heads": 3, "model__head_dim": 64},
        {"model__num_kv_heads": 2, "parallel__tensor": 4},  # two ranks share a KV head
        {"schedule__warmup_steps": 100},
        {"schedule__type": "wsd", "schedule__warmup_steps": 90},
        {"schedule__type": "constant", "schedule__warmup_steps": 100},
        {"rope__rotary_fraction": 0.5, "rope__base": 100},  # half unrotated: B_m stays above 0
        {"rope__base": 100, "rope__bound": "expect_violation"},
        {"rope__base": 100, "rope__bound": "off"},
        {"parallel__sequence": True, "parallel__tensor": 4},
    ],
)
def test_a_kept_rule_passes_in_silence(changes: dict) -> None:
    assert validate(config(**changes)) == []


def test_the_fix_that_is_named_works(valid) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(valid, ["rope.base=100"])
    base = str(caught.value).partition("smallest base that does is ")[2].partition(";")[0]
    assert load_config(valid, [f"rope.base={base}"]).rope.base == float(base)
    with pytest.raises(ConfigError):
        load_config(valid, [f"rope.base={float(base) * 0.999}"])


@pytest.mark.parametrize(
    ("length", "scaling", "named"),
    [
        (1024, {"type": "none"}, "; the smallest base that does is 7753.0;"),
        # A scaled rule may be feasible elsewhere; what is certified is plain RoPE's base.
        (
            1024,
            {"type": "linear", "factor": 2},
            "; without rope.scaling the smallest base that does is 7753.0;",
        ),
        (65536, {"type": "none"}, "; `megatron-ext bound --context 65536 --head-dim 64` names"),
    ],
)
def test_a_base_below_the_bound_is_told_the_smallest_that_is_not(
    length: int, scaling: dict, named: str
) -> None:
    given = config(rope__base=100, rope__scaling=scaling, training__sequence_length=length)
    assert named in refusal(given)
    warned = config(
        rope__base=100, rope__scaling=scaling, rope__bound="warn", training__sequence_length=length
    )
    assert named.rstrip(";") in validate(warned)[0]


def test_the_real_world_size_is_judged_not_the_one_of_the_config() -> None:
    given = config(parallel__world_size=8, parallel__tensor=4)
    assert validate(given) == []
    assert "24" not in refusal(given, 6)
    assert "world size 6" in refusal(given, 6)
    assert "a world of 0 ranks" in refusal(given, 0)


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6)
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_layouts_are_accepted_exactly_when_megatron_core_accepts_them(
    heads: int, kv_heads: int, tensor: int, layers: int, pipeline: int
) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = config(
        model__num_heads=heads, model__num_kv_heads=kv_heads, model__head_dim=64,
        model__ffn_hidden_size=27720, model__vocab_size=27720, model__num_layers=layers,
        parallel__tensor=tensor, parallel__pipeline=pipeline, rope__bound="off",
    )  # fmt: skip
    try:
        TransformerConfig(
            num_layers=layers, hidden_size=256, num_attention_heads=heads, kv_channels=64,
            num_query_groups=kv_heads, tensor_model_parallel_size=tensor,
        )  # fmt: skip
        # Attention divides the query heads among the KV heads, the block its layers among stages.
        theirs = heads % kv_heads == 0 and layers % pipeline == 0
    except ValueError:
        theirs = False
    try:
        validate(given)
        ours = True
    except ConfigError:
        ours = False
    assert ours == theirs


@given(
    st.floats(2, 1e7),
    st.sampled_from([16, 64, 128]),
    st.integers(2, 3000),
    st.sampled_from([0.5, 0.75, 1.0]),
)
@settings(max_examples=60)
def test_the_bound_is_the_papers_sum(base: float, dim: int, length: int, fraction: float) -> None:
    given = config(
        rope__base=base, rope__rotary_fraction=fraction, model__head_dim=dim,
        training__sequence_length=length,
    )  # fmt: skip
    rotated = int(dim * fraction)
    theta = base ** (-np.arange(0, rotated, 2) / rotated)
    m = np.arange(length)[:, None]
    b = np.cos(m * theta).sum(1) + (dim - rotated) / 2
    verdict = rope_verdict(given)
    assert verdict.min_b == pytest.approx(b.min(), abs=1e-6)
    if np.abs(b).min() > 1e-6:
        assert verdict.feasible == bool((b >= 0).all())


def test_a_violation_may_be_a_warning() -> None:
    [warning] = validate(config(rope__base=100, rope__bound="warn"))
    assert "B_m < 0 first at m=46" in warning and "1412.4" in warning


@pytest.mark.parametrize(
    ("number", "text"),
    [(1e4, "10000"), (5e5, "5e5"), (1.25e7, "1.25e7"), (2e-5, "2e-5"), (0.001, "0.001")],
)
def test_numbers_are_shown_as_a_person_writes_them(number: float, text: str) -> None:
    assert short_number(number) == text
    assert float(text) == number


def test_a_run_of_overlapped_stages_is_read_in_other_layouts() -> None:
    overlapped = config(
        parallel__pipeline=2, parallel__virtual_pipeline=2, parallel__overlap_p2p_comm=True
    )
    for pipeline in (1, 2):
        assert in_layout(overlapped, tensor=1, pipeline=pipeline).parallel.pipeline == pipeline
