"""`pretrain.py --check`: what a run would be, and whether it can start, without torch.

    report = preflight(config, world_size=128)
    print(report.text()); sys.exit(0 if report.ok else 2)

Raises ConfigError when the layout does not divide; missing token files are errors in the report.
"""

import json
from dataclasses import asdict, dataclass

from megatron_ext.config import Config, rope_frequencies_of, short_number, smallest_base, validate
from megatron_ext.data.corpora import corpus_errors, epochs
from megatron_ext.errors import UserError
from megatron_ext.evaluation.in_training import plan_tasks
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.rope.bound import judge, usable_context

_HORIZON = 1 << 20  # distances looked at for the usable context


@dataclass(frozen=True)
class BoundReport:
    """The RoPE bound at the run's own length (arXiv 2405.14591, section 4)."""

    base: float
    head_dim: int
    rule: str
    """rope.scaling.type."""
    context_length: int
    """training.sequence_length, tokens."""
    first_failing_distance: int | None
    min_b: float
    """Least B_m over the context, of head_dim / 2."""
    failing_share: float
    usable_context: int | None
    """Tokens up to which B_m >= 0; null when that is beyond a million."""
    smallest_feasible_base: float | None
    """Of plain RoPE, up to 131,072 tokens; beyond, null: the search would take minutes."""


