"""Config to a Llama: Megatron-Core's GPTModel from a TransformerConfig and a layer spec.

    model = build_model(config)             # this rank's part, in a list of one chunk
    losses = model[0](tokens, position_ids, attention_mask=None, labels=labels)

Needs the process groups of `megatron_ext.world`.
"""

import logging

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config import Config
from megatron_ext.model.initialization import initialize_weights
from megatron_ext.model.layers import block_spec, choose_backend
from megatron_ext.rope.attention import RotaryGPTModel, RotarySelfAttention, install_rotary
from megatron_ext.rope.embedding import RotaryEmbedding

log = logging.getLogger(__name__)


def build_model(config: Config) -> list[DistributedDataParallel]:
    """This rank's stage and shard with its initial weights, inside Megatron-Core's gradient
    reduction (DistributedDataParallel)."""
    transformer = transformer_config(config)
    model = build_gpt(config, transformer)
    initialize_weights(model, config)
    return [reduce_gradients(config, transformer, model)]


def reduce_gradients(
    config: Config, transformer: TransformerConfig, model: GPTModel
) -> DistributedDataParallel:
    """The model inside Megatron-Core's gradient buffers and their reduction."""
    return DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.precision.grad_reduce == "fp32",
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            # Non-finite gradients are found by their norm, without another pass over them.
            check_for_nan_in_grad=False,
        ),
        model,
    )


def build_gpt(config: Config, transformer: TransformerConfig) -> GPTModel:
    """The bare model of this rank, weights not yet drawn.

    Input tokens [batch, sequence] int64 and position_ids likewise, or None for 0, 1, 2, ..; output
    losses [batch, sequence] float32 when labels are given, else this rank's logits
    [batch, sequence, vocab_size / tensor].
    """
    backend = choose_backend(config.kernels.backend, config.data.mask_documents)
    log.info("kernels: %s", backend.reason)
    model = RotaryGPTModel(
        transformer,
        block_spec(backend, transformer, RotarySelfAttention),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.training.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        position_embedding_type="none",
    )
    rotary = RotaryEmbedding(
        base=config.rope.base,
        head_dim=config.model.head_dim,
        scaling=config.rope.scaling,
        rotary_fraction=config.rope.rotary_fraction,
    )
    install_rotary(model, rotary)
    return model.to(device=torch.cuda.current_device(), dtype=transformer.params_dtype)


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-Core's own description of model, layout and precision."""
    model, parallel = config.model, config.parallel
    gpu = torch.cuda.is_available()
    bf16 = config.precision.dtype == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32

    def leave(weight: torch.Tensor) -> None:
        """Weights are drawn by initialization.py; Megatron-Core only marks how they are split."""

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave,
        output_layer_init_method=leave,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        # Fusions that compile on first use need a compiler, which a CPU machine may lack.
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        recompute_granularity=None
        if config.training.recompute == "none"
        else config.training.recompute,
        recompute_method="uniform" if config.training.recompute == "full" else None,
        recompute_num_layers=1 if config.training.recompute == "full" else None,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        deallocate_pipeline_outputs=True,
        # One fused call for both directions is NCCL's way against deadlock.
        batch_p2p_comm=gpu,
    )
