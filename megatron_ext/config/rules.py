"""Rules that join several settings; each error names the values, the rule and the fix.

    for warning in validate(config, world_size=128):
        log.warning(warning)

Raises ConfigError at the first broken rule. Needs numpy, not torch: the RoPE bound is evaluated for
the very frequencies, length and head size of the config, because the feasible bases are no interval
that a table could hold (arXiv 2405.14591, section 4).
"""

import math
from collections.abc import Iterable

from megatron_ext.config.schema import Config
from megatron_ext.errors import ConfigError
from megatron_ext.rope.bound import BoundVerdict, judge
from megatron_ext.rope.feasible import smallest_feasible_base
from megatron_ext.rope.frequencies import NoScaling, RopeFrequencies, rope_frequencies

# The search for the smallest feasible base takes 0.2 s at 4k tokens and 2 s at 32k (head dim 128).
_SEARCHED_LENGTH = 32768


def validate(config: Config, world_size: int | None = None) -> list[str]:
    """Check every rule for `world_size` ranks (default: parallel.world_size); returns warnings."""
    check_heads(config)
    check_tensor(config)
    check_pipeline(config)
    check_context(config)
    check_layout(config, config.parallel.world_size if world_size is None else world_size)
    check_schedule(config)
    check_precision(config)
    check_overlap(config)
    check_intervals(config)
    check_kernels(config)
    check_positions(config)
    check_tasks(config)
    return check_bound(config)


def check_kernels(config: Config) -> None:
    """Masks between documents are for PyTorch's SDPA alone, positions of their own for its RoPE."""
    needed = {}
    if config.data.told_apart_by:
        needed["backend"] = "torch"
    if config.data.mask_documents:
        needed["attention"] = "sdpa"
    for part, other in needed.items():
        wanted = getattr(config.kernels, part)
        if wanted not in ("auto", other):
            raise ConfigError(
                f"{config.data.told_apart_by} does not go with kernels.{part}={wanted}: use "
                f"kernels.{part}={other} or auto"
            )


def check_positions(config: Config) -> None:
    """Positions of a document's own need a rule that goes by distance alone."""
    scaling = config.rope.scaling
    if config.data.reset_positions and scaling.follows_length:
        # It would be that of the micro-batch's longest document, whoever else is in there.
        raise ConfigError(
            f"data.reset_positions=true does not go with rope.scaling.type={scaling.type}, which "
            "goes by the length of a whole sample: set data.reset_positions=false"
        )


def check_tasks(config: Config) -> None:
    """Tasks in training have texts of any length, in the layout and precision of the training."""
    parallel, scaling = config.parallel, config.rope.scaling
    divided = parallel.sequence or parallel.context > 1
    of_one_length = [
        (f"precision.fp8={config.precision.fp8}", config.precision.fp8 != "none"),
        ("parallel.tensor_overlap=true", parallel.tensor_overlap),
        # They are filled up for the ranks to divide, and so would be the length it goes by.
        (
            f"rope.scaling.type={scaling.type} on divided sequences",
            scaling.follows_length and divided,
        ),
    ]
    for setting, there in of_one_length:
        if config.evaluation.tasks and there:
            raise ConfigError(
                f"evaluation.tasks asks for texts of any length, which {setting} does not take: "
                "set evaluation.tasks=[] and use megatron-ext evaluate on the checkpoints"
            )


def check_heads(config: Config) -> None:
    """Heads fill the model, KV heads the heads, and RoPE finds pairs to rotate."""
    model, fraction = config.model, config.rope.rotary_fraction
    if "head_dim" not in model.model_fields_set and model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.num_heads={model.num_heads} does not divide "
            f"model.hidden_size={model.hidden_size}: "
            f"{_choose(divisors(model.hidden_size), model.num_heads)}, or set model.head_dim"
        )
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide "
            f"model.num_heads={model.num_heads}: "
            f"{_choose(divisors(model.num_heads), model.num_kv_heads)}"
        )
    if model.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={model.head_dim} is odd, but RoPE rotates pairs of dimensions: choose "
            f"{model.head_dim + 1}"
        )
    rotated = int(model.head_dim * fraction)
    if rotated < 2 or rotated % 2:
        even = max(2, rotated + rotated % 2)
        raise ConfigError(
            f"rope.rotary_fraction={fraction:g} rotates {rotated} of model.head_dim="
            f"{model.head_dim} dimensions, but RoPE rotates pairs: write {even / model.head_dim:g}"
        )


