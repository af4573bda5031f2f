"""The frequency rules of RoPE as values: base, ABF, PI, NTK, dynamic NTK, YaRN, llama3, LongRoPE.

    rule = Yarn(factor=8.0, original_context_length=4096)
    rule.frequencies(base=1e4, head_dim=128, dim=128, length=1).inv_freq    # float64 [64]
    rule.to_hf(base=1e4, dim=128)                # {"rope_type": "yarn", "rope_theta": 10000.0, ...}

A rule is a small frozen value that a configuration can hold (`rope.scaling`, told apart by `type`)
and that knows its own formula, its source, and its name in transformers. Symbols throughout: b the
base, d the rotated dimensions of a head (`dim`), theta_i = b^(-2i/d) for i = 0 .. d/2 - 1, L the
original context, L' the target, s = L'/L the factor, l the current length (`length`). Frequencies
are float64 radians a token. `frequencies.py` has the functions that others call.

Refuses, by ValueError, factors below 1, lengths below 2, and lists that do not fit the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_ext.rope.bound import Floats
from megatron_ext.rope.bound import base_frequencies as _theta

# Read by pydantic when a configuration holds a rule; nothing here imports it.
_STRICT = {"extra": "forbid", "use_attribute_docstrings": True}


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

    __pydantic_config__ = _STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["none"] = "none"
    """The rule's name."""

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(_theta(base, dim), 1.0, head_dim)

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

    __pydantic_config__ = _STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["abf"] = "abf"
    """The rule's name."""
    base: float
    """The base to use instead of `rope.base`, above 1. Llama 2 Long went from 1e4 to 5e5."""

    def __post_init__(self) -> None:
        check_base(self.base, "rope.scaling.base")

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(_theta(self.base, dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "default", "rope_theta": float(self.base)}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """PI, position interpolation (arXiv 2306.15595, Eq. 4): m becomes m L/L', so theta_i / s."""

    __pydantic_config__ = _STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["linear"] = "linear"
    """The rule's name."""
    factor: float
    """s, target length over original length, at least 1 (2.5 is fine). Divides every frequency."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(_theta(base, dim) / self.factor, 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "linear", "rope_theta": base, "factor": self.factor}

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> Linear:
        return cls(factor=_needed(parameters, "factor"))


@dataclass(frozen=True, kw_only=True)
class Ntk:
    """NTK-aware (arXiv 2405.14591, Eq. 6): b' = b s^(d/(d-2)).

    The highest frequency stays, the lowest is divided by s exactly.
    """

    __pydantic_config__ = _STRICT
    follows_length: ClassVar[bool] = False

    type: Literal["ntk"] = "ntk"
    """The rule's name."""
    factor: float
    """s, target length over original length, at least 1. Raises the base to b s^(d/(d-2))."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def base(self, base: float, dim: int) -> float:
        """The base this rule amounts to."""
        return base * self.factor ** _ntk_exponent(dim)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(_theta(self.base(base, dim), dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        return {"rope_type": "default", "rope_theta": self.base(base, dim)}


@dataclass(frozen=True, kw_only=True)
class DynamicNtk:
    """Dynamic NTK (arXiv 2309.00071, section 3.3): for a current length l > L,
    b' = b (s l/L - (s - 1))^(d/(d-2)); up to L nothing changes."""

    __pydantic_config__ = _STRICT
    follows_length: ClassVar[bool] = True

    type: Literal["dynamic"] = "dynamic"
    """The rule's name."""
    factor: float
    """s, at least 1: how fast the base grows with the current length. 1 follows l/L itself."""
    original_context_length: int
    """L, tokens the model was trained on: shorter sequences are left alone."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_length(self.original_context_length)

    def base(self, base: float, dim: int, length: int) -> float:
        """The base this rule amounts to at a current length."""
        stretch = max(length, self.original_context_length) / self.original_context_length
        return base * (self.factor * stretch - (self.factor - 1)) ** _ntk_exponent(dim)

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        return RopeFrequencies(_theta(self.base(base, dim, length), dim), 1.0, head_dim)

    def to_hf(self, base: float, dim: int) -> Parameters:
        # L has no key: transformers reads max_position_embeddings, which rope_to_hf writes.
        return {"rope_type": "dynamic", "rope_theta": base, "factor": self.factor}

    @classmethod
    def from_hf(
        cls, parameters: Parameters, original: int | None, target: int | None
    ) -> DynamicNtk:
        return cls(factor=_needed(parameters, "factor"), original_context_length=_length(original))


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

    __pydantic_config__ = _STRICT
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
        _check_factor(self.factor)
        _check_length(self.original_context_length)
        _check_attention_factor(self.attention_factor)
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
        theta = _theta(base, dim)
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
            theta = _theta(base, dim)
            lambdas = theta / self.frequencies(base, dim, dim, 1).inv_freq
            return _hf_lambdas(
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
        factor, length = _stretch(parameters, original, target)
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


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's rule: by wavelength w_i = 2 pi/theta_i, three bands. w < L/high: kept; w > L/low:
    divided by s; between: theta_i ((1 - g)/s + g) with g = (L/w - low)/(high - low)."""

    __pydantic_config__ = _STRICT
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
        _check_factor(self.factor)
        _check_length(self.original_context_length)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} and high_freq_factor="
                f"{self.high_freq_factor:g} do not satisfy 0 < low < high: write e.g. 1 and 4"
            )

    def frequencies(self, base: float, head_dim: int, dim: int, length: int) -> RopeFrequencies:
        theta = _theta(base, dim)
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
            factor=_needed(parameters, "factor"),
            original_context_length=_length(original),
            low_freq_factor=_needed(parameters, "low_freq_factor"),
            high_freq_factor=_needed(parameters, "high_freq_factor"),
        )


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753, Eq. 3): theta_i / lambda_i with searched lambda_i, and the first
    n_hat positions kept unscaled. `short_factor` up to L, `long_factor` beyond (for all positions).
    """

    __pydantic_config__ = _STRICT
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
        _check_factor(self.factor)
        _check_length(self.original_context_length)
        _check_attention_factor(self.attention_factor)
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
        theta = _theta(base, dim)
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
        return _hf_lambdas(
            base,
            self.short_factor,
            self.long_factor,
            self.original_context_length,
            self.factor,
            self.attention_factor,
        )

    @classmethod
    def from_hf(cls, parameters: Parameters, original: int | None, target: int | None) -> LongRope:
        factor, length = _stretch(parameters, original, target)
        return cls(
            short_factor=tuple(_needed(parameters, "short_factor")),
            long_factor=tuple(_needed(parameters, "long_factor")),
            original_context_length=length,
            factor=factor,
            attention_factor=parameters.get("attention_factor"),
        )


RopeScaling = NoScaling | ChangedBase | Linear | Ntk | DynamicNtk | Yarn | Llama3 | LongRope
"""Every rule; `type` tells them apart (a pydantic discriminated union needs no more)."""


def _ntk_exponent(dim: int) -> float:
    if dim <= 2:
        raise ValueError(
            f"NTK scaling of {dim} rotated dimensions has the exponent d/(d-2): rotate 4 or more"
        )
    return dim / (dim - 2)


def check_base(base: float, name: str) -> None:
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"{name}={base:g} must be a number above 1: write for example 10000")


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(
            f"factor={factor:g} must be at least 1: write target length / original length"
        )


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(
            f"original_context_length={length} must be 2 tokens or more: write the length the "
            "model was first trained on"
        )


def _check_attention_factor(value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"attention_factor={value:g} must be above 0: leave it out for the rule's own"
        )


def _hf_lambdas(
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


def _needed(parameters: Parameters, key: str) -> Any:
    if parameters.get(key) is None:
        kind = parameters.get("rope_type", parameters.get("type"))
        raise ValueError(f"rope_type {kind!r} lacks {key!r}: add it to rope_parameters")
    return parameters[key]


def _length(original: int | None) -> int:
    if original is None:
        raise ValueError(
            "the original context length is missing: add original_max_position_embeddings (for "
            "rope_type 'dynamic', max_position_embeddings)"
        )
    return original


def _stretch(parameters: Parameters, original: int | None, target: int | None) -> tuple[float, int]:
    """(factor, original length); without a factor transformers takes the ratio of the lengths."""
    length = _length(original)
    if parameters.get("factor") is None and target is not None:
        return max(1.0, target / length), length
    return _needed(parameters, "factor"), length
