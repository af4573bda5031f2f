"""Which kernels a run uses, and why: one table, asked by the model, the log and `doctor`.

    kernels = choose(config, look())      # UserError where a forced choice cannot be had
    log.info("kernels: %s", kernels)
    kernels.attention.name                # "sdpa"
    tokens = loss_chunk(config)           # of one chunk of the cross-entropy, None for all at once

`choose` only compares a config with what a machine was found to have; it needs neither torch nor
the packages. `look` looks, and imports what is installed: being there is not enough.
"""

import functools
import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from megatron_ext import gpu_packages
from megatron_ext.config import Config
from megatron_ext.errors import UserError

# Tokens of a chunk of the loss: enough rows to fill a GPU's matrix units. Compiled, a logit takes 2
# bytes and not 10, so more of them fit, and the whole weight gradient is added up less often.
CHUNK_TOKENS = 1024
COMPILED_CHUNK_TOKENS = 4096

# Logits from which `auto` takes chunks: whole, they hold 6 GB at the loss, compiled 2 GB. It is for
# memory alone. Reckoned, not measured, for as many logits of the 2B model (8,192 tokens, vocabulary
# 125,696) on an H200 (4.8 TB/s, 700 TFLOP/s): beside the products Megatron-Core's loss moves 52
# bytes a logit, 11 ms; whole and compiled 6 bytes, 1 ms; chunks too, but make their logits again
# (6 ms, 4% of a step's FLOPs) and add up the weight gradient in float32 (10 bytes each, 1 ms).
MANY_LOGITS = 1 << 30

# Import name of each optional package -> how to get it.
PACKAGES = {
    "transformer_engine": "pip install --no-build-isolation "
    "'transformer-engine[core-cu13,pytorch]>=2.9,<2.12' (CUDA 12: core-cu12)",
    "flash_attn": "pip install --no-build-isolation flash-attn",
    "apex": "build it from source, see docs/install-gpu.md",
    "fused_weight_gradient_mlp_cuda": "build apex with its CUDA extensions, see "
    "docs/install-gpu.md",
    "triton": "pip install triton",
}
# What of a package is really used, where that is not all it takes to import it.
_USED = {"transformer_engine": ["transformer_engine.pytorch"], "apex": ["apex.optimizers", "amp_C"]}
_COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class Found:
    """What a machine offers."""

    capability: tuple[int, int] | None
    """Compute capability of its GPU; None without one."""
    problems: Mapping[str, str]
    """Package -> why it cannot be used. One that is not named here can."""
    compiler: bool = True
    """A C compiler, which Triton needs to start its kernels."""
    without_multicast: bool = False
    """UB_SKIPMC=1: Transformer Engine's tensor overlap may do without CUDA multicast."""

    def lacks(self, package: str) -> str:
        """Why there is no such package for a GPU, or "" when there is."""
        if self.capability is None:
            return "no GPU"
        problem = self.problems.get(package, "")
        return f"{package} is {problem}" if problem else ""


@dataclass(frozen=True)
class Choice:
    """One part of the kernels: which, and why it and nothing faster."""

    name: str
    reason: str


@dataclass(frozen=True)
class Kernels:
    """The choice of each part; the names are those of the settings."""

    backend: Choice
    attention: Choice
    optimizer: Choice
    fusions: Choice
    grad_accumulation: Choice
    cross_entropy: Choice

    def __str__(self) -> str:
        """One line: parts that share a reason together."""
        said: dict[str, list[str]] = {}
        for field in fields(self):
            choice = getattr(self, field.name)
            said.setdefault(choice.reason, []).append(f"{field.name} {choice.name}")
        return "; ".join(f"{', '.join(parts)} ({reason})" for reason, parts in said.items())


@dataclass(frozen=True)
class _Option:
    """A row of the table. `objection(config, found)` says in a few words why it cannot be had, or
    "" when it can; `only_asked`: auto never takes it."""

    name: str
    objection: Callable[[Config, Found], str] = lambda config, found: ""
    only_asked: bool = False


def _transformer_engine(config: Config, found: Found) -> str:
    if config.data.told_apart_by:
        return f"{config.data.told_apart_by} needs masks or positions of our own"
    if config.precision.dtype == "fp32" and found.capability is not None:
        return "Transformer Engine multiplies fp32 in TF32"
    return found.lacks("transformer_engine")


