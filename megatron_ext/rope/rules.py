"""The simple frequency rules of RoPE as values: base, ABF, PI, NTK, dynamic NTK, llama3.

    rule = Linear(factor=4.0)
    rule.frequencies(base=1e4, head_dim=128, dim=128, length=1).inv_freq    # float64 [64]
    rule.to_hf(base=1e4, dim=128)              # {"rope_type": "linear", "rope_theta": 10000.0, ..}

A rule is a small frozen value that a configuration can hold (`rope.scaling`, told apart by `type`)
and that knows its own formula, its source, and its name in transformers. Symbols throughout: b the
base, d the rotated dimensions of a head (`dim`), theta_i = b^(-2i/d) for i = 0 .. d/2 - 1, L the
original context, L' the target, s = L'/L the factor, l the current length (`length`). Frequencies
are float64 radians a token. YaRN and LongRoPE have rooms of their own, `yarn.py` and `longrope.py`;
`frequencies.py` brings all together and has the functions that others call.

Refuses, by ValueError, factors below 1 and lengths below 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_ext.rope.bound import Floats
from megatron_ext.rope.bound import base_frequencies as theta_of

# Read by pydantic when a configuration holds a rule; nothing here imports it.
STRICT = {"extra": "forbid", "use_attribute_docstrings": True}


Parameters = dict[str, Any]
"""transformers' `rope_parameters`: rope_type, rope_theta and what the type asks for."""