def check_tensor(config: Config) -> None:
    """Every matrix splits evenly over the tensor-parallel ranks."""
    model, parallel = config.model, config.parallel

    def fits(size: int) -> bool:
        # Megatron-Core 0.16.1 also lets ranks share a KV head (transformer_config.py:940).
        shared = size % model.num_kv_heads == 0 or model.num_kv_heads % size == 0
        return shared and not any(
            value % size for value in (model.num_heads, model.ffn_hidden_size, model.vocab_size)
        )

    for name in ("num_heads", "ffn_hidden_size", "vocab_size"):
        if getattr(model, name) % parallel.tensor:
            raise ConfigError(
                f"parallel.tensor={parallel.tensor} does not divide "
                f"model.{name}={getattr(model, name)}: "
                f"{_choose(filter(fits, divisors(model.num_heads)), parallel.tensor)}"
            )
    if not fits(parallel.tensor):
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} is neither a divisor nor a multiple of "
            f"model.num_kv_heads={model.num_kv_heads}: "
            f"{_choose(filter(fits, divisors(model.num_heads)), parallel.tensor)}"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence=true splits activations over tensor-parallel ranks, but "
            "parallel.tensor=1: raise it, or set parallel.sequence=false"
        )


def check_pipeline(config: Config) -> None:
    """Layers split over the stages, and those of a stage over its chunks."""
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.overlap_p2p_comm and parallel.virtual_pipeline == 1:
        raise ConfigError(
            "parallel.overlap_p2p_comm=true overlaps the messages of interleaved stages, but "
            "parallel.virtual_pipeline=1: raise it, or leave the setting out"
        )
    if parallel.pipeline == 1:
        for name in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
            if getattr(parallel, name) not in (1, None):
                raise ConfigError(
                    f"parallel.{name}={getattr(parallel, name)} divides pipeline stages, but "
                    "parallel.pipeline=1: raise it, or leave the setting out"
                )
        return
    ends = {
        name: getattr(parallel, name)
        for name in ("first_stage_layers", "last_stage_layers")
        if getattr(parallel, name) is not None
    }
    if not ends and layers % parallel.pipeline:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} does not divide model.num_layers={layers}: "
            f"{_choose(divisors(layers), parallel.pipeline)}, or set parallel.first_stage_layers "
            "or last_stage_layers"
        )
    stages = parallel.stage_layers(layers)
    if sum(stages) != layers or min(stages) < 1:
        said = " and ".join(f"parallel.{name}={number}" for name, number in ends.items())
        others = parallel.pipeline - len(ends)
        raise ConfigError(
            f"{said} of model.num_layers={layers} leave {layers - sum(ends.values())} layers for "
            f"{others} other stage{'s' * (others != 1)}: the rest must be a multiple of them"
            + (", at least one layer each" if others else ", thus none")
        )
    chunks = parallel.virtual_pipeline
    if any(number % chunks for number in stages):
        raise ConfigError(
            f"parallel.virtual_pipeline={chunks} does not divide the layers of every stage, "
            f"{' + '.join(map(str, stages))}: "
            f"{_choose(divisors(math.gcd(*stages)), chunks)}, or change parallel.pipeline"
        )
    if parallel.overlap_p2p_comm is False and chunks > 1 and parallel.pipeline == 2:
        raise ConfigError(
            "parallel.overlap_p2p_comm=false sends activations and gradients in one batch, with "
            "parallel.pipeline=2 to the same rank, which would mistake them for each other: leave "
            "the setting out, or set parallel.virtual_pipeline=1"
        )


def check_context(config: Config) -> None:
    """A sequence splits into two chunks for each context-parallel rank, and each rank's part over
    the tensor-parallel ranks with sequence parallelism."""
    parallel, length = config.parallel, config.training.sequence_length
    if parallel.context > 1 and length % (2 * parallel.context):
        raise ConfigError(
            f"parallel.context={parallel.context} splits a sequence into {2 * parallel.context} "
            f"chunks, which do not divide training.sequence_length={length}: choose "
            f"{_next_multiple(length, 2 * parallel.context)} tokens"
        )
    if parallel.sequence and length // parallel.context % parallel.tensor:
        ranks = f"parallel.tensor={parallel.tensor}"
        if parallel.context > 1:
            ranks += f" x parallel.context={parallel.context}"
        raise ConfigError(
            f"{ranks} does not divide training.sequence_length={length}, "
            "which parallel.sequence=true splits: choose "
            f"{_next_multiple(length, parallel.tensor * 2 * parallel.context)} tokens"
        )