def _its_attention(config: Config, found: Found) -> str:
    if config.kernels.backend == "torch":
        return "kernels.backend=torch"
    if config.precision.dtype == "fp32" and found.capability is not None:
        return "its fused attention has no fp32"
    return _transformer_engine(config, found)


def _flash(config: Config, found: Found) -> str:
    if found.capability is None:
        return "no GPU"
    if config.precision.dtype == "fp32":
        return "flash attention has no fp32"
    if config.data.mask_documents:
        return "flash attention takes no masks"
    if config.parallel.context > 1:
        return "with parallel.context SDPA chooses for each chunk"
    if found.capability < (8, 0):
        return "flash attention needs compute capability 8.0"
    return ""


def _flash_attn(config: Config, found: Found) -> str:
    return found.lacks("flash_attn") or _flash(config, found)


def _apex_adam(config: Config, found: Found) -> str:
    # Megatron-Core takes the first of the two that it can import.
    if not found.lacks("transformer_engine"):
        return "transformer_engine goes first"
    return found.lacks("apex")


def _te_adam(config: Config, found: Found) -> str:
    return found.lacks("transformer_engine")


def _compiled(config: Config, found: Found) -> str:
    return found.lacks("triton") or ("" if found.compiler else "no C compiler for Triton")


def _apex_accumulation(config: Config, found: Found) -> str:
    if config.precision.dtype == "fp32":
        return "only from 16 bits"
    return found.lacks("fused_weight_gradient_mlp_cuda")


_ON_A_CPU = "a CPU adds no products of 16 bits to a sum of 32"


def _torch_accumulation(config: Config, found: Found) -> str:
    if found.capability is None and config.precision.dtype != "fp32":
        return _ON_A_CPU
    return ""


# Each part's options, the fastest first; auto takes the first without an objection.
TABLE: dict[str, tuple[_Option, ...]] = {
    "backend": (_Option("transformer_engine", _transformer_engine), _Option("torch")),
    "attention": (
        _Option("transformer_engine", _its_attention),
        # PyTorch brings the same kernels: what auto takes is `sdpa`, told to try cuDNN's first
        # where that is the faster, on Hopper and later.
        _Option("flash_attn", _flash_attn, only_asked=True),
        _Option("cudnn", _flash, only_asked=True),
        _Option("flash", _flash, only_asked=True),
        _Option("sdpa"),
    ),
    "optimizer": (
        _Option("transformer_engine", _te_adam),
        _Option("apex", _apex_adam),
        _Option("torch"),
    ),
    "fusions": (_Option("compiled", _compiled), _Option("none")),
    "grad_accumulation": (
        _Option("apex", _apex_accumulation),
        _Option("torch", _torch_accumulation),
        _Option("none"),
    ),
}


def choose(config: Config, found: Found) -> Kernels:
    """The kernels of a config on such a machine. Raises UserError when one that it insists on
    cannot be had, or something else that needs Transformer Engine."""
    kernels = config.kernels
    asked = {
        "backend": kernels.backend,
        "attention": kernels.attention,
        "optimizer": kernels.optimizer,
        "fusions": kernels.fusions,
        "grad_accumulation": kernels.grad_accumulation,
    }
    chosen = {part: _choose(part, wanted, config, found) for part, wanted in asked.items()}
    wants_it = {
        f"precision.fp8={config.precision.fp8}": config.precision.fp8 != "none",
        "parallel.tensor_overlap=true": config.parallel.tensor_overlap,
    }
    for setting, wanted in wants_it.items():
        if wanted and chosen["backend"].name != "transformer_engine":
            reason = chosen["backend"].reason.removeprefix("transformer_engine: ")
            raise UserError(
                f"{setting} needs kernels.backend=transformer_engine, which cannot be had "
                f"({reason}): {_way_out(reason)}, or leave it out"
            )
    least = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}.get(config.precision.fp8)
    if least and found.capability is not None and found.capability < least:
        raise UserError(
            f"precision.fp8={config.precision.fp8} needs a GPU of compute capability "
            f"{least[0]}.{least[1]}, not {found.capability[0]}.{found.capability[1]}: set "
            "precision.fp8=none"
        )
    _check_multicast(config, found)
    compiled = chosen["fusions"].name == "compiled"
    return Kernels(**chosen, cross_entropy=_cross_entropy(config, compiled))


