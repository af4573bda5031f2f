"""The rotary module against transformers' Llama and against 40-digit angles.

transformers multiplies position and frequency in float32, which costs digits as the angle grows.
So its functions are run twice: in float64, where ours has to agree to 1e-6 at any distance, and as
shipped, where the difference must be no more than what float32 loses there.
"""

import math
from types import SimpleNamespace

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
    rope_to_hf,
)

torch = pytest.importorskip("torch")
from megatron_ext.rope.embedding import (  # noqa: E402 -- after torch is known to be there
    RotaryEmbedding,
    apply_rotary,
    context_parallel_slice,
)
from tests.copies import CopiesOfPython  # noqa: E402
from tests.rope.in_float64 import in_float64  # noqa: E402

HEAD_DIM = 64
RULES = [
    NoScaling(),
    ChangedBase(base=5e5),
    Linear(factor=2.5),
    Ntk(factor=4),
    DynamicNtk(factor=2.0, original_context_length=256),
    Yarn(factor=8.0, original_context_length=256),
    Yarn(factor=8.0, original_context_length=256, form="paper"),
    Yarn(factor=8.0, original_context_length=256, form="revised"),
    Llama3(factor=8.0, original_context_length=256),
    LongRope(
        short_factor=tuple(np.linspace(1, 1.5, 32)),
        long_factor=tuple(np.geomspace(1, 8, 32)),
        original_context_length=256,
        factor=8.0,
    ),
]
LONGROPE = LongRope(**{**vars(RULES[-1]), "kept_positions": 5})
IDS = ["none", "abf", "linear", "ntk", "dynamic", "yarn", "paper", "revised", "llama3", "longrope"]
SAME_AT_EVERY_LENGTH = [rule for rule in RULES if not rule.follows_length]


def positions_of(kind: str) -> "torch.Tensor":
    """[batch 2, seq 512]: contiguous; a PoSE jump; documents packed into one row; any order and
    distance up to a million."""
    m = torch.arange(512)
    rows = {
        "contiguous": (m, m),
        "jumps": (m, torch.where(m < 200, m, m + 1500)),
        "documents": (m % 100, m % 333),
        "anywhere": (m * 7919 % 1_000_003, m * m * 3 % 131_071),
    }[kind]
    return torch.stack(rows)


