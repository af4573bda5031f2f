"""Our application inside Megatron-Core's real GPTModel, against Megatron's own application."""

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron_ext.rope.frequencies import NoScaling, Yarn  # noqa: E402

SEQUENCE = 32


@pytest.fixture(scope="module")
def process_groups():
    """One process, gloo, Megatron's groups; all closed again."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext import cpu

    cpu.prepare()
    torch.distributed.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build(rotary, ours: bool, **changes):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_ext.rope.attention import RotaryGPTModel, RotarySelfAttention, install_rotary

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if ours:
        spec.submodules.self_attention.module = RotarySelfAttention
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        add_bias_linear=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        rotary_interleaved=rotary.interleaved,
        **changes,
    )
    torch.manual_seed(0)
    model = RotaryGPTModel(
        config,
        transformer_layer_spec=spec,
        vocab_size=128,
        max_sequence_length=SEQUENCE,
        position_embedding_type="none",
    )
    install_rotary(model, rotary)
    return model


def losses(model, position_ids):
    tokens = torch.arange(2 * SEQUENCE).view(2, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    return model(tokens, position_ids, mask, labels=tokens)


def rows() -> "torch.Tensor":
    """A contiguous row, and one with a jump and an offset."""
    m = torch.arange(SEQUENCE)
    return torch.stack((m, torch.where(m < 10, m + 7, m + 900)))


def rotary_of(rule, interleaved=False):
    from megatron_ext.rope.embedding import RotaryEmbedding

    return RotaryEmbedding(1e4, 16, rule, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rule", [NoScaling(), Yarn(factor=8.0, original_context_length=16)])
def test_ours_is_megatrons_rotation_in_float32(process_groups, rule, interleaved):
    rotary = rotary_of(rule, interleaved)
    ours, theirs = build(rotary, True), build(rotary, False)
    theirs.load_state_dict(ours.state_dict())
    for position_ids in (None, rows()):
        torch.testing.assert_close(losses(ours, position_ids), losses(theirs, position_ids))


def test_the_attention_factor_reaches_the_logits(process_groups):
    plain = Yarn(factor=8.0, original_context_length=16, attention_factor=1.0)
    warm = Yarn(factor=8.0, original_context_length=16, attention_factor=1.5)
    first, second = build(rotary_of(plain), True), build(rotary_of(warm), True)
    second.load_state_dict(first.state_dict())
    assert not torch.allclose(losses(first, None), losses(second, None), atol=1e-5)


def test_megatron_does_not_rotate_a_second_time(process_groups, monkeypatch):
    from megatron.core.transformer import attention

    def forbidden(*args, **kwargs):
        raise AssertionError("Megatron rotated q or k as well")

    model = build(rotary_of(NoScaling()), True)
    expected = losses(model, rows())
    monkeypatch.setattr(attention, "apply_rotary_pos_emb", forbidden)
    torch.testing.assert_close(losses(model, rows()), expected)


def test_positions_of_a_row_are_its_own(process_groups):
    model = build(rotary_of(NoScaling()), True)
    contiguous, mixed = losses(model, None), losses(model, rows())
    torch.testing.assert_close(mixed[0], contiguous[0])
    # Before the jump the second row is only shifted, which RoPE does not see.
    torch.testing.assert_close(mixed[1, :10], contiguous[1, :10], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1, 10:], contiguous[1, 10:], atol=1e-5)
    torch.testing.assert_close(losses(model, None), contiguous)


def test_full_recomputation_gives_the_same_gradients(process_groups):
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    rotary = rotary_of(NoScaling())
    plain, checkpointed = build(rotary, True), build(rotary, True, **recompute)
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        model.train()
        losses(model, rows()).mean().backward()
    for (name, a), (_, b) in zip(
        plain.named_parameters(), checkpointed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_bf16_activations_lose_less_than_in_megatrons_application(process_groups):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    rotary = rotary_of(NoScaling())
    model = build(rotary, True)
    attention = model.decoder.layers[0].self_attention
    q = torch.randn(512, 1, 4, 16, dtype=torch.bfloat16)
    angles = rotary(512)
    with torch.no_grad():
        exact = attention._rotate(q.double(), angles)
        ours = (attention._rotate(q, angles).double() - exact).abs().mean()
        theirs = (apply_rotary_pos_emb(q, angles, model.config).double() - exact).abs().mean()
    assert ours < 0.7 * theirs


@contextmanager
def multi_latent(model):
    model.config.multi_latent_attention = True
    yield
    model.config.multi_latent_attention = False


def test_models_that_cannot_take_it_are_refused(process_groups):
    from megatron_ext.rope.attention import install_rotary

    model = build(rotary_of(NoScaling()), True)
    with pytest.raises(ValueError, match="write the same in both"):
        install_rotary(model, rotary_of(NoScaling(), interleaved=True))
    with multi_latent(model), pytest.raises(ValueError, match="turn it off"):
        install_rotary(model, rotary_of(NoScaling()))