def check_overlap(config: Config) -> None:
    """What is to overlap is there."""
    parallel = config.parallel
    needs = [
        ("overlap_param_gather", "distributed_optimizer", parallel.distributed_optimizer),
        ("overlap_param_gather", "overlap_grad_reduce", parallel.overlap_grad_reduce),
        ("tensor_overlap", "sequence", parallel.sequence),
    ]
    for name, needed, there in needs:
        if getattr(parallel, name) and not there:
            raise ConfigError(
                f"parallel.{name}=true needs parallel.{needed}=true: set it, or leave "
                f"parallel.{name} out"
            )


def check_layout(config: Config, world_size: int) -> None:
    """Ranks and batch divide: world = tensor x pipeline x context x data, batch = micro-batch x
    data x n, with virtual stages n = pipeline x m."""
    parallel, training = config.parallel, config.training
    if world_size < 1:
        raise ConfigError(f"a world of {world_size} ranks cannot train: choose 1 or more")
    ranks = parallel.model_ranks
    if world_size % ranks:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        raise ConfigError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context} = "
            f"{ranks} does not divide the world size {world_size}: start "
            f"{_next_multiple(world_size, ranks)} processes (parallel.world_size), or lower one "
            "of them"
        )
    data_parallel = world_size // ranks
    at_once = training.micro_batch_size * data_parallel
    if training.global_batch_size % at_once:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is no multiple of "
            f"training.micro_batch_size={training.micro_batch_size} x {data_parallel} "
            f"data-parallel ranks = {at_once}: choose "
            f"{_next_multiple(training.global_batch_size, at_once)}"
        )
    for name, size in zip(("start", "increment"), training.rampup_batch_size, strict=False):
        if size % at_once:
            raise ConfigError(
                f"training.rampup_batch_size={list(training.rampup_batch_size)}: its {name} is no "
                f"multiple of training.micro_batch_size={training.micro_batch_size} x "
                f"{data_parallel} data-parallel ranks = {at_once}: choose "
                f"{_next_multiple(size, at_once)}"
            )
    # Megatron-Core 0.16.1 runs virtual stages in groups of that many (schedules.py:1007).
    group = at_once * parallel.pipeline
    for size in (training.global_batch_size, *training.rampup_batch_size[:2]):
        if parallel.virtual_pipeline > 1 and size % group:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs micro-batches in "
                f"groups of parallel.pipeline={parallel.pipeline}, but a batch of {size} "
                f"(training.global_batch_size, rampup_batch_size) is no multiple of "
                f"{parallel.pipeline} x {at_once}: choose {_next_multiple(size, group)}"
            )


def check_schedule(config: Config) -> None:
    """The learning rate goes down, and its parts fit into the run."""
    schedule, lr, steps = config.schedule, config.optimizer.lr, config.training.steps
    if schedule.min_lr > lr:
        raise ConfigError(
            f"schedule.min_lr={short_number(schedule.min_lr)} is above its peak, "
            f"optimizer.lr={short_number(lr)}: choose at most {short_number(lr)}"
        )
    if schedule.warmup_steps > steps:
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} is more than training.steps={steps}: "
            f"choose at most {steps}"
        )
    if schedule.type != "constant" and schedule.warmup_steps + schedule.decay_steps > max(
        steps, schedule.warmup_steps + 1
    ):
        raise ConfigError(
            f"schedule.warmup_steps={schedule.warmup_steps} + schedule.decay_steps="
            f"{schedule.decay_steps} is more than training.steps={steps}: choose decay_steps of at "
            f"most {max(1, steps - schedule.warmup_steps)}"
        )


def check_precision(config: Config) -> None:
    """Gradients are reduced in a format that they have, and 8 bits come in wholes."""
    precision, model, parallel = config.precision, config.model, config.parallel
    if precision.grad_reduce == "bf16" and precision.dtype != "bf16":
        raise ConfigError(
            f"precision.grad_reduce=bf16 needs precision.dtype=bf16, not {precision.dtype}: "
            "set precision.grad_reduce=fp32"
        )
    if precision.fp8 == "none":
        return
    if precision.dtype != "bf16":
        raise ConfigError(
            f"precision.fp8={precision.fp8} needs precision.dtype=bf16, not {precision.dtype}: set "
            "precision.dtype=bf16, or precision.fp8=none"
        )
    # Transformer Engine's 8-bit products; scales of 32 numbers want whole groups of them.
    multiple = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}[precision.fp8]
    tokens = config.training.micro_batch_size * config.training.sequence_length
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size over the tensor-parallel ranks": model.ffn_hidden_size
        // parallel.tensor,
        "the width of a rank's heads": model.num_heads * model.head_dim // parallel.tensor,
        "the length of a rank's micro-batch": tokens // parallel.context,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"precision.fp8={precision.fp8} takes matrices in multiples of {multiple}, but "
                f"{name} is {size}: choose {_next_multiple(size, multiple)}, or precision.fp8=none"
            )


