"""YaRN: high frequencies kept, low ones divided by the factor, a ramp between; in its three forms.

    rule = Yarn(factor=8.0, original_context_length=4096)           # what transformers calls YaRN
    rule.frequencies(base=1e4, head_dim=128, dim=128, length=1).attention_factor     # 1.2079
    Yarn(factor=8.0, original_context_length=4096, form="paper")    # what its paper says

Symbols as in `rules.py`. Refuses, by ValueError, a ramp without width and half a setting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from megatron_ext.rope.longrope import hf_lambdas
from megatron_ext.rope.rules import (
    STRICT,
    Parameters,
    RopeFrequencies,
    check_attention_factor,
    check_factor,
    check_length,
    stretch,
    theta_of,
)


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071): high frequencies kept, low ones divided by s, a ramp between.

    Three formulas go by this name; the authors' own code differs from their paper:
    `code`     (authors' code, transformers) ramp linear in the dimension index, from floor of the
               dimension that turns `beta_fast` times within L to the ceiling of `beta_slow`'s;
               theta_i (ramp/s + 1 - ramp).
    `paper`    (section 3.2) gamma linear in the turns r_i = L theta_i / 2 pi, from beta_slow to
               beta_fast; theta_i ((1 - gamma)/s + gamma).
    `revised`  (PoSE's code, LongRoPE's seed) the ramp of `code`, but the factors are blended:
               theta_i / (ramp s + 1 - ramp).
    """

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["yarn"] = "yarn"
    """The rule's name."""
    factor: float
    """s, target length over original length, at least 1."""
    original_context_length: int
    """L, tokens the model was trained on: it places the ramp. Never guessed from the new length."""
    form: Literal["code", "paper", "revised"] = "code"
    """Which of the three formulas. Only `code` has a name in transformers."""
    beta_fast: float = 32.0
    """Turns within L from which a frequency is kept. The paper's beta."""
    beta_slow: float = 1.0
    """Turns within L up to which a frequency is divided by s. The paper's alpha."""
    truncate: bool = True
    """Round the ramp's ends outwards to whole dimensions, as the authors do. Unused by `paper`."""
    attention_factor: float | None = None
    """What cos and sin are multiplied by. None: 0.1 ln s + 1, or what mscale says."""
    mscale: float | None = None
    """With `mscale_all_dim`: factor (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)."""
    mscale_all_dim: float | None = None
    """See `mscale`; both or neither."""

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_length(self.original_context_length)
        check_attention_factor(self.attention_factor)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow:g} and beta_fast={self.beta_fast:g} do not satisfy "
                "0 < beta_slow < beta_fast: write for example beta_slow: 1, beta_fast: 32"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"mscale={self.mscale} without mscale_all_dim={self.mscale_all_dim} is half a "
                "setting: write both or neither"
            )

    def temperature(self) -> float:
        """The attention factor: sqrt(1/t) = 0.1 ln s + 1 in the paper (section 3.4)."""
        if self.attention_factor is not None:
            return self.attention_factor
        log = math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
        return 0.1 * log + 1

    def ramp_ends(self, base: float, dim: int) -> tuple[float, float]:
        """(low, high) dimension indices of `code`'s ramp; (20, 46) at b=1e4, d=128, L=4096."""

        def dimension(turns: float) -> float:  # i with L theta_i = 2 pi turns
            length = self.original_context_length
            return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + (0.001 if high == low else 0.0)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        theta = theta_of(base, dim)
        if self.form == "paper":
            turns = self.original_context_length * theta / (2 * math.pi)
            gamma = np.clip((turns - self.beta_slow) / (self.beta_fast - self.beta_slow), 0, 1)
            inv_freq = theta * ((1 - gamma) / self.factor + gamma)
        else:
            low, high = self.ramp_ends(base, dim)
            ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
            if self.form == "code":
                inv_freq = theta * (ramp / self.factor + (1 - ramp))
            else:
                inv_freq = theta / (ramp * self.factor + (1 - ramp))
        return RopeFrequencies(inv_freq, self.temperature(), head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        if self.form != "code":
            theta = theta_of(base, dim)
            lambdas = theta / self.frequencies(base, dim, dim, 1).inv_freq
            return hf_lambdas(
                base,
                lambdas,
                lambdas,
                self.original_context_length,
                self.factor,
                self.temperature(),
            )
        optional = {
            "attention_factor": self.attention_factor,
            "mscale": self.mscale,
            "mscale_all_dim": self.mscale_all_dim,
        }
        return {
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_context_length,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
            **{key: float(value) for key, value in optional.items() if value is not None},
        }

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> Yarn:
        factor, length = stretch(parameters, original, target)
        # transformers ignores mscale unless both are there and not 0.
        both = parameters.get("mscale") and parameters.get("mscale_all_dim")
        return cls(
            factor=factor,
            original_context_length=length,
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            truncate=parameters.get("truncate", True),
            attention_factor=parameters.get("attention_factor"),
            mscale=parameters["mscale"] if both else None,
            mscale_all_dim=parameters["mscale_all_dim"] if both else None,
        )