@dataclass(frozen=True)
class RopeFrequencies:
    """What a rotary embedding needs to know of a rule, at one current length."""

    inv_freq: Floats
    """float64 [rotary_dim/2], radians a token."""
    attention_factor: float
    """Multiplies both cos and sin, so attention logits get its square."""
    head_dim: int
    """Dimensions of a head; the last head_dim - rotary_dim are not rotated."""
    kept_positions: int = 0
    """LongRoPE's n_hat: positions 0 .. kept_positions - 1 use `kept_inv_freq` instead."""
    kept_inv_freq: Floats | None = None
    """float64 [rotary_dim/2], the unscaled frequencies; None when kept_positions is 0."""

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return 2 * len(self.inv_freq)

    @property
    def all_inv_freq(self) -> Floats:
        """float64 [head_dim/2] with 0 for the pairs left alone: what the bound is judged on."""
        return np.pad(self.inv_freq, (0, (self.head_dim - self.rotary_dim) // 2))


@dataclass(frozen=True, kw_only=True)
class NoScaling:
    """theta_i = b^(-2i/d) as it is: RoPE of RoFormer, and the main paper's own setting."""

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["none"] = "none"
    """The rule's name."""

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(theta_of(base, dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "default", "rope_theta": base}

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> NoScaling:
        return cls()


@dataclass(frozen=True, kw_only=True)
class ChangedBase:
    """ABF, adjusted base frequency (Llama 2 Long, arXiv 2309.16039, section 2.2): b becomes `base`.

    The same frequencies as writing the new base at `rope.base`; this form keeps the old one on
    record, for a model that was trained with it before.
    """

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["abf"] = "abf"
    """The rule's name."""
    base: float
    """The base to use instead of `rope.base`, above 1. Llama 2 Long went from 1e4 to 5e5."""

    def __post_init__(self) -> None:
        check_base(self.base, "rope.scaling.base")

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(theta_of(self.base, dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "default", "rope_theta": float(self.base)}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """PI, position interpolation (arXiv 2306.15595, Eq. 4): m becomes m L/L', so theta_i / s."""

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["linear"] = "linear"
    """The rule's name."""
    factor: float
    """s, target length over original length, at least 1 (2.5 is fine). Divides every frequency."""

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(theta_of(base, dim) / self.factor, 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "linear", "rope_theta": base, "factor": self.factor}

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> Linear:
        return cls(factor=needed(parameters, "factor"))


@dataclass(frozen=True, kw_only=True)
class Ntk:
    """NTK-aware (arXiv 2405.14591, Eq. 6): b' = b s^(d/(d-2)).

    The highest frequency stays, the lowest is divided by s exactly.
    """

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["ntk"] = "ntk"
    """The rule's name."""
    factor: float
    """s, target length over original length, at least 1. Raises the base to b s^(d/(d-2))."""

    def __post_init__(self) -> None:
        check_factor(self.factor)

    def base(self, base: float, dim: int) -> float:
        """The base this rule amounts to."""
        return base * self.factor ** _ntk_exponent(dim)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(theta_of(self.base(base, dim), dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "default", "rope_theta": self.base(base, dim)}


@dataclass(frozen=True, kw_only=True)
class DynamicNtk:
    """Dynamic NTK (arXiv 2309.00071, section 3.3): for a current length l > L,
    b' = b (s l/L - (s - 1))^(d/(d-2)); up to L nothing changes."""

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = True

    type: Literal["dynamic"] = "dynamic"
    """The rule's name."""
    factor: float
    """s, at least 1: how fast the base grows with the current length. 1 follows l/L itself."""
    original_context_length: int
    """L, tokens the model was trained on: shorter sequences are left alone."""

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_length(self.original_context_length)

    def base(self, base: float, dim: int, length: int) -> float:
        """The base this rule amounts to at a current length."""
        stretch = max(length, self.original_context_length) / self.original_context_length
        return base * (self.factor * stretch - (self.factor - 1)) ** _ntk_exponent(dim)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(theta_of(self.base(base, dim, length), dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        # L has no key: transformers reads max_position_embeddings, which rope_to_hf writes.
        return {"rope_type": "dynamic", "rope_theta": base, "factor": self.factor}

    @classmethod
    def from_hf(
        cls, parameters: Parameters, original: int | None, target: int | None
    ) -> DynamicNtk:
        return cls(
            factor=needed(parameters, "factor"), original_context_length=original_length(original)
        )


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's rule: by wavelength w_i = 2 pi/theta_i, three bands. w < L/high: kept; w > L/low:
    divided by s; between: theta_i ((1 - g)/s + g) with g = (L/w - low)/(high - low)."""

    __pydantic_config__ = STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["llama3"] = "llama3"
    """The rule's name."""
    factor: float
    """s, at least 1; Llama 3.1 has 8, Llama 3.2 has 32."""
    original_context_length: int
    """L, tokens the model was trained on before the extension; 8192 for Llama 3."""
    low_freq_factor: float = 1.0
    """Frequencies that turn fewer than this many times within L are divided by s."""
    high_freq_factor: float = 4.0
    """Frequencies that turn more than this many times within L are kept."""

    def __post_init__(self) -> None:
        check_factor(self.factor)
        check_length(self.original_context_length)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} and high_freq_factor="
                f"{self.high_freq_factor:g} do not satisfy 0 < low < high: write e.g. 1 and 4"
            )

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        theta = theta_of(base, dim)
        turns = self.original_context_length * theta / (2 * math.pi)  # L/w
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return RopeFrequencies(theta * ((1 - kept) / self.factor + kept), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_context_length,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
        }

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> Llama3:
        return cls(
            factor=needed(parameters, "factor"),
            original_context_length=original_length(original),
            low_freq_factor=needed(parameters, "low_freq_factor"),
            high_freq_factor=needed(parameters, "high_freq_factor"),
        )


def _ntk_exponent(dim: int) -> float:
    if dim <= 2:
        raise ValueError(
            f"NTK scaling of {dim} rotated dimensions has the exponent d/(d-2): rotate 4 or more"
        )
    return dim / (dim - 2)


def check_base(base: float, name: str) -> None:
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"{name}={base:g} must be a number above 1: write for example 10000")


def check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(
            f"factor={factor:g} must be at least 1: write target length / original length"
        )


def check_length(length: int) -> None:
    if length < 2:
        raise ValueError(
            f"original_context_length={length} must be 2 tokens or more: write the length the "
            "model was first trained on"
        )


def check_attention_factor(value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"attention_factor={value:g} must be above 0: leave it out for the rule's own"
        )


def needed(parameters: Parameters, key: str) -> Any:
    if parameters.get(key) is None:
        kind = parameters.get("rope_type", parameters.get("type"))
        raise ValueError(f"rope_type {kind!r} lacks {key!r}: add it to rope_parameters")
    return parameters[key]


def original_length(original: int | None) -> int:
    if original is None:
        raise ValueError(
            "the original context length is missing: add original_max_position_embeddings (for "
            "rope_type 'dynamic', max_position_embeddings)"
        )
    return original


def stretch(parameters: Parameters, original: int | None, target: int | None) -> tuple[float, int]:
    """(factor, original length); without a factor transformers takes the ratio of the lengths."""
    length = original_length(original)
    if parameters.get("factor") is None and target is not None:
        return max(1.0, target / length), length
    return needed(parameters, "factor"), length