def hf_rotation(rule, position_ids, q, k):
    """transformers' Llama: cos, sin and the rotated q, k; q, k [batch, heads, seq, dim]."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    keys = rope_to_hf(1e4, HEAD_DIM, rule, context_length=2048)
    config = transformers.LlamaConfig(
        hidden_size=2 * HEAD_DIM, num_attention_heads=2, head_dim=HEAD_DIM, **keys
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, position_ids)
    return cos, sin, *apply_rotary_pos_emb(q, k, cos, sin)


def our_rotation(rule, kind, q, k):
    """The same four of ours, in the same layout, all float32."""
    rotary = RotaryEmbedding(1e4, HEAD_DIM, rule)
    with rotary.at(None if kind == "contiguous" else positions_of(kind)):
        angles = rotary(512)
    assert angles.dtype == torch.float32
    assert angles.shape == (512, 1 if kind == "contiguous" else 2, 1, HEAD_DIM)
    factor = rotary.attention_factor
    cos, sin = (
        (turn(angles) * factor).squeeze(2).transpose(0, 1) for turn in (torch.cos, torch.sin)
    )
    q, k = (apply_rotary(t.permute(2, 0, 1, 3), angles, factor).permute(1, 2, 0, 3) for t in (q, k))
    return cos, sin, q, k


@pytest.mark.parametrize("kind", ["contiguous", "jumps", "documents", "anywhere"])
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_rotation_is_that_of_transformers_llama_in_float64(rule, kind):
    pytest.importorskip("transformers")
    from transformers import modeling_rope_utils
    from transformers.models.llama import modeling_llama

    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.rand(2, 2, 2, 512, HEAD_DIM, generator=generator) - 1).unbind()
    with in_float64(modeling_rope_utils, modeling_llama):
        exact = hf_rotation(rule, positions_of(kind), q.double(), k.double())
    for ours, theirs in zip(our_rotation(rule, kind, q, k), exact, strict=True):
        assert theirs.dtype == torch.float64
        assert float((ours - theirs).abs().max()) <= 1e-6


@pytest.mark.parametrize("kind", ["contiguous", "jumps", "documents"])
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_rotation_is_that_of_transformers_llama_as_shipped(rule, kind):
    torch.manual_seed(0)
    position_ids = positions_of(kind)
    q, k = torch.randn(2, 2, 2, 512, HEAD_DIM).unbind()
    cos, sin, hf_q, hf_k = hf_rotation(rule, position_ids, q, k)
    ours_cos, ours_sin, ours_q, ours_k = our_rotation(rule, kind, q, k)
    # transformers multiplies position and frequency in float32: each carries an error of half an
    # ulp or so, which grows with the angle. Where angles are small nothing but 1e-6 is allowed.
    length = int(position_ids.max()) + 1
    inv_freq = rope_frequencies(1e4, HEAD_DIM, rule, current_length=length).inv_freq
    angle = position_ids[..., None] * torch.tensor(np.concatenate((inv_freq, inv_freq)))
    allowed = 1e-6 + 6e-7 * angle
    assert ((ours_cos - cos).abs() <= allowed).all()
    assert ((ours_sin - sin).abs() <= allowed).all()
    size = 2 * max(q.abs().max(), k.abs().max())
    assert ((ours_q - hf_q).abs() <= size * allowed[:, None]).all()
    assert ((ours_k - hf_k).abs() <= size * allowed[:, None]).all()


@pytest.mark.parametrize("rule", SAME_AT_EVERY_LENGTH[:4], ids=IDS[:4])
def test_angles_are_right_at_any_distance(rule):
    far = [0, 1, 4095, 32767, 131071, 1048575]
    rotary = RotaryEmbedding(1e6, 128, rule)
    with rotary.at(torch.tensor([far])):
        angles = rotary(len(far))[:, 0, 0, :64]
    with mp.workdps(40):
        base, scale = mpf(10) ** 6, mpf(1)
        if isinstance(rule, ChangedBase):
            base = mpf(rule.base)
        elif isinstance(rule, Ntk):
            base = base * mpf(rule.factor) ** (mpf(128) / 126)
        elif isinstance(rule, Linear):
            scale = mpf(rule.factor)
        for row, m in enumerate(far):
            for i in (0, 1, 17, 40, 63):
                exact = m * base ** (mpf(-2 * i) / 128) / scale
                assert math.cos(angles[row, i]) == pytest.approx(float(mp.cos(exact)), abs=2e-7)
                assert math.sin(angles[row, i]) == pytest.approx(float(mp.sin(exact)), abs=2e-7)


@given(
    m=st.integers(0, 4000),
    n=st.integers(0, 4000),
    shift=st.integers(1, 1_000_000),
    rule=st.sampled_from(SAME_AT_EVERY_LENGTH),
    interleaved=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_logits_depend_on_position_differences_only(m, n, shift, rule, interleaved):
    generator = torch.Generator().manual_seed(m * 4001 + n)
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, generator=generator)
    rotary = RotaryEmbedding(1e4, HEAD_DIM, rule, interleaved=interleaved)

    def logit(q_position, k_position):
        def turn(t, position):
            with rotary.at(torch.tensor([[position]])):
                return apply_rotary(t, rotary(1), rotary.attention_factor, interleaved)

        return float((turn(q, q_position) * turn(k, k_position)).sum())

    assert logit(m, n) == pytest.approx(logit(m + shift, n + shift), abs=2e-4)


def test_longrope_leaves_the_first_positions_unscaled():
    rule = RULES[-1]
    kept = LongRope(**{**vars(rule), "kept_positions": 5})
    plain, scaled, ours = (RotaryEmbedding(1e4, HEAD_DIM, r)(512) for r in (None, rule, kept))
    torch.testing.assert_close(ours[:5], plain[:5], rtol=0, atol=0)
    torch.testing.assert_close(ours[5:], scaled[5:], rtol=0, atol=0)


def test_interleaved_is_half_split_with_the_dimensions_in_another_order():
    t = torch.randn(16, 2, 3, HEAD_DIM)
    order = torch.arange(HEAD_DIM).view(2, -1).t().reshape(-1)  # 0, d/2, 1, d/2 + 1, ..
    split = RotaryEmbedding(1e4, HEAD_DIM)
    paired = RotaryEmbedding(1e4, HEAD_DIM, interleaved=True)
    expected = apply_rotary(t, split(16))[..., order]
    torch.testing.assert_close(apply_rotary(t[..., order], paired(16), 1.0, True), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_megatrons_own_application_gives_the_same(interleaved):
    rope_utils = pytest.importorskip("megatron.core.models.common.embeddings.rope_utils")
    t = torch.randn(32, 2, 3, HEAD_DIM)
    rotary = RotaryEmbedding(1e4, HEAD_DIM, rotary_fraction=0.5, interleaved=interleaved)
    with rotary.at(torch.randint(0, 5000, (2, 32))):
        angles = rotary(32)
    theirs = rope_utils._apply_rotary_pos_emb_bshd(t, angles, interleaved, mscale=1.25)
    torch.testing.assert_close(apply_rotary(t, angles, 1.25, interleaved), theirs)
    assert torch.equal(theirs[..., 32:], t[..., 32:])


def test_the_compiled_application_gives_the_same():
    t = torch.randn(8, 1, 2, HEAD_DIM)
    angles = RotaryEmbedding(1e4, HEAD_DIM)(8)
    compiled = torch.compile(apply_rotary, backend="aot_eager")
    torch.testing.assert_close(compiled(t, angles, 1.1, False), apply_rotary(t, angles, 1.1))


def test_low_precision_activations_are_rotated_in_float32():
    t = torch.randn(64, 1, 2, HEAD_DIM, dtype=torch.bfloat16)
    rotary = RotaryEmbedding(1e4, HEAD_DIM).bfloat16()  # rounds every float buffer: there is none
    angles = rotary(64)
    assert angles.dtype == torch.float32
    ours, exact = apply_rotary(t, angles), apply_rotary(t.double(), angles)
    assert ours.dtype == torch.bfloat16
    # One rounding, at the end: half an ulp of bf16, and a hair for float32's own.
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_gradients_are_the_inverse_rotation():
    t = torch.randn(16, 2, 3, HEAD_DIM, requires_grad=True)
    angles = RotaryEmbedding(1e4, HEAD_DIM)(16)
    upstream = torch.randn_like(t)
    apply_rotary(t, angles).backward(upstream)
    torch.testing.assert_close(t.grad, apply_rotary(upstream, -angles))


class Group:
    def __init__(self, rank, ranks):
        self._rank, self._ranks = rank, ranks

    def rank(self):
        return self._rank

    def size(self):
        return self._ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_context_parallel_ranks_hold_their_two_chunks(ranks):
    whole = RotaryEmbedding(1e4, HEAD_DIM)(64)
    chunks = whole.chunk(2 * ranks)
    for rank in range(ranks):
        rotary = RotaryEmbedding(1e4, HEAD_DIM, cp_group=Group(rank, ranks))
        mine = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))
        assert torch.equal(rotary(64), mine if ranks > 1 else whole)
        assert torch.equal(rotary(64, packed_seq=True), whole)
    if ranks > 1:
        with pytest.raises(ValueError, match="write a multiple of"):
            context_parallel_slice(torch.arange(10), 0, 4)


def test_the_dynamic_rule_follows_the_current_length_both_ways():
    rule = DynamicNtk(factor=2.0, original_context_length=256)
    rotary, plain = RotaryEmbedding(1e4, HEAD_DIM, rule), RotaryEmbedding(1e4, HEAD_DIM)
    assert torch.equal(rotary(256), plain(256))
    longer = RotaryEmbedding(rule.base(1e4, HEAD_DIM, 512), HEAD_DIM)
    assert torch.equal(rotary(512), longer(512))
    assert torch.equal(rotary(256), plain(256))
    with rotary.at(torch.tensor([[0, 1, 511]])):
        assert torch.equal(rotary(3)[:, 0], longer(512)[[0, 1, 511], 0])


def test_positions_are_forgotten_after_the_context_even_on_an_error():
    rotary = RotaryEmbedding(1e4, HEAD_DIM)
    contiguous = rotary(8)

    def fail_within():
        with rotary.at(torch.full((1, 8), 5)):
            assert not torch.equal(rotary(8)[:, 0], contiguous[:, 0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_within()
    assert torch.equal(rotary(8), contiguous)


def test_an_evaluation_in_inference_mode_leaves_usable_tables():
    rotary = RotaryEmbedding(1e4, HEAD_DIM)
    with torch.inference_mode():
        rotary(16)
    t = torch.randn(16, 1, 1, HEAD_DIM, requires_grad=True)
    apply_rotary(t, rotary(16)).sum().backward()


@pytest.mark.parametrize("rule", [NoScaling(), LONGROPE], ids=["none", "longrope"])
def test_positions_of_their_own_copy_nothing_to_the_device_again(rule):
    rotary = RotaryEmbedding(1e4, HEAD_DIM, rule)
    first, second = torch.arange(16).view(2, 8), torch.arange(3, 19).view(2, 8)
    with rotary.at(first), torch.inference_mode(), CopiesOfPython() as copies:
        rotary(8)
    assert copies.made
    with rotary.at(second), CopiesOfPython() as copies:
        angles = rotary(8)
    assert not copies.made
    with RotaryEmbedding(1e4, HEAD_DIM, rule).at(second) as fresh:
        assert torch.equal(angles, fresh(8))


def test_it_works_on_the_meta_device_and_moves_with_the_model():
    for rule in RULES:
        with torch.device("meta"):
            rotary = RotaryEmbedding(1e4, HEAD_DIM, rule)
            with rotary.at(torch.zeros(2, 8, dtype=torch.long)):
                angles = rotary(8)
            assert angles.is_meta and angles.shape == (8, 2, 1, HEAD_DIM)
            assert apply_rotary(torch.empty(8, 2, 1, HEAD_DIM), angles).is_meta
        assert rotary(8).is_meta
    rotary = torch.nn.ModuleDict({"rotary": RotaryEmbedding(1e4, HEAD_DIM)}).to("meta")["rotary"]
    assert rotary(8).is_meta
    assert not rotary.state_dict()


def test_the_whole_length_is_found_behind_every_kind_of_parallelism():
    rotary = RotaryEmbedding(1e4, HEAD_DIM)
    hidden = torch.empty(32, 1, 4)
    layout = SimpleNamespace(
        sequence_parallel=True, tensor_model_parallel_size=4, context_parallel_size=2
    )
    later_stage = SimpleNamespace(input_tensor=hidden)
    first_stage = SimpleNamespace(input_tensor=None)
    assert rotary.get_rotary_seq_len(None, first_stage, hidden, layout) == 256
    assert rotary.get_rotary_seq_len(None, later_stage, None, layout) == 256
    packed = SimpleNamespace(max_seqlen_q=100, max_seqlen_kv=120)
    assert rotary.get_rotary_seq_len(None, None, None, layout, packed) == 120


def test_tables_of_old_lengths_are_dropped():
    rotary = RotaryEmbedding(1e4, HEAD_DIM)
    for length in range(1, 20):
        rotary(length)
    assert len(rotary._tables) == 4
    cos, sin = rotary.get_cos_sin(19)
    assert cos.shape == sin.shape == (19, HEAD_DIM // 2)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
