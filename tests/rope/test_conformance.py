"""Every rule against transformers' own functions, over a grid of bases, heads, factors and lengths.

    pytest tests/rope/test_conformance.py -s -q   # prints the grid, each rule's worst error

transformers works in float32, and where its ramps end it loses up to 2e-6 of a frequency to its own
rounding. So its functions are run twice: as shipped, and with every `torch.float` they name read as
float64. Ours has to agree with the second to 1e-12, and with the first within what it loses.
"""

import itertools

import numpy as np
import pytest

from megatron_ext.rope.frequencies import (
    ChangedBase,
    DynamicNtk,
    Linear,
    Llama3,
    LongRope,
    NoScaling,
    Ntk,
    Yarn,
    rope_frequencies,
    rope_to_hf,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.rope.in_float64 import in_float64  # noqa: E402 -- after torch is known to be there

BASES = (1e4, 5e5, 12345.6, 1e8)
HEAD_DIMS = (64, 80, 96, 128, 256)
FACTORS = (1.0, 2.0, 2.5, 8.0, 32.0)
LENGTHS = (2048, 4096, 8192)


def rule_of(name: str, factor: float, length: int, head_dim: int):
    pairs = head_dim // 2
    return {
        "none": lambda: NoScaling(),
        "abf": lambda: ChangedBase(base=1e4 * factor + 1),
        "linear": lambda: Linear(factor=factor),
        "ntk": lambda: Ntk(factor=factor),
        "dynamic": lambda: DynamicNtk(factor=factor, original_context_length=length),
        "yarn": lambda: Yarn(factor=factor, original_context_length=length),
        "yarn, ends not rounded": lambda: Yarn(
            factor=factor, original_context_length=length, truncate=False
        ),
        "yarn, mscale": lambda: Yarn(
            factor=factor, original_context_length=length, mscale=1.0, mscale_all_dim=0.5
        ),
        "yarn, paper": lambda: Yarn(factor=factor, original_context_length=length, form="paper"),
        "yarn, revised": lambda: Yarn(
            factor=factor, original_context_length=length, form="revised"
        ),
        "llama3": lambda: Llama3(factor=factor, original_context_length=length),
        "longrope": lambda: LongRope(
            short_factor=tuple(np.linspace(1, 1.2, pairs)),
            long_factor=tuple(np.geomspace(1, 1.25 * factor + 0.1, pairs)),
            original_context_length=length,
            factor=factor,
        ),
    }[name]()


RULES = (
    "none",
    "abf",
    "linear",
    "ntk",
    "dynamic",
    "yarn",
    "yarn, ends not rounded",
    "yarn, mscale",
    "yarn, paper",
    "yarn, revised",
    "llama3",
    "longrope",
)


def hf_config(base, head_dim, rule, context_length):
    return transformers.LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        **rope_to_hf(base, head_dim, rule, context_length=context_length),
    )


def hf_frequencies(config, current_length: int) -> tuple[np.ndarray, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        inv_freq, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=current_length)
    return inv_freq.double().numpy(), factor


@pytest.fixture(scope="module")
def report():
    """Takes a row for each rule; at the end prints them below what the cases are made of."""
    transformers.logging.set_verbosity_error()  # it warns of original lengths that are never passed
    rows: list[list[str]] = []
    yield rows
    transformers.logging.set_verbosity_warning()
    print(f"\n\nbase: {', '.join(f'{base:g}' for base in BASES)}")
    print(f"head dim: {', '.join(map(str, HEAD_DIMS))}")
    print(f"factor: {', '.join(f'{factor:g}' for factor in FACTORS)}")
    print(f"original length: {', '.join(map(str, LENGTHS))}")
    print("current length: the original length, one more, four times as long\n")
    print("| rule | cases | worst error, float64 | its case | worst error, as shipped | its case |")
    print("| --- | ---: | ---: | --- | ---: | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


@pytest.mark.parametrize("name", RULES)
def test_frequencies_are_those_of_transformers(name, report):
    from transformers import modeling_rope_utils
    from transformers.models.llama import modeling_llama

    worst = {"float64": (-1.0, ()), "float32": (-1.0, ())}
    cases = 0
    for base, head_dim, factor, length in itertools.product(BASES, HEAD_DIMS, FACTORS, LENGTHS):
        rule = rule_of(name, factor, length, head_dim)
        config = hf_config(base, head_dim, rule, int(factor * length))
        for current in (length, length + 1, 4 * length):
            ours = rope_frequencies(base, head_dim, rule, current_length=current)
            shipped, attention_factor = hf_frequencies(config, current)
            with in_float64(modeling_rope_utils, modeling_llama):
                exact, _ = hf_frequencies(config, current)
            for kind, theirs in (("float32", shipped), ("float64", exact)):
                error = float(np.abs(ours.inv_freq / theirs - 1).max())
                worst[kind] = max(worst[kind], (error, (base, head_dim, factor, length, current)))
            assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)
            cases += 1
    columns = [name, str(cases)]
    for error, case in worst.values():
        columns += [f"{error:.1e}", ", ".join(f"{number:g}" for number in case)]
    report.append(columns)
    assert worst["float64"][0] < 1e-12
    assert worst["float32"][0] < (3e-6 if name in ("yarn, ends not rounded", "llama3") else 1e-6)


@pytest.mark.parametrize("name", RULES)
def test_a_saved_configuration_means_the_same_when_it_is_loaded(name, tmp_path):
    rule = rule_of(name, 4.0, 4096, 64)
    hf_config(654321.5, 64, rule, 16384).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = rope_frequencies(654321.5, 64, rule, current_length=16384)
    theirs, attention_factor = hf_frequencies(config, 16384)
    np.testing.assert_allclose(ours.inv_freq, theirs, rtol=1e-6)
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-12)
