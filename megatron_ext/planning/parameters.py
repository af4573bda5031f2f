"""How many parameters a Llama of a given shape has.

    count = count_parameters(config.model)
    count.total, count.without_embeddings

Exact, not a rule of thumb: tests compare it with models that were built.
"""

from dataclasses import dataclass

from megatron_ext.config import Model


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights."""

    total: int
    """All of them; a tied embedding counts once."""
    without_embeddings: int
    """Without the input embedding and the output projection (Kaplan et al. 2020's N)."""


def count_parameters(model: Model) -> ParameterCount:
    """Sum over the weights.

    A layer: Q and output h x (heads d) each, K and V h x (kv_heads d) each, SwiGLU 3 h f, two norms
    h each; with qkv_bias (heads + 2 kv_heads) d more. Around the layers: the last norm h, embedding
    and output vocab x h each.
    """
    h, f = model.hidden_size, model.ffn_hidden_size
    attention = 2 * h * model.head_dim * (model.num_heads + model.num_kv_heads)
    biases = model.qkv_bias * model.head_dim * (model.num_heads + 2 * model.num_kv_heads)
    layers = model.num_layers * (attention + biases + 3 * h * f + 2 * h)
    embeddings = (1 if model.tied_embeddings else 2) * model.vocab_size * h
    return ParameterCount(layers + h + embeddings, layers + h)
