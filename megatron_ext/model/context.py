"""One sequence over the context-parallel ranks: the part that each holds, and attention over all.

    mine = my_part(tokens, dim=1)                    # [batch, seq] -> [batch, seq / ranks]
    output = attend(query, key, value, group, scale)

Each rank holds two chunks of 2 x ranks, its own and the mirrored one (rope/embedding.py), so that
the causal mask gives all the same work. Queries stay; keys and values of all ranks are gathered in
every layer, and their gradients reduced and scattered (Llama team 2024, section 3.3.2).
Megatron-Core 0.16.1 leaves this to Transformer Engine, which needs a GPU.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right

from megatron_ext.rope.embedding import context_parallel_slice


def my_part(whole: Tensor, dim: int) -> Tensor:
    """This rank's chunks of a whole sequence along `dim`; the tensor itself without context
    parallelism. Raises ValueError for a length that 2 x ranks does not divide."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return whole
    rank = parallel_state.get_context_parallel_rank()
    return context_parallel_slice(whole.movedim(dim, 0), rank, ranks).movedim(0, dim).contiguous()


def gather_sequence(mine: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' parts [seq / ranks, ..] as one sequence [seq, ..] in its order."""
    gathered = gather_from_sequence_parallel_region(mine.contiguous(), group=group)
    return in_order(gathered, group.size())


def in_order(gathered: Tensor, ranks: int) -> Tensor:
    """The sequence [seq, ..] of what the ranks sent, one after the other: each its own chunk and
    the mirrored one. By no index: to copy one to a GPU waits for all that the GPU has to do."""
    chunks = gathered.chunk(2 * ranks)
    return torch.cat((*chunks[::2], *chunks[::-2]))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None,
    group: ProcessGroup,
    scale: float | None,
) -> Tensor:
    """Attention of this rank's queries to the keys of the whole sequence.

    query [seq / ranks, batch, heads, head_dim], key and value with kv_heads; hidden: None for
    causal, else bool [batch, 1, seq / ranks, seq], true where a key is not seen. Output
    [batch, heads, seq / ranks, head_dim].
    """
    grouped = query.shape[2] != key.shape[2]
    # Keys and values travel together: one collective a layer.
    both = gather_sequence(torch.cat((key, value), dim=-1), group).permute(1, 2, 0, 3)
    query = query.permute(1, 2, 0, 3)
    key, value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
    if hidden is not None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=~hidden, scale=scale, enable_gqa=grouped
        )
    ranks, rank = group.size(), group.rank()
    outputs = []
    for chunk, part in zip((rank, 2 * ranks - 1 - rank), query.chunk(2, dim=2), strict=True):
        length = part.shape[2]
        seen = (chunk + 1) * length  # no later key is looked at, or computed with
        outputs.append(
            F.scaled_dot_product_attention(
                part,
                key[:, :, :seen],
                value[:, :, :seen],
                attn_mask=causal_lower_right(length, seen),
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2)
