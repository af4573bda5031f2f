"""Config to a Llama: Megatron-Core's GPTModel from a TransformerConfig and a layer spec.

    model = build_model(config)             # this rank's part, in a list of its chunks: one, or
                                            # with parallel.virtual_pipeline so many
    losses = model[0](tokens, position_ids, attention_mask=None, labels=labels)

Needs the process groups of `megatron_ext.world`.
"""

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
from megatron_ext.model.cross_entropy import OwnLossModel
from megatron_ext.model.initialization import initialize_weights
from megatron_ext.model.kernels import choose, look, loss_chunk
from megatron_ext.model.layers import begin_tensor_overlap, block_spec
from megatron_ext.model.weight_gradient import take_the_place_of_apex
from megatron_ext.rope.attention import RotaryGPTModel, RotarySelfAttention, install_rotary
from megatron_ext.rope.embedding import RotaryEmbedding


def build_model(config: Config) -> list[DistributedDataParallel]:
    """This rank's stage and shard with its initial weights, inside Megatron-Core's gradient
    reduction (DistributedDataParallel)."""
    transformer = transformer_config(config)
    # Not in transformer_config: weights without gradient buffers have no sum to add to.
    accumulation = choose(config, look()).grad_accumulation.name
    transformer.gradient_accumulation_fusion = accumulation != "none"
    if accumulation == "torch":
        take_the_place_of_apex()
    if config.parallel.tensor_overlap:
        begin_tensor_overlap(config, transformer.params_dtype)
    chunks = build_chunks(config, transformer)
    for chunk in chunks:
        initialize_weights(chunk, config)
    return reduced(config, transformer, chunks)


def build_chunks(config: Config, transformer: TransformerConfig) -> list[GPTModel]:
    """The bare model chunks of this rank's pipeline stage."""
    count = config.parallel.virtual_pipeline
    if count == 1:
        return [build_gpt(config, transformer)]
    return [build_gpt(config, transformer, vp_stage) for vp_stage in range(count)]


def reduced(
    config: Config, transformer: TransformerConfig, chunks: list[GPTModel]
) -> list[DistributedDataParallel]:
    """The chunks inside Megatron-Core's gradient buffers and their reduction."""
    parallel = config.parallel
    overlap = parallel.overlap_grad_reduce
    if overlap is None:
        overlap = torch.cuda.is_available()
    gather = parallel.overlap_param_gather
    if gather is None:
        gather = overlap and parallel.distributed_optimizer
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce == "fp32",
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=gather,
        bucket_size=parallel.bucket_size,
        # Non-finite gradients are found by their norm, without another pass over them.
        check_for_nan_in_grad=False,
    )
    model = [
        # Later chunks are done with while others still compute: nothing to win by small buckets.
        DistributedDataParallel(transformer, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    if overlap:
        # Only with the last micro-batch are gradients whole.
        holds = [part.no_sync for part in model]
        transformer.no_sync_func = holds if len(holds) > 1 else holds[0]  # type: ignore[assignment]
    return model


def build_gpt(
    config: Config, transformer: TransformerConfig, vp_stage: int | None = None
) -> GPTModel:
    """The bare model of this rank, or one of its virtual chunks, weights not yet drawn.

    Input tokens [batch, sequence / context] int64 and position_ids likewise, or None for 0, 1, 2,
    ..; output losses of that shape in float32 when labels are given, else this rank's logits
    [batch, sequence / context, vocab_size / tensor].
    """
    kernels = choose(config, look())
    compiled = kernels.fusions.name == "compiled"
    chunk = loss_chunk(config, compiled)
    model_class = OwnLossModel if chunk or compiled else RotaryGPTModel
    model = model_class(
        transformer,
        block_spec(kernels, transformer, RotarySelfAttention, vp_stage),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.training.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    rotary = RotaryEmbedding(
        base=config.rope.base,
        head_dim=config.model.head_dim,
        scaling=config.rope.scaling,
        rotary_fraction=config.rope.rotary_fraction,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    install_rotary(model, rotary, fused=compiled)
    if isinstance(model, OwnLossModel):
        model.loss_chunk, model.compiled = chunk, compiled
    return model.to(device=torch.cuda.current_device(), dtype=transformer.params_dtype)


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-Core's own description of model, layout and precision."""
    model, parallel = config.model, config.parallel
    gpu = torch.cuda.is_available()
    kernels = choose(config, look())
    # Fusions that compile on first use need a compiler, which a CPU machine may lack.
    compiled = kernels.fusions.name == "compiled"
    precision = config.precision
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision.dtype]
    overlap_p2p_comm = parallel.overlap_p2p_comm
    if overlap_p2p_comm is None:
        overlap_p2p_comm = parallel.virtual_pipeline > 1
    last_stage_layers = parallel.last_stage_layers
    if parallel.pipeline == 2 and parallel.first_stage_layers is not None:
        # It follows; said as well, Megatron-Core 0.16.1 divides by the number of stages between
        # them, which is 0 (transformer_layer.py:137).
        last_stage_layers = None

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
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline
        if parallel.virtual_pipeline > 1
        else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=last_stage_layers,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        fp16=precision.dtype == "fp16",
        **({} if precision.fp8 == "none" else {"fp8": "hybrid", "fp8_recipe": precision.fp8}),
        bias_activation_fusion=compiled,
        bias_dropout_fusion=compiled,
        tp_comm_overlap=parallel.tensor_overlap,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        recompute_granularity=None
        if config.training.recompute == "none"
        else config.training.recompute,
        # Not the attention core, Megatron-Core's own choice: fused, it keeps nothing large.
        recompute_modules=["mlp"],
        recompute_method="uniform" if config.training.recompute == "full" else None,
        recompute_num_layers=1 if config.training.recompute == "full" else None,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # Overlapped, Megatron-Core 0.16.1 would do so before they are sent (schedules.py:1600).
        deallocate_pipeline_outputs=not overlap_p2p_comm,
        overlap_p2p_comm=overlap_p2p_comm,
        # One fused call for both directions is NCCL's way against deadlock.
        batch_p2p_comm=gpu and not overlap_p2p_comm,
    )
