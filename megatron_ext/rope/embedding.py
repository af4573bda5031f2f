"""The rotary module that Megatron-Core's GPTModel calls, for any base and any rule.

    rotary = RotaryEmbedding(base=1e6, head_dim=128, scaling=None)
    angles = rotary(4096)                                      # float32 [4096, 1, 1, 128]
    query = apply_rotary(query, angles, rotary.attention_factor)        # query [s, b, heads, 128]

It stands where GPTModel has its own `rotary_pos_emb` and answers the same calls, with what that
one lacks: angles worked out in float64 (position times frequency in float32 is off by 4e-3 radians
at 32k and by 0.06 at 1M), positions of each sequence, every rule, no CUDA call, a meta device.
What it hands out are angles modulo 2 pi, in float32, so cos and sin of them are right to 2e-7 at
any distance; both Megatron's application and Transformer Engine's fused kernel take them as they
are. `attention.py` applies them in float32 whatever the activations' dtype is.

Nothing floating point is a buffer: `model.bfloat16()` rounds every such buffer, frequencies too.
Refuses odd rotary dimensions and sequences that context parallelism cannot split.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_ext.rope.bound import Floats
from megatron_ext.rope.frequencies import (
    NoScaling,
    RopeFrequencies,
    RopeScaling,
    rope_frequencies,
)

_TABLES_KEPT = 4  # contiguous tables held: a training length, an evaluation length, and two more


class RotaryEmbedding(torch.nn.Module):
    """Angles of RoPE for GPTModel; see the module's text.

    base: any float above 1. head_dim: kv_channels. scaling: a rule of `frequencies.py`, None for
    none. rotary_fraction: part of a head's dimensions that is rotated. interleaved: pairs are
    (0, 1), (2, 3), ..; otherwise, as in transformers, (0, d/2), (1, d/2 + 1), .. cp_group: the
    context-parallel group whose slice this rank works on; None is no context parallelism.
    """

    def __init__(
        self,
        base: float,
        head_dim: int,
        scaling: RopeScaling | None = None,
        rotary_fraction: float = 1.0,
        interleaved: bool = False,
        cp_group: Any = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.head_dim = head_dim
        self.scaling: RopeScaling = NoScaling() if scaling is None else scaling
        self.rotary_fraction = rotary_fraction
        self.interleaved = interleaved
        self.cp_group = cp_group
        self.attention_factor = self.frequencies(1).attention_factor
        # Empty and of whole numbers: it only remembers where .to(), .cuda() and meta put us.
        self._where: Tensor
        self.register_buffer("_where", torch.empty(0, dtype=torch.uint8), persistent=False)
        self._tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._copies: dict[tuple[bytes, torch.device], Tensor] = {}
        self._positions: Tensor | None = None

    def frequencies(self, current_length: int) -> RopeFrequencies:
        """The rule at a current length, in tokens; float64 on the host."""
        return rope_frequencies(
            self.base, self.head_dim, self.scaling, self.rotary_fraction, current_length
        )

    @contextmanager
    def at(self, position_ids: Tensor | None) -> Iterator[RotaryEmbedding]:
        """Within this context the module answers for these positions instead of 0, 1, 2, ..

        position_ids: whole numbers [batch, seq], those of this context-parallel rank; None changes
        nothing. Positions live no longer than the context, so interleaved pipeline micro-batches
        cannot see each other's, and recomputation sees the angles that were saved.
        """
        before, self._positions = self._positions, position_ids
        try:
            yield self
        finally:
            self._positions = before

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> Tensor:
        """Angles modulo 2 pi, float32 [seq, batch or 1, 1, rotary_dim], as GPTModel asks for them.

        Contiguous positions offset .. offset + max_seq_len - 1, cut to this context-parallel rank's
        two chunks unless packed_seq; or those of `at`, which are this rank's already.
        """
        group = self.cp_group if cp_group is None else cp_group
        ranks = 1 if group is None else group.size()
        if self._positions is not None:
            length = self._current_length(self._positions, group if ranks > 1 else None)
            return self._angles(self._positions.t(), self.frequencies(length))
        rank = group.rank() if ranks > 1 and not packed_seq else None
        key = (max_seq_len, offset, rank, ranks, self._where.device)
        if key not in self._tables:
            # An evaluation in inference mode must not leave tables that training cannot save.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(offset, offset + max_seq_len, device=self._where.device)
                if rank is not None:
                    positions = context_parallel_slice(positions, rank, ranks)
                rope = self.frequencies(offset + max_seq_len)
                self._tables[key] = self._angles(positions[:, None], rope)
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def get_cos_sin(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin with the attention factor, float32 [seq, rotary_dim/2] each: what Megatron's
        flash decoding asks for."""
        angles = _one_of_each_pair(self.forward(max_seq_len, offset), self.interleaved)[:, 0, 0]
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: Any,
        packed_seq_params: Any = None,
    ) -> int:
        """Tokens of a whole sequence, before tensor and context parallelism split it."""
        if packed_seq_params is not None:
            return max(packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv)
        if inference_context is not None:
            length = inference_context.max_sequence_length
        else:
            received = None if transformer is None else transformer.input_tensor  # a later stage's
            hidden = transformer_input if received is None else received
            assert hidden is not None, "neither a pipeline input nor an embedding to measure"
            length = hidden.size(0)
            if transformer_config.sequence_parallel:
                length *= transformer_config.tensor_model_parallel_size
        return length * transformer_config.context_parallel_size

    def extra_repr(self) -> str:
        return f"base={self.base:g}, head_dim={self.head_dim}, scaling={self.scaling}"

    def _current_length(self, positions: Tensor, group: Any) -> int:
        if not self.scaling.follows_length:
            return 1  # read by nothing; asking for the greatest position would wait for the GPU
        if positions.is_meta:
            return positions.shape[-1]
        greatest = positions.max()
        if group is not None:
            torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, group=group)
        return int(greatest) + 1

    @torch.no_grad()
    def _angles(self, positions: Tensor, rope: RopeFrequencies) -> Tensor:
        """positions [seq, batch or 1] -> float32 [seq, batch or 1, 1, rotary_dim]."""
        m = positions.to(torch.float64)[:, :, None, None]
        angles = m * self._on(m.device, rope.inv_freq)
        if rope.kept_inv_freq is not None:
            kept = m * self._on(m.device, rope.kept_inv_freq)
            angles = torch.where(m < rope.kept_positions, kept, angles)
        turn = 2 * torch.pi
        angles = (angles - turn * torch.round(angles / turn)).to(torch.float32)
        if self.interleaved:
            return angles.repeat_interleave(2, dim=-1)
        return torch.cat((angles, angles), dim=-1)

    def _on(self, device: torch.device, frequencies: Floats) -> Tensor:
        """float64 there, and kept: to copy them waits for all that a GPU has to do."""
        key = (frequencies.tobytes(), device)
        if key not in self._copies:
            if len(self._copies) == _TABLES_KEPT:
                self._copies.clear()
            with torch.inference_mode(False):
                self._copies[key] = torch.tensor(frequencies, dtype=torch.float64, device=device)
        return self._copies[key]


