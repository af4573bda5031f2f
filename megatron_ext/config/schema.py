"""Every setting, typed and documented: the sections of a config file.

    from megatron_ext.config import load_config
    config = load_config("configs/models/llama_2b.yaml", ["rope.base=5e5"])
    config.model.num_layers, config.rope.base, config.training.global_batch_size

A field's docstring is its help: meaning, consequence, allowed values. It is printed by
`megatron-ext schema`, stands in docs/config.md, and a test refuses a field that no code reads.
Rules that join several fields live in `rules.py`; reading files and messages in `files.py`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field

from megatron_ext.rope.frequencies import NoScaling, RopeScaling


def setting(default: Any = ..., *, unit: str = "", **constraints: Any) -> Any:
    """A field with its default, its unit and pydantic's constraints (`gt=0`, `le=1`)."""
    extra = {"unit": unit} if unit else None
    return Field(default, json_schema_extra=extra, **constraints)


class Section(BaseModel):
    """Frozen, and deaf to no typo: an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


class Model(Section):
    """The Llama: pre-norm, RMSNorm, SwiGLU, rotary positions, no biases."""

    num_layers: int = setting(gt=0, unit="layers")
    """Transformer layers."""
    hidden_size: int = setting(gt=0, unit="dimensions")
    """Width of the residual stream."""
    ffn_hidden_size: int = setting(gt=0, unit="dimensions")
    """Inner width of SwiGLU; its three matrices are hidden_size x ffn_hidden_size each."""
    num_heads: int = setting(gt=0, unit="heads")
    """Query heads."""
    num_kv_heads: Optional[int] = setting(None, gt=0, unit="heads")
    """Key and value heads (grouped-query attention); unset: as many as query heads."""
    head_dim: Optional[int] = setting(None, gt=0, unit="dimensions")
    """Size of one head; unset: hidden_size / num_heads. The RoPE bound depends on it."""
    vocab_size: int = setting(gt=0, unit="tokens")
    """Rows of the embedding; at least the tokenizer's size and divisible by parallel.tensor."""
    tied_embeddings: bool = setting(False)
    """Share the input embedding with the output projection."""
    norm_eps: float = setting(1e-6, gt=0)
    """Epsilon inside RMSNorm's square root."""
    init_std: float = setting(0.02, gt=0)
    """Standard deviation of initial weights; projections into the residual stream use
    init_std / sqrt(2 num_layers)."""


class Rope(Section):
    """Rotary positions, the subject of the experiment."""

    base: float = setting(gt=1)
    """Base (theta) of the rotary frequencies base^(-2i/d). Any float above 1, such as 5e5."""
    rotary_fraction: float = setting(1.0, gt=0, le=1)
    """Share of each head's dimensions that is rotated; the others carry no position."""
    scaling: Annotated[RopeScaling, Field(discriminator="type")] = setting(NoScaling())
    """Context-extension rule applied to the frequencies, chosen by `type`."""
    bound: Literal["error", "warn", "expect_violation", "off"] = setting("error")
    """What to do when B_m < 0 somewhere within the sequence length: refuse, warn, demand it (the
    experiment's negative arms; refuses a base that is in fact feasible), or do not look."""


class Corpus(Section):
    """One token file of the blend."""

    path: Path = setting()
    """Prefix of PREFIX.bin and PREFIX.idx, as `data-tools tokenize --output` wrote them; relative
    paths are taken from the working directory."""
    weight: float = setting(1.0, gt=0)
    """Share of the training samples drawn from this corpus, relative to the other weights."""


class Data(Section):
    """Which tokens, in which order."""

    corpora: dict[str, Corpus] = setting({})
    """The blend: a name of one's own for each corpus, with its path and weight."""
    validation_fraction: float = setting(0.01, gt=0, lt=1)
    """Share of each corpus' documents (the last ones) kept for validation."""
    tokenizer: Optional[Path] = setting(None)
    """Tokenizer that made the token files; evaluation on raw text and export need it. Unset: the
    one named by the corpora's receipts."""
    cache_dir: Optional[Path] = setting(None)
    """Folder of the sample index; unset: `cache` beside each corpus. Shared by all ranks."""
    num_workers: int = setting(1, ge=0, unit="processes")
    """Loader processes a rank; 0 loads in the training process."""


class Training(Section):
    """How long, how much at once, where to."""

    run_dir: Optional[Path] = setting(None)
    """Run folder; unset: runs/ followed by the config file's name without .yaml."""
    sequence_length: int = setting(gt=0, unit="tokens")
    """Context length of a training sample."""
    global_batch_size: int = setting(gt=0, unit="sequences")
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: int = setting(gt=0, unit="sequences")
    """Sequences of one forward pass on one rank; the rest of the batch is accumulated."""
    steps: Optional[int] = setting(None, gt=0, unit="steps")
    """Optimizer steps of the whole run. Give this or `tokens`."""
    tokens: Optional[int] = setting(None, gt=0, unit="tokens")
    """Token budget; the run takes ceil(tokens / (global_batch_size x sequence_length)) steps."""
    seed: int = setting(1234, ge=0)
    """Seed of weights and of the sample order."""
    recompute: Literal["none", "selective", "full"] = setting("none")
    """Activations computed again in the backward pass: none, those of the attention core, or all
    of a layer. Saves memory, costs time, changes no result."""


