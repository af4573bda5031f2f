"""The parameter formula against transformers' Llama and Megatron-Core's GPTModel, both built."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import Config, Model
from megatron_ext.planning.parameters import count_parameters

SHAPES = st.builds(
    lambda layers, heads, group, head_dim, hidden, ffn, vocab, tied: Model(
        num_layers=layers, num_heads=heads * group, num_kv_heads=heads, head_dim=2 * head_dim,
        hidden_size=hidden * heads * group, ffn_hidden_size=ffn, vocab_size=vocab + 3,
        tied_embeddings=tied,
    ),
    *(st.integers(1, most) for most in (4, 4, 3, 20, 9, 200, 300)),
    st.booleans(),
)  # fmt: skip


@given(SHAPES)
@settings(max_examples=25, deadline=None)
def test_transformers_llama_has_as_many(model: Model) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=model.num_layers, hidden_size=model.hidden_size,
                intermediate_size=model.ffn_hidden_size, num_attention_heads=model.num_heads,
                num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
                vocab_size=model.vocab_size, tie_word_embeddings=model.tied_embeddings,
            )
        )  # fmt: skip
    if model.tied_embeddings:
        llama.tie_weights()
    count = count_parameters(model)
    assert count.total == sum(p.numel() for p in llama.parameters())
    assert count.without_embeddings == sum(
        p.numel()
        for name, p in llama.named_parameters()
        if name not in ("model.embed_tokens.weight", "lm_head.weight")
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2},
        {"tied_embeddings": True, "qkv_bias": True},
        {"head_dim": 32, "num_layers": 1},
    ],
)
def test_our_model_has_as_many(changes: dict) -> None:
    from megatron_ext.model.llama import build_model
    from tests.model.conftest import settings as shape
    from tests.model.conftest import single_process

    config = Config.model_validate(shape(**changes))
    with single_process(config):
        [model] = build_model(config)
        built = sum(p.numel() for p in model.parameters())
    assert count_parameters(config.model).total == built