@dataclass(frozen=True)
class Preflight:
    """What `--check` prints."""

    run_dir: str
    parameters: int
    parameters_without_embeddings: int
    tokens_per_step: int
    steps: int
    tokens: int
    """Tokens that the steps consume: the budget, rounded up to whole steps."""
    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    context: int
    data_parallel: int
    micro_batches: int
    """Micro-batches of one step on each rank."""
    checkpoint_bytes: int
    """Estimate of one checkpoint: weights, and the optimizer's two moments in float32."""
    checkpoints_kept: int
    """How many lie on the disk at the end of the run."""
    bound: BoundReport
    corpora: dict[str, str]
    """Token file prefixes by name."""
    epochs: dict[str, float]
    """How often each corpus is read; empty when one of them cannot serve."""
    warnings: list[str]
    errors: list[str]

    @property
    def ok(self) -> bool:
        """Whether the run could start."""
        return not self.errors

    def json(self) -> str:
        """One JSON object, the fields above and `ok`."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2)

    def text(self, further: str = "", ok: bool | None = None) -> str:
        """Lines for a person; `further` ones before the last, which says whether all is `ok`."""
        kept = self.checkpoint_bytes * self.checkpoints_kept
        names = ", ".join(
            f"{name} ({path})" + (f" {self.epochs[name]:.3g} times" if self.epochs else "")
            for name, path in self.corpora.items()
        )
        lines = [
            ("run", self.run_dir),
            (
                "model",
                f"{self.parameters:,} parameters ({self.parameters_without_embeddings:,} without "
                "embeddings)",
            ),
            (
                "length",
                f"{self.steps:,} steps "
                + ("of up to " if self.tokens < self.steps * self.tokens_per_step else "x ")
                + f"{self.tokens_per_step:,} tokens = {self.tokens:,} tokens",
            ),
            (
                "layout",
                f"{self.world_size} ranks = tensor {self.tensor} x pipeline {self.pipeline}"
                + (f" ({self.virtual_pipeline} chunks each)" if self.virtual_pipeline > 1 else "")
                + (f" x context {self.context}" if self.context > 1 else "")
                + f" x data {self.data_parallel}; {self.micro_batches} micro-batches on each a "
                "step",
            ),
            (
                "checkpoints",
                f"about {_size(self.checkpoint_bytes)} each, {self.checkpoints_kept} kept: "
                f"{_size(kept)}",
            ),
            ("rope", _bound_text(self.bound)),
            ("data", names or "none"),
        ]
        return "\n".join(
            [f"{name:<12}{value}" for name, value in lines]
            + [f"warning: {warning}" for warning in self.warnings]
            + [f"error: {error}" for error in self.errors]
            + ([further] if further else [])
            + (["ok"] if (self.ok if ok is None else ok) else [])
        )


def preflight(config: Config, world_size: int) -> Preflight:
    """Everything that can be said of a run on `world_size` ranks without building it.

    Raises ConfigError when a rule is broken.
    """
    warnings = validate(config, world_size)
    if not config.data.corpora:
        warnings.append(
            "data.corpora is empty, so a run would refuse to start: name a token file, such as "
            "data.corpora.books.path=PREFIX"
        )
    source = config.training.init_from
    if source is not None and not source.exists():
        warnings.append(f"training.init_from={source} does not exist yet: train it first")
    parameters = count_parameters(config.model)
    parallel, training = config.parallel, config.training
    data_parallel = world_size // parallel.model_ranks
    errors = corpus_errors(config)
    if config.data.corpora and not errors:
        try:
            plan_tasks(config)
        except UserError as error:
            errors.append(f"evaluation.tasks: {error}")
    return Preflight(
        run_dir=str(training.run_dir),
        parameters=parameters.total,
        parameters_without_embeddings=parameters.without_embeddings,
        tokens_per_step=training.tokens_per_step,
        steps=training.steps,
        tokens=training.tokens_after(training.steps),
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data_parallel=data_parallel,
        micro_batches=training.global_batch_size // (training.micro_batch_size * data_parallel),
        checkpoint_bytes=parameters.total * checkpoint_bytes_per_parameter(config),
        checkpoints_kept=checkpoints_kept(config),
        bound=_bound_report(config),
        corpora={name: str(corpus.path) for name, corpus in config.data.corpora.items()},
        warnings=warnings,
        epochs={} if errors else epochs(config),
        errors=errors,
    )


def checkpoint_bytes_per_parameter(config: Config) -> int:
    """fp32: weight and two moments, 4 bytes each. bf16, fp16: 2 for the weight, 4 for its float32
    master and 8 for the moments."""
    return 4 + 8 if config.precision.dtype == "fp32" else 2 + 4 + 8


def checkpoints_kept(config: Config) -> int:
    """The newest ones and those that stay for good, once each."""
    steps, saving = config.training.steps, config.checkpoint
    saved = [*range(saving.interval, steps, saving.interval), steps]
    kept = set(saved[-saving.keep_last :])
    if saving.keep_every:
        kept |= {step for step in saved if step % saving.keep_every == 0}
    return len(kept)


def _bound_report(config: Config) -> BoundReport:
    length = config.training.sequence_length
    inv_freq = rope_frequencies_of(config).all_inv_freq
    verdict = judge(inv_freq, length)
    return BoundReport(
        base=config.rope.base,
        head_dim=config.model.head_dim,
        rule=config.rope.scaling.type,
        context_length=length,
        first_failing_distance=verdict.first_failing_distance,
        min_b=verdict.min_b,
        failing_share=verdict.failing_share,
        usable_context=usable_context(inv_freq, _HORIZON),
        smallest_feasible_base=smallest_base(config, longest=1 << 17),
    )


def _bound_text(bound: BoundReport) -> str:
    length, first = bound.context_length, bound.first_failing_distance
    failing = round(bound.failing_share * length)
    rule = "" if bound.rule == "none" else f" with {bound.rule} scaling"
    verdict = f"supports {length:,} tokens"
    if first is not None:
        verdict = f"fails {length:,} tokens, at {failing:,} distances, the first m={first:,}"
    usable = "a million or more" if bound.usable_context is None else f"{bound.usable_context:,}"
    text = (
        f"base {short_number(bound.base)}{rule} at head dim {bound.head_dim} {verdict}; least B_m "
        f"{bound.min_b:.2f} of {bound.head_dim // 2}; usable context {usable} tokens"
    )
    if bound.smallest_feasible_base is not None:
        plain = "; " if bound.rule == "none" else "; without scaling "
        text += f"{plain}this length needs a base of at least {bound.smallest_feasible_base:,.1f}"
    return text


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