class Optimizer(Section):
    """AdamW."""

    lr: float = setting(gt=0)
    """Peak learning rate."""
    weight_decay: float = setting(0.1, ge=0)
    """Decoupled weight decay; norms are not decayed."""
    beta1: float = setting(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = setting(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """Added to the root of the second moment."""
    clip_grad: float = setting(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""


class Schedule(Section):
    """Learning rate over steps."""

    type: Literal["cosine", "linear", "constant", "wsd"] = setting("cosine")
    """Shape after the warm-up: down to min_lr by a half cosine or a line, flat, or flat and then a
    line down over the last decay_steps (warm-up, stable, decay)."""
    warmup_steps: int = setting(0, ge=0, unit="steps")
    """Steps of the linear rise from 0 to optimizer.lr."""
    min_lr: float = setting(0.0, ge=0)
    """Learning rate at the end of the decay."""
    decay_steps: Optional[int] = setting(None, gt=0, unit="steps")
    """Length of the decay; unset: all steps after the warm-up (wsd: a tenth of all steps)."""


class Parallel(Section):
    """How the model and the batch are divided over ranks; the data-parallel size is what is left."""

    world_size: int = setting(1, gt=0, unit="ranks")
    """Ranks that the config is meant for, which `--check` judges. A run takes the number of
    processes that were started."""
    tensor: int = setting(1, gt=0, unit="ranks")
    """Tensor-parallel size: each matrix is split over so many ranks, best within one node."""
    pipeline: int = setting(1, gt=0, unit="stages")
    """Pipeline-parallel size: layers are split over so many stages."""
    sequence: bool = setting(False)
    """Split the activations of norms and residuals along the sequence, over the tensor-parallel
    ranks (Korthikanti et al. 2022)."""
    distributed_optimizer: bool = setting(False)
    """Split the optimizer's state over the data-parallel ranks."""


class Precision(Section):
    """Number formats. RoPE's angles are float64 and its tables float32 in every one."""

    dtype: Literal["fp32", "bf16"] = setting("bf16")
    """Weights and activations; bf16 keeps float32 master weights in the optimizer."""
    grad_reduce: Literal["fp32", "bf16"] = setting("fp32")
    """Accumulation and reduction of gradients; bf16 needs precision.dtype=bf16."""


class Kernels(Section):
    """Which implementation of norm, attention and linear layers."""

    backend: Literal["auto", "transformer_engine", "torch"] = setting("auto")
    """Transformer Engine, or PyTorch's own (SDPA attention); auto takes Transformer Engine on a GPU
    when it is installed. The log says which and why."""


class Checkpoint(Section):
    """When to save, what to keep."""

    interval: int = setting(1000, gt=0, unit="steps")
    """Steps between checkpoints; the last step and a caught signal save as well."""
    keep_last: int = setting(2, gt=0, unit="checkpoints")
    """Newest checkpoints that stay."""
    keep_every: Optional[int] = setting(None, gt=0, unit="steps")
    """A checkpoint whose step is a multiple of this stays for good."""


class Logging(Section):
    """What a run writes about itself."""

    interval: int = setting(10, gt=0, unit="steps")
    """Steps between two log lines and records of metrics.jsonl."""
    tensorboard: bool = setting(False)
    """Also write TensorBoard events into the run folder; needs the `track` extra."""
    peak_tflops: Optional[float] = setting(None, gt=0, unit="TFLOP/s")
    """Peak of one rank's device, which MFU is a share of; unset: known for A100, H100, H200 and
    B200 in bf16, and otherwise MFU is null."""


class Evaluation(Section):
    """Validation while training, and the lengths of `megatron-ext evaluate`."""

    interval: int = setting(1000, gt=0, unit="steps")
    """Steps between two measurements of the validation loss; the last step measures as well."""
    batches: int = setting(8, gt=0, unit="global batches")
    """Global batches of one measurement."""
    lengths: tuple[int, ...] = setting((), unit="tokens")
    """Context lengths at which `megatron-ext evaluate` measures perplexity; empty: powers of two
    from 128 to twice the sequence length."""
    stride: int = setting(256, gt=0, unit="tokens")
    """Step of the sliding window: how many tokens each window scores anew."""
    max_tokens: int = setting(1_000_000, gt=0, unit="tokens")
    """Most tokens of text scored at each length."""


class Faults(Section):
    """What to do when something goes wrong."""

    max_consecutive_skips: int = setting(10, ge=0, unit="steps")
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops;
    0 stops at the first."""
    hang_timeout_s: float = setting(600.0, gt=0, unit="s")
    """Longest wait in a collective operation before the run ends with an error."""


class Config(Section):
    """A whole run, resolved."""

    model: Model
    rope: Rope
    data: Data = Data()
    training: Training
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    kernels: Kernels = Kernels()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    evaluation: Evaluation = Evaluation()
    faults: Faults = Faults()
