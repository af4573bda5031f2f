"""The model against transformers' Llama with the same weights."""

import pytest
import torch

from tests.model.conftest import settings

transformers = pytest.importorskip("transformers")


def as_transformers(weights: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Megatron's names and packings to Hugging Face's, written out by hand."""
    model = config.model
    group = model.num_heads // model.num_kv_heads
    out = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
    }
    if not model.tied_embeddings:
        out["lm_head.weight"] = weights["output_layer.weight"]
    for i in range(model.num_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        qkv = weights[f"{ours}.self_attention.linear_qkv.weight"]
        qkv = qkv.view(model.num_kv_heads, group + 2, model.head_dim, model.hidden_size)
        q, k, v = qkv.split([group, 1, 1], dim=1)
        gate, up = weights[f"{ours}.mlp.linear_fc1.weight"].chunk(2)
        out |= {
            f"{theirs}.self_attn.q_proj.weight": q.reshape(-1, model.hidden_size),
            f"{theirs}.self_attn.k_proj.weight": k.reshape(-1, model.hidden_size),
            f"{theirs}.self_attn.v_proj.weight": v.reshape(-1, model.hidden_size),
            f"{theirs}.self_attn.o_proj.weight": weights[
                f"{ours}.self_attention.linear_proj.weight"
            ],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": weights[f"{ours}.mlp.linear_fc2.weight"],
            f"{theirs}.input_layernorm.weight": weights[f"{ours}.input_layernorm.weight"],
            f"{theirs}.post_attention_layernorm.weight": weights[
                f"{ours}.pre_mlp_layernorm.weight"
            ],
        }
    return out


def oracle(config, weights: dict[str, torch.Tensor]):
    """transformers' Llama of the same shape, holding our weights."""
    model = config.model
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=model.num_layers,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            rms_norm_eps=model.norm_eps,
            rope_theta=config.rope.base,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.base},
            tie_word_embeddings=model.tied_embeddings,
            max_position_embeddings=config.training.sequence_length,
        )
    )
    missing, unexpected = theirs.load_state_dict(as_transformers(weights, config), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize(
    "variant",
    [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1}, {"tied_embeddings": True}, {"head_dim": 32}],
    ids=lambda variant: str(variant) or "plain",
)
def test_logits_and_gradients_equal_those_of_transformers(variant: dict, device, here) -> None:
    from megatron_ext.config import Config
    from megatron_ext.model.initialization import initialize_weights
    from megatron_ext.model.llama import build_gpt, transformer_config

    config = Config.model_validate(settings(init_std=0.1, **variant))
    model = build_gpt(config, transformer_config(config))
    initialize_weights(model, config)
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    # Norms away from one, so that a forgotten one shows.
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
            weights[name] = weight.detach().clone()
    theirs = oracle(config, weights).to(device)

    tokens = torch.randint(0, config.model.vocab_size, (2, 49)).to(device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        ours = model(inputs, None, None)
    torch.testing.assert_close(ours, theirs(inputs).logits, rtol=1e-4, atol=1e-4)

    loss = model(inputs, None, None, labels=labels).mean()
    loss.backward()
    logits = theirs(inputs).logits
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    gradients = as_transformers({n: w.grad for n, w in model.named_parameters()}, config)
    for name, weight in theirs.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-5)


def test_initial_weights_have_the_asked_spread(here) -> None:
    from megatron_ext.config import Config
    from megatron_ext.model.initialization import initialize_weights
    from megatron_ext.model.llama import build_gpt, transformer_config

    config = Config.model_validate(settings(hidden_size=256, vocab_size=3000, num_layers=2))
    model = build_gpt(config, transformer_config(config))
    initialize_weights(model, config)
    spread = {name: weight.std().item() for name, weight in model.named_parameters()}
    residual = 0.02 / (2 * 2) ** 0.5
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all()
        else:
            wanted = residual if name.endswith(("proj.weight", "fc2.weight")) else 0.02
            assert spread[name] == pytest.approx(wanted, rel=0.03), name
    # Layers, and gate and up within one parameter, are different draws.
    first, second = (model.decoder.layers[i].mlp.linear_fc1.weight for i in (0, 1))
    assert not torch.equal(first, second)
    gate, up = first.chunk(2)
    assert not torch.equal(gate, up)


def test_overlapped_messages_are_not_sent_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core refuses both at once in the first step; batches are for NCCL alone."""
    from megatron_ext.config import Config
    from megatron_ext.model.llama import transformer_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for chunks in (1, 2):
        given = settings(num_layers=4)
        given["parallel"] = {"world_size": 4, "pipeline": 2, "virtual_pipeline": chunks}
        made = transformer_config(Config.model_validate(given))
        assert (made.overlap_p2p_comm, made.batch_p2p_comm) == (chunks > 1, chunks == 1)
        assert made.deallocate_pipeline_outputs == (chunks == 1)