def _check_multicast(config: Config, found: Found) -> None:
    """Transformer Engine ends with an AssertionError where its overlap finds no multicast."""
    capability = found.capability
    if not config.parallel.tensor_overlap or found.without_multicast or capability is None:
        return
    if capability < (9, 0):
        raise UserError(
            "parallel.tensor_overlap=true uses CUDA multicast, which needs a GPU of compute "
            f"capability 9.0, not {capability[0]}.{capability[1]}: export UB_SKIPMC=1 to go "
            "without it, or set parallel.tensor_overlap=false"
        )


def plain(config: Config) -> Config:
    """The same model with kernels that every machine has."""
    simple = {part: options[-1].name for part, options in TABLE.items()}
    return config.model_copy(
        update={
            "kernels": config.kernels.model_copy(update=simple),
            "precision": config.precision.model_copy(update={"fp8": "none"}),
            "parallel": config.parallel.model_copy(update={"tensor_overlap": False}),
        }
    )


def loss_chunk(config: Config, compiled: bool = False) -> int | None:
    """Tokens of a chunk of the cross-entropy, or None when a rank's micro-batch is one."""
    training, parallel, wanted = config.training, config.parallel, config.kernels.cross_entropy
    tokens = training.micro_batch_size * training.sequence_length // parallel.context
    logits = tokens * config.model.vocab_size // parallel.tensor
    if wanted == "chunked" or (wanted == "auto" and logits >= MANY_LOGITS):
        return COMPILED_CHUNK_TOKENS if compiled else CHUNK_TOKENS
    return None


@functools.cache
def look() -> Found:
    """What this process has."""
    import torch

    gpu = torch.cuda.is_available()
    return Found(
        capability=torch.cuda.get_device_capability() if gpu else None,
        # Without a GPU none is taken, and those that Megatron-Core must not see stay unimported.
        problems={name: problem for name in PACKAGES if gpu and (problem := problem_of(name))},
        compiler=any(map(shutil.which, _COMPILERS)),
        without_multicast=os.environ.get("UB_SKIPMC", "0") != "0",
    )


def problem_of(name: str) -> str:
    """Why a package cannot be used, or "" when it was imported, also without a GPU."""
    try:
        with gpu_packages.shown():
            for module in _USED.get(name, [name]):
                importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == name:
            return "not installed"
        return f"installed but not importable: {error}"
    except Exception as error:  # a wheel built against another torch raises anything
        return f"installed but not importable: {' '.join(str(error).split())[:200]}"
    return ""


def _choose(part: str, wanted: str, config: Config, found: Found) -> Choice:
    objections = {option.name: option.objection(config, found) for option in TABLE[part]}
    if wanted != "auto":
        if reason := objections[wanted]:
            raise UserError(
                f"kernels.{part}={wanted} cannot be had ({reason}): {_way_out(reason)}, or set "
                f"kernels.{part}=auto"
            )
        return Choice(wanted, f"kernels.{part}={wanted}")
    missed: list[str] = []
    for option in TABLE[part]:
        if option.only_asked:
            continue
        if not objections[option.name]:
            reason = " and ".join(dict.fromkeys(missed)) or "auto's first choice"
            return Choice(option.name, reason)
        missed.append(objections[option.name])
    raise AssertionError(f"the last option of {part} has an objection")


def _way_out(reason: str) -> str:
    """How to get what the reason says is missing."""
    if reason == _ON_A_CPU:
        return "set precision.dtype=fp32"
    if "fp32" in reason:
        return "set precision.dtype=bf16"
    package = reason.split(" is ")[0]
    return PACKAGES.get(package, "run where it can be had")


def _cross_entropy(config: Config, compiled: bool) -> Choice:
    wanted, chunk = config.kernels.cross_entropy, loss_chunk(config, compiled)
    reason = f"kernels.cross_entropy={wanted}"
    if wanted == "auto":
        reason = "the logits of a micro-batch are " + ("many" if chunk else "few")
    name = f"in chunks of {chunk:,} tokens" if chunk else "whole"
    return Choice(f"{name}, compiled" if compiled else name, reason)
