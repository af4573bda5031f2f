"""Every rule against PAPERS' numbers, its own properties, high precision, and Hugging Face's keys.

The comparison with transformers' functions is in test_conformance.py.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

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
    rope_from_hf,
    rope_to_hf,
    rotary_dimensions,
)

# By index, not by shape: what the numbers of the papers are for (head dim 128).
THETA = 1e4 ** (-np.arange(64) / 64)


def longrope(pairs: int = 64, **changes) -> LongRope:
    values = {
        "short_factor": tuple(1 + 0.01 * i for i in range(pairs)),
        "long_factor": tuple(1 + 0.5 * i for i in range(pairs)),
        "original_context_length": 4096,
        "factor": 8.0,
    }
    return LongRope(**{**values, **changes})


def rules(factor: float, pairs: int = 64) -> list:
    return [
        Linear(factor=factor),
        Ntk(factor=factor),
        DynamicNtk(factor=factor, original_context_length=4096),
        *(
            Yarn(factor=factor, original_context_length=4096, form=form)
            for form in ("code", "paper", "revised")
        ),
        Llama3(factor=factor, original_context_length=8192),
        LongRope(
            short_factor=(1.0,) * pairs,
            long_factor=(factor,) * pairs,
            original_context_length=4096,
            factor=factor,
        ),
    ]


# --- the numbers of the papers ---


@pytest.mark.parametrize(
    ("factor", "base"),
    [(2, 20221.26), (4, 40889.94), (8, 82684.62), (16, 167198.74), (32, 338096.95)],
)
def test_ntk_amounts_to_the_published_bases(factor, base):
    assert Ntk(factor=factor).base(1e4, 128) == pytest.approx(base, abs=0.01)


@pytest.mark.parametrize(
    ("length", "base"), [(4096, 1e4), (8192, 30527.74), (16384, 72195.86), (32768, 156588.32)]
)
def test_dynamic_ntk_follows_the_current_length(length, base):
    rule = DynamicNtk(factor=2, original_context_length=4096)
    assert rule.base(1e4, 128, length) == pytest.approx(base, abs=0.01)
    rope = rope_frequencies(1e4, 128, rule, current_length=length)
    np.testing.assert_allclose(rope.inv_freq, base ** (-np.arange(64) / 64), rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "length", "ends"),
    [
        (1e4, 2048, (16, 41)),
        (1e4, 4096, (20, 46)),
        (1e4, 8192, (25, 50)),
        (5e5, 4096, (14, 32)),
        (5e5, 8192, (18, 35)),
    ],
)
def test_yarn_places_its_ramp_as_the_authors_do(base, length, ends):
    assert Yarn(factor=8, original_context_length=length).ramp_ends(base, 128) == ends


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(2, 1.069315), (4, 1.138629), (8, 1.207944), (16, 1.277259), (32, 1.346574), (64, 1.415888)],
)
def test_yarn_has_the_published_attention_factors(factor, expected):
    rope = rope_frequencies(1e4, 128, Yarn(factor=factor, original_context_length=4096))
    assert rope.attention_factor == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(("factor", "expected"), [(8, 1.118034), (32, 1.190238)])
def test_longrope_has_the_published_attention_factors(factor, expected):
    rope = rope_frequencies(1e4, 128, longrope(factor=factor))
    assert rope.attention_factor == pytest.approx(expected, abs=5e-7)


# --- high precision ---


def exact(rule, base: float, dim: int) -> list[float]:
    """Each rule's formula from its paper, once more, in 40 digits and by scalars."""
    with mp.workdps(40):
        result = []
        for i in range(dim // 2):
            theta = mpf(base) ** (mpf(-2 * i) / dim)
            s = mpf(rule.factor)
            if isinstance(rule, Linear):
                value = theta / s
            elif isinstance(rule, Ntk):
                value = (mpf(base) * s ** (mpf(dim) / (dim - 2))) ** (mpf(-2 * i) / dim)
            elif isinstance(rule, Llama3):
                wavelength = 2 * mp.pi / theta
                turns = mpf(rule.original_context_length) / wavelength
                if turns > rule.high_freq_factor:
                    value = theta
                elif turns < rule.low_freq_factor:
                    value = theta / s
                else:
                    smooth = (turns - rule.low_freq_factor) / (
                        rule.high_freq_factor - rule.low_freq_factor
                    )
                    value = theta * ((1 - smooth) / s + smooth)
            elif rule.form == "paper":
                turns = rule.original_context_length * theta / (2 * mp.pi)
                if turns < rule.beta_slow:
                    gamma = mpf(0)
                elif turns > rule.beta_fast:
                    gamma = mpf(1)
                else:
                    gamma = (turns - rule.beta_slow) / (rule.beta_fast - rule.beta_slow)
                value = (1 - gamma) * theta / s + gamma * theta
            else:

                def dimension(turns):
                    length = rule.original_context_length
                    return dim * mp.log(length / (2 * mp.pi * turns)) / (2 * mp.log(mpf(base)))

                low = max(mp.floor(dimension(rule.beta_fast)), 0)
                high = min(mp.ceil(dimension(rule.beta_slow)), dim - 1)
                ramp = min(max((i - low) / (high - low), 0), 1)
                if rule.form == "code":
                    value = theta / s * ramp + theta * (1 - ramp)
                else:
                    value = theta / (ramp * s + 1 - ramp)
            result.append(float(value))
        return result


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("base", [1e4, 5e5, 123456.7])
@pytest.mark.parametrize("factor", [1.0, 2.5, 32.0])
def test_rules_have_fifteen_digits(dim, base, factor):
    for rule in rules(factor, dim // 2):
        if isinstance(rule, DynamicNtk | LongRope):
            continue
        ours = rope_frequencies(base, dim, rule).inv_freq
        np.testing.assert_allclose(ours, exact(rule, base, dim), rtol=3e-14)


# --- properties ---


@pytest.mark.parametrize("rule", rules(1.0), ids=lambda rule: getattr(rule, "form", rule.type))
@pytest.mark.parametrize("base", [1e4, 5e5])
def test_factor_one_changes_nothing(rule, base):
    rope = rope_frequencies(base, 128, rule, current_length=4096)
    np.testing.assert_allclose(rope.inv_freq, base ** (-np.arange(64) / 64), rtol=1e-14)
    assert rope.attention_factor == 1.0


@given(
    base=st.floats(100, 1e9),
    factor=st.floats(1, 256),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    length=st.integers(128, 1 << 20),
)
@settings(deadline=None, max_examples=100)
def test_frequencies_are_positive_and_fall(base, factor, head_dim, length):
    for rule in rules(factor, head_dim // 2):
        inv_freq = rope_frequencies(base, head_dim, rule, current_length=length).inv_freq
        assert inv_freq.dtype == np.float64 and len(inv_freq) == head_dim // 2
        assert (inv_freq > 0).all()
        assert (np.diff(inv_freq) < 0).all()


@pytest.mark.parametrize("form", ["code", "paper", "revised"])
def test_yarn_keeps_the_highest_and_divides_the_lowest(form):
    rope = rope_frequencies(1e4, 128, Yarn(factor=8, original_context_length=4096, form=form))
    scale = THETA / rope.inv_freq
    np.testing.assert_allclose(scale[:20], 1)
    np.testing.assert_allclose(scale[-17:], 8)
    assert (np.diff(scale) >= -1e-12).all()


def test_the_three_yarns_are_three_formulas():
    code, paper, revised = (
        rope_frequencies(1e4, 128, Yarn(factor=8, original_context_length=4096, form=form)).inv_freq
        for form in ("code", "paper", "revised")
    )
    assert np.abs(code / paper - 1).max() > 0.1
    assert np.abs(code / revised - 1).max() > 0.1


def test_llama3_has_three_bands():
    rule = Llama3(factor=8, original_context_length=8192)
    theta = 5e5 ** (-np.arange(64) / 64)
    turns = 8192 * theta / (2 * np.pi)
    scale = theta / rope_frequencies(5e5, 128, rule).inv_freq
    np.testing.assert_allclose(scale[turns > 4], 1)
    np.testing.assert_allclose(scale[turns < 1], 8)
    middle = scale[(turns > 1) & (turns < 4)]
    assert len(middle) > 3 and (middle > 1).all() and (middle < 8).all()


def test_ntk_divides_the_lowest_frequency_by_the_factor():
    rope = rope_frequencies(1e4, 128, Ntk(factor=8))
    assert rope.inv_freq[0] == 1.0
    assert THETA[-1] / rope.inv_freq[-1] == pytest.approx(8)


def test_longrope_switches_sets_beyond_the_original_length():
    rule = longrope(kept_positions=16)
    short = rope_frequencies(1e4, 128, rule, current_length=4096)
    long = rope_frequencies(1e4, 128, rule, current_length=4097)
    np.testing.assert_allclose(THETA / short.inv_freq, rule.short_factor)
    np.testing.assert_allclose(THETA / long.inv_freq, rule.long_factor)
    assert long.kept_positions == 16
    np.testing.assert_allclose(long.kept_inv_freq, THETA)


def test_a_changed_base_is_that_base():
    changed = rope_frequencies(1e4, 128, ChangedBase(base=5e5)).inv_freq
    np.testing.assert_array_equal(changed, rope_frequencies(5e5, 128).inv_freq)


def test_part_of_a_head_can_be_rotated():
    rope = rope_frequencies(1e4, 128, Ntk(factor=4), rotary_fraction=0.5)
    np.testing.assert_array_equal(rope.inv_freq, rope_frequencies(1e4, 64, Ntk(factor=4)).inv_freq)
    assert rope.rotary_dim == 64 and len(rope.all_inv_freq) == 64
    assert (rope.all_inv_freq[32:] == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Linear(factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: Linear(factor=float("inf")), "must be at least 1"),
        (lambda: ChangedBase(base=1.0), "must be a number above 1"),
        (lambda: Yarn(factor=2, original_context_length=1), "must be 2 tokens or more"),
        (
            lambda: Yarn(factor=2, original_context_length=4096, beta_fast=1, beta_slow=32),
            "0 < beta_slow < beta_fast",
        ),
        (lambda: Yarn(factor=2, original_context_length=4096, mscale=1.0), "both or neither"),
        (
            lambda: Yarn(factor=2, original_context_length=4096, attention_factor=0.0),
            "leave it out",
        ),
        (
            lambda: Llama3(factor=2, original_context_length=8192, low_freq_factor=4),
            "0 < low < high",
        ),
        (lambda: longrope(kept_positions=-1), "write 0 to keep none"),
        (lambda: longrope(short_factor=(1.0, -1.0)), "positive numbers only"),
        (lambda: rope_frequencies(1e4, 128, longrope(32)), "has 32 values but a head has 64"),
        (lambda: rope_frequencies(1.0, 128), "rope.base=1 must be a number above 1"),
        (lambda: rope_frequencies(1e4, 127), "must be even"),
        (lambda: rotary_dimensions(128, 1.5), "at most 1"),
        (lambda: rotary_dimensions(66, 0.5), "write 0.5151"),
        (lambda: rope_frequencies(1e4, 2, Ntk(factor=2)), "rotate 4 or more"),
    ],
)
def test_refuses_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as refusal:
        call()
    assert "\n" not in str(refusal.value)


# --- Hugging Face's keys ---

EXPORTABLE = [
    NoScaling(),
    Linear(factor=2.5),
    DynamicNtk(factor=2.0, original_context_length=4096),
    Yarn(factor=8.0, original_context_length=4096),
    Yarn(factor=8.0, original_context_length=4096, attention_factor=1.5, truncate=False),
    Yarn(factor=8.0, original_context_length=4096, mscale=1.0, mscale_all_dim=0.7, beta_fast=16.0),
    Llama3(factor=8.0, original_context_length=8192),
    longrope(),
    longrope(attention_factor=1.2),
]


@pytest.mark.parametrize("rule", EXPORTABLE, ids=lambda rule: rule.type)
@pytest.mark.parametrize("keys", ["both", "new", "old"])
def test_either_kind_of_keys_reads_back_as_the_same_rule(rule, keys):
    exported = rope_to_hf(520000.5, 128, rule, context_length=32768)
    if keys == "new":
        del exported["rope_theta"], exported["rope_scaling"]
    if keys == "old":
        del exported["rope_parameters"]
        if exported["rope_scaling"]:  # a config of 2023 has no base in there, and says `type`
            del exported["rope_scaling"]["rope_theta"], exported["rope_scaling"]["rope_type"]
    back = rope_from_hf(exported)
    assert back.base == 520000.5
    assert back.scaling == rule
    assert back.rotary_fraction == 1.0


@pytest.mark.parametrize(
    ("rule", "base"), [(Ntk(factor=4.0), 40889.94), (ChangedBase(base=5e5), 5e5)]
)
def test_rules_that_are_a_base_are_exported_as_one(rule, base):
    exported = rope_to_hf(1e4, 128, rule, context_length=16384)
    assert exported["rope_theta"] == pytest.approx(base, abs=0.01)
    assert exported["rope_scaling"] is None
    back = rope_from_hf(exported)
    np.testing.assert_allclose(
        rope_frequencies(back.base, 128, back.scaling).inv_freq,
        rope_frequencies(1e4, 128, rule).inv_freq,
        rtol=1e-14,
    )


@pytest.mark.parametrize("form", ["paper", "revised"])
def test_nameless_yarns_are_exported_as_longrope_factors(form):
    rule = Yarn(factor=8, original_context_length=4096, form=form)
    back = rope_from_hf(rope_to_hf(1e4, 128, rule, context_length=32768))
    assert isinstance(back.scaling, LongRope)
    ours = rope_frequencies(1e4, 128, rule)
    for length in (1, 32768):
        theirs = rope_frequencies(back.base, 128, back.scaling, current_length=length)
        np.testing.assert_allclose(theirs.inv_freq, ours.inv_freq, rtol=1e-14)
        assert theirs.attention_factor == ours.attention_factor


def test_what_transformers_cannot_say_is_refused():
    with pytest.raises(ValueError, match="kept_positions=4 cannot be exported"):
        rope_to_hf(1e4, 128, longrope(kept_positions=4), context_length=32768)
    with pytest.raises(ValueError, match=r"rotary_fraction=0\.5 cannot be exported"):
        rope_to_hf(1e4, 128, rotary_fraction=0.5, context_length=4096)
    keys = rope_to_hf(1e4, 128, rotary_fraction=0.5, context_length=4096, partial_rotary=True)
    assert rope_from_hf(keys).rotary_fraction == 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_position_embeddings": 4096}, "0 values of rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "2 values of rope_theta"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "mrope"}}, "'mrope' is not known here"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "original context length is missing",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "write it flat"),
    ],
)
def test_unclear_configurations_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        rope_from_hf(config)


def test_phi_3_style_keys_are_read():
    config = {
        "rope_theta": 1e4,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    }
    rule = rope_from_hf(config).scaling
    assert isinstance(rule, LongRope)
    assert rule.factor == 32
    assert rule.temperature() == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
