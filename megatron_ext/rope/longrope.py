"""LongRoPE: a searched factor for every frequency, and the first positions left as they are.

    rule = LongRope(short_factor=short, long_factor=long, original_context_length=4096, factor=32.0)
    rule.frequencies(base=1e4, head_dim=128, dim=128, length=131072).inv_freq   # the long factors

Symbols as in `rules.py`. Refuses, by ValueError, factors that are not positive or do not fit the
head; in `to_hf`, kept positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from megatron_ext.rope.rules import (
    STRICT,
    Parameters,
    RopeFrequencies,
    check_attention_factor,
    check_factor,
    check_length,
    needed,
    stretch,
    theta_of,
)


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753, Eq. 3): theta_i / lambda_i with searched lambda_i, and the first
    n_hat positions kept unscaled. `short_factor` up to L, `long_factor` beyond (for all positions).
    """

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = True

    type: Literal["longrope"] = "longrope"
    """The rule's name."""
    short_factor: tuple[float, ...]
    """lambda_i up to L tokens: one positive number for each rotated pair of a head."""
    long_factor: tuple[float, ...]
    """lambda_i beyond L tokens: one positive number for each rotated pair of a head."""
    original_context_length: int
    """L, tokens the model was trained on before the extension."""
    factor: float
    """s, target length over original length, at least 1: gives the attention factor."""
    kept_positions: int = 0
    """n_hat: this many first positions are rotated unscaled. transformers cannot express it."""
    attention_factor: float | None = None
    """What cos and sin are multiplied by. None: sqrt(1 + ln s / ln L)."""

    def __post_init__(self) -> None:
        # A list from JSON or YAML is frozen here, so that the rule can be compared and hashed.
        object.__setattr__(self, "short_factor", tuple(self.short_factor))
        object.__setattr__(self, "long_factor", tuple(self.long_factor))
        check_factor(self.factor)
        check_length(self.original_context_length)
        check_attention_factor(self.attention_factor)
        if self.kept_positions < 0:
            raise ValueError(
                f"kept_positions={self.kept_positions} must not be negative: write 0 to keep none"
            )
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not values or not all(math.isfinite(v) and v > 0 for v in values):
                raise ValueError(
                    f"{name} must hold positive numbers only: write one for each rotated pair"
                )

    def temperature(self) -> float:
        """The attention factor: sqrt(1 + ln s / ln L) (section 3.3)."""
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context_length))

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        name = "long_factor" if length > self.original_context_length else "short_factor"
        lambdas = np.array(getattr(self, name), dtype=np.float64)
        if len(lambdas) != dim // 2:
            raise ValueError(
                f"{name} has {len(lambdas)} values but a head has {dim // 2} rotated pairs: "
                f"write {dim // 2}"
            )
        theta = theta_of(base, dim)
        kept = theta if self.kept_positions else None
        return RopeFrequencies(
            theta / lambdas, self.temperature(), head_dim, self.kept_positions, kept
        )

    def to_hf(self, base: float, dim: int) -> Parameters:
        if self.kept_positions:
            raise ValueError(
                f"kept_positions={self.kept_positions} cannot be exported: transformers has no "
                "word for LongRoPE's first n_hat positions, so write 0"
            )
        return hf_lambdas(
            base,
            self.short_factor,
            self.long_factor,
            self.original_context_length,
            self.factor,
            self.attention_factor,
        )

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> LongRope:
        factor, length = stretch(parameters, original, target)
        return cls(
            short_factor=tuple(needed(parameters, "short_factor")),
            long_factor=tuple(needed(parameters, "long_factor")),
            original_context_length=length,
            factor=factor,
            attention_factor=parameters.get("attention_factor"),
        )


def hf_lambdas(
    base: float,
    short: Iterable[float],
    long: Iterable[float],
    original: int,
    factor: float,
    attention_factor: float | None,
) -> Parameters:
    parameters: Parameters = {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": [float(value) for value in short],
        "long_factor": [float(value) for value in long],
        "original_max_position_embeddings": original,
        "factor": factor,
    }
    if attention_factor is not None:
        parameters["attention_factor"] = float(attention_factor)
    return parameters
