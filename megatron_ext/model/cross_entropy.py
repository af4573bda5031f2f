"""Output projection and cross-entropy in one, in chunks of tokens: the float32 logits of a whole
micro-batch never exist.

    losses = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=1024)

Each chunk's logits are made, reduced to two numbers a token (log-sum-exp and the label's logit) and
dropped; the backward pass makes them again. That costs one more product with the output weight,
2 tokens hidden_size vocab_size / tensor FLOPs. `ChunkedLossModel` is GPTModel with this loss;
benchmarks/cross_entropy.py says what it saves.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_ext.rope.attention import RotaryGPTModel


class ChunkedLossModel(RotaryGPTModel):
    """RotaryGPTModel that, given labels, makes the logits of `loss_chunk` tokens at a time."""

    loss_chunk = 1024
    compiled = False

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        labels = kwargs.get("labels")
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, **kwargs)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # What waits for the weight to arrive (parallel.overlap_param_gather) hangs on the layer's
        # call, which this takes the place of.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, (hidden_states,))
        return chunked_cross_entropy(
            hidden_states,
            weight,
            labels,
            self.pg_collection.tp,
            self.config.sequence_parallel,
            self.loss_chunk,
            self.compiled,
        )


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int = 1024,
    compiled: bool = False,
) -> Tensor:
    """Losses [batch, sequence] float32 of the labels [batch, sequence] int64.

    hidden [sequence, batch, hidden_size] in the model's dtype, with sequence_parallel this rank's
    [sequence / tensor, ...]; weight [vocab_size / tensor, hidden_size], rank r of `group` holding
    the r-th part. Gradients of hidden and weight are summed in float32 over the chunks. compiled:
    what follows the products in one kernel instead of six passes over the logits.
    """
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    if group is not None and sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=group
        )
    elif group is not None:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
    sequence, batch, hidden_size = hidden.shape
    losses = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden_size),
        weight,
        labels.t().reshape(-1),
        group,
        chunk_tokens,
        compiled,
    )
    return losses.view(sequence, batch).t().contiguous()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses [tokens] of hidden [tokens, hidden_size]; see chunked_cross_entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
        compiled: bool,
    ) -> Tensor:
        if group is not None:  # ids within this rank's part of the vocabulary
            labels = labels - dist.get_rank(group) * len(weight)
        reduce = _compiled(_reduce) if compiled else _reduce
        chunks = [
            reduce(h, weight, y)
            for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        ]
        log_sum, label_logit = (torch.cat(part) for part in zip(*chunks, strict=True))
        if group is not None:
            highest = log_sum.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
            sums = torch.stack([(log_sum - highest).exp(), label_logit])
            dist.all_reduce(sums, group=group)
            log_sum, label_logit = highest + sums[0].log(), sums[1]
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.chunk_tokens, ctx.compiled = chunk_tokens, compiled
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_sum = ctx.saved_tensors
        differentiate = _compiled(_differentiate) if ctx.compiled else _differentiate
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        rows = [x.split(ctx.chunk_tokens) for x in (hidden, labels, log_sum, loss_gradient)]
        start = 0
        for h, y, s, g in zip(*rows, strict=True):
            logit_gradient = differentiate(h, weight, y, s, g)
            torch.mm(logit_gradient, weight, out=hidden_gradient[start : start + len(h)])
            weight_gradient += logit_gradient.t() @ h
            start += len(h)
        return hidden_gradient, weight_gradient.to(weight.dtype), None, None, None, None


def _reduce(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over this rank's part of the vocabulary and the label's logit, 0 where another
    rank has the label; both [tokens] float32."""
    logits = (hidden @ weight.t()).float()
    mine = (labels >= 0) & (labels < len(weight))
    label_logit = logits.gather(1, torch.where(mine, labels, 0).unsqueeze(1)).squeeze(1)
    return logits.logsumexp(1), torch.where(mine, label_logit, 0.0)


def _differentiate(
    hidden: Tensor, weight: Tensor, labels: Tensor, log_sum: Tensor, loss_gradient: Tensor
) -> Tensor:
    """(softmax - one-hot) times each token's gradient, [tokens, vocab_size / tensor] in the model's
    dtype."""
    gradient = (hidden @ weight.t()).float().sub_(log_sum.unsqueeze(1)).exp_()
    mine = (labels >= 0) & (labels < len(weight))
    gradient.scatter_add_(1, torch.where(mine, labels, 0).unsqueeze(1), -mine.float().unsqueeze(1))
    return gradient.mul_(loss_gradient.unsqueeze(1)).to(hidden.dtype)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