def check_intervals(config: Config) -> None:
    """A checkpoint that is to stay for good is one that gets written."""
    interval, keep = config.checkpoint.interval, config.checkpoint.keep_every
    if keep is not None and keep % interval:
        raise ConfigError(
            f"checkpoint.keep_every={keep} is no multiple of checkpoint.interval={interval}, so "
            f"such a step may never be saved: choose {_next_multiple(keep, interval)}"
        )


def check_bound(config: Config) -> list[str]:
    """rope.bound: what B_m says about this base at this length, as an error or a warning."""
    if config.rope.bound == "off":
        return []
    verdict = rope_verdict(config)
    expected = config.rope.bound == "expect_violation"
    base, length = f"rope.base={short_number(config.rope.base)}", config.training.sequence_length
    if expected and verdict.feasible:
        raise ConfigError(
            f"{base} supports training.sequence_length={length} (least B_m {verdict.min_b:.2f} at "
            f"m={verdict.min_distance}), but rope.bound=expect_violation demands that it does not: "
            "lower the base, or set rope.bound=error"
        )
    if verdict.feasible or expected:
        return []
    failing = round(verdict.failing_share * length)
    text = (
        f"{base} does not support training.sequence_length={length}: B_m < 0 first at "
        f"m={verdict.first_failing_distance}, at {failing} of {length} distances, "
        f"least {verdict.min_b:.2f} of {config.model.head_dim // 2}; {_way_out(config)}"
    )
    if config.rope.bound == "warn":
        return [text]
    raise ConfigError(f"{text}; if that is the experiment, set rope.bound=expect_violation or warn")


def rope_verdict(config: Config) -> BoundVerdict:
    """B_m over the sequence length, for the frequencies that the model will have at that length.

    Raises ConfigError when rope.scaling does not fit the head.
    """
    return judge(rope_frequencies_of(config).all_inv_freq, config.training.sequence_length)


def rope_frequencies_of(config: Config) -> RopeFrequencies:
    """The frequencies at the sequence length. Raises ConfigError when rope.scaling does not fit."""
    try:
        return rope_frequencies(
            config.rope.base,
            config.model.head_dim,
            config.rope.scaling,
            config.rope.rotary_fraction,
            current_length=config.training.sequence_length,
        )
    except ValueError as error:
        raise ConfigError(f"rope.scaling: {error}") from None


def smallest_base(config: Config, longest: int = _SEARCHED_LENGTH) -> float | None:
    """The smallest base of plain RoPE that supports the sequence length, whatever rope.scaling is;
    None beyond `longest` tokens. 131,072 tokens take 10 s and more."""
    length = config.training.sequence_length
    if length > longest:
        return None
    return smallest_feasible_base(length, config.model.head_dim, config.rope.rotary_fraction)


def short_number(number: float) -> str:
    """As a person writes it: 10000, 5e5, 2.5e-5."""
    mantissa, _, exponent = f"{number:.9e}".partition("e")
    if -4 <= int(exponent) < 5:
        return f"{number:.10g}"
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _way_out(config: Config) -> str:
    """The base to write instead; searched only where that takes seconds."""
    length, head_dim = config.training.sequence_length, config.model.head_dim
    plain = isinstance(config.rope.scaling, NoScaling)
    base = smallest_base(config)
    if base is not None:
        without = "" if plain else "without rope.scaling "
        return f"{without}the smallest base that does is {_short(config, base)!r}"
    return f"`megatron-ext bound --context {length} --head-dim {head_dim}` names bases that do"


def _short(config: Config, base: float) -> float:
    """A base that plain RoPE supports rounded up to few digits; rounding far could leave its
    feasible island."""
    model, length = config.model, config.training.sequence_length
    for digits in range(5, 16):
        unit = 10.0 ** (math.floor(math.log10(base)) + 1 - digits)
        rounded = float(f"{math.ceil(base / unit) * unit:.{digits}g}")
        plain = rope_frequencies(rounded, model.head_dim, None, config.rope.rotary_fraction)
        if rounded >= base and judge(plain.all_inv_freq, length).feasible:
            return rounded
    return base


def _choose(allowed: Iterable[int], given: int) -> str:
    """The allowed values, those nearest to the given one when there are many."""
    values = sorted(sorted(set(allowed), key=lambda value: abs(value - given))[:6])
    *most, last = [str(value) for value in values]
    return f"choose {', '.join(most)} or {last}" if most else f"choose {last}"


def _next_multiple(number: int, factor: int) -> int:
    return max(1, -(-number // factor)) * factor
