"""Cross-entropy whose float32 logits of a whole micro-batch never exist.

    losses = cross_entropy(logits, labels)                  # logits in the model's dtype, kept
    losses = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=1024)

Logits are reduced to two numbers a token (log-sum-exp and the label's logit), and the backward pass
turns them into their gradients in place. In chunks of tokens they are dropped between the two and
made again, which costs one more product with the output weight, 2 tokens hidden_size vocab_size /
tensor FLOPs. Compiled, each of the two steps reads the logits and writes no tensor as large beside
them. `OwnLossModel` is GPTModel with these losses; benchmarks/cross_entropy.py says what they save.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_ext.model.weight_gradient import add_weight_gradient
from megatron_ext.rope.attention import RotaryGPTModel


class OwnLossModel(RotaryGPTModel):
    """RotaryGPTModel that, given labels, makes the logits of `loss_chunk` tokens at a time, or with
    None all of them, in the model's dtype."""

    loss_chunk: int | None = None
    compiled = False

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        labels = kwargs.get("labels")
        if labels is None or self.loss_chunk is None or not self.post_process:
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
            self.config.gradient_accumulation_fusion,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        return cross_entropy(logits, labels, self.pg_collection.tp, self.compiled)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    compiled: bool = False,
) -> Tensor:
    """Losses [batch, sequence] float32 of the labels [batch, sequence] int64.

    logits [sequence, batch, vocab_size / tensor] in the model's dtype, rank r of `group` holding
    the r-th part of the vocabulary; the backward pass overwrites them. compiled: each pass over
    them in one kernel.
    """
    sequence, batch, vocab_size = logits.shape
    losses = _CrossEntropy.apply(
        logits.reshape(-1, vocab_size), labels.t().reshape(-1), _several(group), compiled
    )
    return losses.view(sequence, batch).t().contiguous()


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_tokens: int = 1024,
    compiled: bool = False,
    accumulate: bool = False,
) -> Tensor:
    """Losses [batch, sequence] float32 of the labels [batch, sequence] int64.

    hidden [sequence, batch, hidden_size] in the model's dtype, with sequence_parallel this rank's
    [sequence / tensor, ...]; weight [vocab_size / tensor, hidden_size], rank r of `group` holding
    the r-th part. Gradients of hidden and weight are summed in float32 over the chunks. compiled:
    each pass over a chunk's logits in one kernel. accumulate: the weight's gradient is summed right
    into its `main_grad`, where that is float32, as Megatron-Core's gradient_accumulation_fusion.
    """
    group = _several(group)
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
        accumulate,
    )
    return losses.view(sequence, batch).t().contiguous()


class _CrossEntropy(torch.autograd.Function):
    """Losses [tokens] of logits [tokens, vocab_size / tensor]; see cross_entropy."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None, compiled: bool
    ) -> Tensor:
        labels = _of_this_rank(labels, logits.shape[1], group)
        log_sum, label_logit = _form(_reduce, compiled)(logits, labels)
        log_sum, label_logit = _over_ranks(log_sum, label_logit, group)
        ctx.save_for_backward(logits, labels, log_sum)
        ctx.compiled = compiled
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, labels, log_sum = ctx.saved_tensors
        _form(_differentiate, ctx.compiled)(logits, labels, log_sum, loss_gradient)
        return logits, None, None, None


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
        accumulate: bool,
    ) -> Tensor:
        labels = _of_this_rank(labels, len(weight), group)
        reduce = _form(_reduce, compiled)
        chunks = [
            reduce(h @ weight.t(), y)
            for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        ]
        log_sum, label_logit = (torch.cat(part) for part in zip(*chunks, strict=True))
        log_sum, label_logit = _over_ranks(log_sum, label_logit, group)
        ctx.save_for_backward(hidden, weight, labels, log_sum)
        ctx.chunk_tokens, ctx.compiled = chunk_tokens, compiled
        ctx.main_grad = getattr(weight, "main_grad", None) if accumulate else None
        return log_sum - label_logit

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_sum = ctx.saved_tensors
        differentiate = _form(_differentiate, ctx.compiled)
        hidden_gradient = torch.empty_like(hidden)
        total = ctx.main_grad
        if total is None or total.dtype != torch.float32:
            total = torch.zeros_like(weight, dtype=torch.float32)
        rows = [x.split(ctx.chunk_tokens) for x in (hidden, labels, log_sum, loss_gradient)]
        start = 0
        for h, y, s, g in zip(*rows, strict=True):
            logits = h @ weight.t()
            differentiate(logits, y, s, g)
            torch.mm(logits, weight, out=hidden_gradient[start : start + len(h)])
            add_weight_gradient(h, logits, total)
            start += len(h)
        weight_gradient = _added(weight) if total is ctx.main_grad else total.to(weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None, None, None


def _added(weight: Tensor) -> Tensor:
    """A gradient for autograd, whose hooks wait for one, when main_grad has got the true one: of
    any content, but zeros where another layer adds its own (tied embeddings)."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def _several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return None if group is None or dist.get_world_size(group) == 1 else group


def _of_this_rank(labels: Tensor, part: int, group: dist.ProcessGroup | None) -> Tensor:
    """Ids within this rank's part of the vocabulary, from 0; others are below 0 or beyond it."""
    return labels if group is None else labels - dist.get_rank(group) * part


def _over_ranks(
    log_sum: Tensor, label_logit: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Both over the whole vocabulary."""
    if group is None:
        return log_sum, label_logit
    highest = log_sum.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    sums = torch.stack([(log_sum - highest).exp(), label_logit])
    dist.all_reduce(sums, group=group)
    return highest + sums[0].log(), sums[1]


def _reduce(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over this rank's part of the vocabulary and the label's logit, 0 where another
    rank has the label; both [tokens] float32."""
    mine = (labels >= 0) & (labels < logits.shape[1])
    label_logit = logits.gather(1, torch.where(mine, labels, 0).unsqueeze(1)).squeeze(1)
    return logits.float().logsumexp(1), torch.where(mine, label_logit.float(), 0.0)


def _differentiate(logits: Tensor, labels: Tensor, log_sum: Tensor, loss_gradient: Tensor) -> None:
    """Overwrites logits [tokens, vocab_size / tensor] with (softmax - one-hot) times each token's
    gradient, computed in float32."""
    gradient = logits.float().sub_(log_sum.unsqueeze(1)).exp_()
    if torch.compiler.is_compiling():
        # A scatter would be a kernel of its own, and what comes before it written to memory.
        tokens = torch.arange(logits.shape[1], device=logits.device)
        gradient = gradient - (tokens == labels.unsqueeze(1)).float()
    else:
        mine = ((labels >= 0) & (labels < logits.shape[1])).unsqueeze(1)
        gradient.scatter_add_(1, torch.where(mine, labels.unsqueeze(1), 0), -mine.float())
    logits.copy_(gradient.mul_(loss_gradient.unsqueeze(1)))


def _form(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
