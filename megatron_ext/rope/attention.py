"""How Megatron-Core's attention applies our angles: in float32, at the positions of each sequence.

    model = RotaryGPTModel(config, transformer_layer_spec=spec, position_embedding_type="none", ..)
    install_rotary(model, RotaryEmbedding(base=1e6, head_dim=128))
    model(tokens, position_ids, attention_mask)          # position_ids None: 0, 1, 2, ..

and `RotarySelfAttention` in the place of SelfAttention in the layer spec. Megatron's own attention
rounds cos and sin to bf16 before it multiplies, which is not small beside a bound that sits at
zero; it still gives the right rotation with a RotaryEmbedding, so a spec without our class is
coarser, not wrong. Refuses models that rotate by other means (multi-latent attention).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ext.rope.embedding import RotaryEmbedding, apply_rotary


class RotarySelfAttention(SelfAttention):
    """SelfAttention that rotates q and k in float32; everything else is Megatron's."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # The one overridable step between "q, k and v are there" and "rotate them": we rotate and
        # pass None on, which makes Megatron skip its own rotation. Caches and packed sequences
        # (a table of another length, offsets in cu_seqlens) stay with Megatron.
        if inference_context is None and rotary_pos_emb is not None:
            q_angles, k_angles = rotary_pos_emb
            if len(q_angles) == len(query) and len(k_angles) == len(key):
                query, key = self._rotate(query, q_angles), self._rotate(key, k_angles)
                rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )

    def _rotate(self, t: Tensor, angles: Tensor) -> Tensor:
        factor = _yarn_get_concentration_factor_from_config(self.config)
        interleaved = self.config.rotary_interleaved
        if t.is_cuda and self.config.rotary_fused:
            if factor == 1.0 and angles.shape[1] == 1 and rope_utils.fused_apply_rotary_pos_emb:
                # Transformer Engine's kernel works in float32 inside.
                return rope_utils.fused_apply_rotary_pos_emb(t, angles, interleaved=interleaved)
            return _compiled_apply_rotary()(t, angles, factor, interleaved)
        return apply_rotary(t, angles, factor, interleaved)


class RotaryGPTModel(GPTModel):
    """GPTModel whose position_ids reach the rotary module: [batch, seq], or None for 0, 1, 2, ..

    With pipeline parallelism every stage has to be given them, as every stage rotates.
    """

    def _preprocess(self, input_ids: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(self, "rotary_pos_emb", None), RotaryEmbedding):
            return super()._preprocess(input_ids, position_ids, *args, **kwargs)
        with self.rotary_pos_emb.at(position_ids):
            return super()._preprocess(input_ids, position_ids, *args, **kwargs)


def install_rotary(model: GPTModel, rotary: RotaryEmbedding, fused: bool = True) -> None:
    """Make `rotary` the model's rotary module, and its attention factor the layers'.

    fused: on a GPU, rotate by one kernel: Transformer Engine's where it is installed and can (the
    same positions in every row, attention factor 1), else one that torch.compile makes.
    Build the model with position_embedding_type "none": with "rope" GPTModel first builds its own
    module, which asks for a CUDA device unless use_cpu_initialization is set.
    """
    config = model.config
    if config.multi_latent_attention:
        raise ValueError(
            "multi_latent_attention rotates inside its own attention: turn it off to use this RoPE"
        )
    if config.rotary_interleaved != rotary.interleaved:
        raise ValueError(
            f"rotary_interleaved={config.rotary_interleaved} but the rotary module was built with "
            f"interleaved={rotary.interleaved}: write the same in both"
        )
    model.position_embedding_type = "rope"
    model.rotary_pos_emb = rotary
    config.rotary_fused = fused
    # Megatron reads the factor of cos and sin from these three, as
    # (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1): with s = e that is 1 + 0.1 mscale.
    config.yarn_rotary_scaling_factor = torch.e
    config.yarn_mscale = 10 * (rotary.attention_factor - 1)
    config.yarn_mscale_all_dim = 0.0


@functools.cache
def _compiled_apply_rotary() -> Callable[..., Tensor]:
    """One kernel instead of eight passes over q, for what Transformer Engine's cannot do."""
    return torch.compile(apply_rotary)
