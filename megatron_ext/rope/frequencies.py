"""Frequencies of any RoPE rule, and the same settings in Hugging Face's keys.

    rope = rope_frequencies(1e4, 128, Yarn(factor=8.0, original_context_length=4096))
    judge(rope.all_inv_freq, context_length=32768)              # megatron_ext.rope.bound
    rope_to_hf(1e4, 128, Linear(factor=4.0), context_length=16384)

The rules themselves, with their formulas, are in `rules.py`, `yarn.py` and `longrope.py`.
`rope_to_hf` writes both `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (4 and
older), because a base that only one of them knows is silently read as 10000 by the other;
`rope_from_hf` reads either.

Refuses, by ValueError, what a rule cannot mean, and in `rope_to_hf` what transformers cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_ext.rope.longrope import LongRope
from megatron_ext.rope.rules import (
    ChangedBase,
    DynamicNtk,
    Linear,
    Llama3,
    NoScaling,
    Ntk,
    RopeFrequencies,
    check_base,
)
from megatron_ext.rope.yarn import Yarn

__all__ = [
    "ChangedBase",
    "DynamicNtk",
    "HfRope",
    "Linear",
    "Llama3",
    "LongRope",
    "NoScaling",
    "Ntk",
    "RopeFrequencies",
    "RopeScaling",
    "Yarn",
    "rope_frequencies",
    "rope_from_hf",
    "rope_to_hf",
    "rotary_dimensions",
]

RopeScaling = NoScaling | ChangedBase | Linear | Ntk | DynamicNtk | Yarn | Llama3 | LongRope
"""Every rule; `type` tells them apart (a pydantic discriminated union needs no more)."""


def rope_frequencies(
    base: float,
    head_dim: int,
    scaling: RopeScaling | None = None,
    rotary_fraction: float = 1.0,
    current_length: int | None = None,
) -> RopeFrequencies:
    """Frequencies and attention factor of a rule.

    base: above 1, any float. head_dim: even. rotary_fraction: part of a head's dimensions that is
    rotated, the first int(head_dim * rotary_fraction) of them; every formula then has d = that.
    current_length: tokens, only read by the rules that follow it (DynamicNtk, LongRope); None is
    the original length, where DynamicNtk changes nothing and LongRope is short.
    """
    check_base(base, "rope.base")
    scaling = NoScaling() if scaling is None else scaling
    dim = rotary_dimensions(head_dim, rotary_fraction)
    return scaling.frequencies(float(base), head_dim, dim, current_length or 1)


def rotary_dimensions(head_dim: int, rotary_fraction: float = 1.0) -> int:
    """Dimensions of a head that are rotated: int(head_dim * rotary_fraction), an even number."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even, RoPE rotates pairs: write e.g. 128")
    if not 0 < rotary_fraction <= 1:
        raise ValueError(
            f"rotary_fraction={rotary_fraction:g} must be above 0 and at most 1: write 1.0 to "
            "rotate whole heads"
        )
    dim = int(head_dim * rotary_fraction)
    if dim < 2 or dim % 2:
        raise ValueError(
            f"rotary_fraction={rotary_fraction:g} of head_dim={head_dim} is {dim} dimensions, but "
            f"RoPE rotates pairs: write {max(2, dim + dim % 2) / head_dim:g}"
        )
    return dim


class HfRope(NamedTuple):
    """What a transformers configuration says of RoPE, in our words."""

    base: float
    scaling: RopeScaling
    rotary_fraction: float


def rope_to_hf(
    base: float,
    head_dim: int,
    scaling: RopeScaling | None = None,
    *,
    context_length: int,
    rotary_fraction: float = 1.0,
    partial_rotary: bool = False,
) -> dict[str, Any]:
    """Keys to put into a transformers configuration, the new ones and the old ones.

    rope_parameters, rope_theta, rope_scaling (None without a rule) and max_position_embeddings:
    `context_length`, but the original length for DynamicNtk, because transformers takes that from
    there. A rule without a name there is exported as what it amounts to: Ntk and ChangedBase as a
    base, the other two YaRN forms as LongRoPE factors. Raises ValueError for what cannot be said:
    kept positions of LongRoPE, and a rotary_fraction below 1 unless `partial_rotary` says that the
    target architecture reads `partial_rotary_factor` (Llama's does not, and would rotate all).
    """
    scaling = NoScaling() if scaling is None else scaling
    check_base(base, "rope.base")
    dim = rotary_dimensions(head_dim, rotary_fraction)
    parameters = scaling.to_hf(float(base), dim)
    if rotary_fraction != 1.0:
        if not partial_rotary:
            raise ValueError(
                f"rotary_fraction={rotary_fraction:g} cannot be exported: transformers' Llama "
                "rotates whole heads, so train with 1.0 or export to another architecture"
            )
        parameters["partial_rotary_factor"] = rotary_fraction
    keys: dict[str, Any] = {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None,
        "max_position_embeddings": context_length,
    }
    if parameters["rope_type"] != "default":
        # `type` is what releases before 4.43 read.
        keys["rope_scaling"] = {**parameters, "type": parameters["rope_type"]}
    if isinstance(scaling, DynamicNtk):
        keys["max_position_embeddings"] = scaling.original_context_length
    if rotary_fraction != 1.0:
        keys["partial_rotary_factor"] = rotary_fraction
    return keys


def rope_from_hf(config: Mapping[str, Any]) -> HfRope:
    """RoPE settings of a transformers configuration (a config.json as a mapping).

    Reads `rope_parameters` or the older `rope_scaling` with `rope_theta`; a key at the top counts
    where the inner one is missing, and `original_max_position_embeddings` at the top wins, as in
    transformers. Raises ValueError for a rule it does not know (a rule for each layer type among
    them), for a missing base, and for two bases that disagree.
    """
    # In the order transformers has: rope_scaling replaces rope_parameters where both are given.
    inner = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in inner.values()):
        raise ValueError(
            "rope_parameters holds one rule for each layer type: only one for all layers is known "
            "here, so write it flat"
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            inner.setdefault(key, config[key])
    other = (config.get("rope_parameters") or {}).get("rope_theta")
    bases = {float(b) for b in (inner.get("rope_theta"), config.get("rope_theta"), other) if b}
    if len(bases) != 1:
        raise ValueError(
            f"the configuration gives {len(bases)} values of rope_theta {sorted(bases)}, not one: "
            "write the base the model was trained with"
        )
    kind = inner.get("rope_type", inner.get("type", "default"))
    rules: dict[str, Any] = {
        "default": NoScaling,
        "linear": Linear,
        "dynamic": DynamicNtk,
        "yarn": Yarn,
        "llama3": Llama3,
        "longrope": LongRope,
        "su": LongRope,  # its name in the first releases of Phi-3
    }
    if kind not in rules:
        raise ValueError(f"rope_type {kind!r} is not known here: use one of {', '.join(rules)}")
    positions = config.get("max_position_embeddings")
    original = inner.get("original_max_position_embeddings", positions)
    original = config.get("original_max_position_embeddings", original)
    if kind == "dynamic":
        original = positions
    scaling = rules[kind].from_hf(inner, original, positions)
    return HfRope(bases.pop(), scaling, float(inner.get("partial_rotary_factor", 1.0)))