def apply_rotary(
    t: Tensor, angles: Tensor, attention_factor: float = 1.0, interleaved: bool = False
) -> Tensor:
    """Rotate the first rotary_dim dimensions of every head, in float32 or wider; dtype is kept.

    t: [seq, batch, heads, head_dim]. angles: RotaryEmbedding's, [seq, batch or 1, 1, rotary_dim].
    The attention factor multiplies the rotated dimensions, as in transformers and YaRN's own code.
    """
    rotary_dim = angles.shape[-1]
    half = _one_of_each_pair(angles, interleaved)
    wide = torch.promote_types(t.dtype, torch.float32)
    cos, sin = half.cos().to(wide) * attention_factor, half.sin().to(wide) * attention_factor
    rotated, rest = t[..., :rotary_dim].to(wide), t[..., rotary_dim:]
    if interleaved:
        x, y = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
    else:
        x, y = rotated.chunk(2, dim=-1)
        turned = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
    return torch.cat((turned.to(t.dtype), rest), dim=-1) if rest.shape[-1] else turned.to(t.dtype)


def context_parallel_slice(sequence: Tensor, rank: int, ranks: int) -> Tensor:
    """The part of dimension 0 that a context-parallel rank holds: of 2 x ranks chunks, its own and
    the mirrored one, so that a causal mask gives every rank the same work (Megatron's order)."""
    if sequence.shape[0] % (2 * ranks):
        raise ValueError(
            f"a sequence of {sequence.shape[0]} tokens does not split into 2 x {ranks} chunks for "
            f"context parallelism: write a multiple of {2 * ranks}"
        )
    chunks = sequence.chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def _one_of_each_pair(angles: Tensor, interleaved: bool) -> Tensor:
    """Both dimensions of a pair carry the same angle: [.., rotary_dim] -> [.., rotary_dim/2]."""
    return angles[..., ::2] if interleaved else angles[..., : angles.shape[-1] // 2]
