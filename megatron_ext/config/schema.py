"""Every setting, typed and documented: the sections of a config file.

    from megatron_ext.config import load_config
    config = load_config("configs/models/llama_2b.yaml", ["rope.base=5e5"])
    config.model.num_layers, config.rope.base, config.training.global_batch_size

A field's docstring is its help: meaning, consequence, allowed values. It is printed by
`megatron-ext schema`, stands in docs/config.md, and a test refuses a field that no code reads.
Values that follow from others (head_dim, steps from tokens) are plain numbers once validated.
Rules that join several fields live in `rules.py`; reading files and messages in `files.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_ext.config.batch_sizes import BatchSizes
from megatron_ext.rope.frequencies import NoScaling, RopeScaling


def setting(
    default: Any = ...,
    *,
    unit: str = "",
    example: Any = None,
    unset: str = "",
    derive: Callable[[dict[str, Any]], Any] | None = None,
    **constraints: Any,
) -> Any:
    """A field: its default, its unit and pydantic's constraints (`gt=0`, `le=1`).

    example: shown when a required field is missing. unset: in words, what an unset field becomes.
    derive: gives that value from the section's fields above this one.
    """
    extra = {key: text for key, text in (("unit", unit), ("unset", unset)) if text}
    examples = None if example is None else [example]
    kwargs: dict[str, Any] = {"json_schema_extra": extra, "examples": examples, **constraints}
    if derive is not None:
        return Field(default_factory=derive, **kwargs)
    return Field(default, **kwargs)


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
    """The Llama: pre-norm, RMSNorm, SwiGLU, rotary positions, no biases but those of qkv_bias."""

    num_layers: int = setting(gt=0, unit="layers", example=32)
    """Transformer layers."""
    hidden_size: int = setting(gt=0, unit="dimensions", example=2048)
    """Width of the residual stream."""
    ffn_hidden_size: int = setting(gt=0, unit="dimensions", example=5504)
    """Inner width of SwiGLU; its three matrices are hidden_size x ffn_hidden_size each."""
    num_heads: int = setting(gt=0, unit="heads", example=16)
    """Query heads."""
    num_kv_heads: int = setting(
        gt=0, unit="heads", unset="num_heads", derive=lambda model: model["num_heads"]
    )
    """Key and value heads (grouped-query attention); a divisor of num_heads."""
    head_dim: int = setting(
        gt=0,
        unit="dimensions",
        unset="hidden_size / num_heads",
        derive=lambda model: max(1, model["hidden_size"] // model["num_heads"]),
    )
    """Size of one head, an even number. The RoPE bound depends on it."""
    vocab_size: int = setting(gt=0, unit="tokens", example=32000)
    """Rows of the embedding; at least the tokenizer's size and divisible by parallel.tensor."""
    tied_embeddings: bool = setting(False)
    """Share the input embedding with the output projection."""
    qkv_bias: bool = setting(False)
    """Biases on the projections to queries, keys and values, as in Qwen2; drawn as zeros."""
    norm_eps: float = setting(1e-6, gt=0)
    """Epsilon inside RMSNorm's square root."""
    init_std: float = setting(0.02, gt=0)
    """Standard deviation of initial weights; projections into the residual stream use
    init_std / sqrt(2 num_layers)."""


class Rope(Section):
    """Rotary positions, the subject of the experiment."""

    base: float = setting(gt=1, example=500000.0)
    """Base (theta) of the rotary frequencies base^(-2i/d). Any float above 1, such as 5e5."""
    rotary_fraction: float = setting(1.0, gt=0, le=1)
    """Share of each head's dimensions that is rotated; the others carry no position."""
    scaling: Annotated[RopeScaling, Field(discriminator="type")] = setting(NoScaling())
    """Context-extension rule applied to the frequencies, chosen by `type`. A file that changes the
    type starts afresh: the parameters of the other rule are not inherited."""
    bound: Literal["error", "warn", "expect_violation", "off"] = setting("error")
    """What to do when B_m < 0 somewhere within the sequence length: refuse, warn, demand it (the
    experiment's negative arms; refuses a base that is in fact feasible), or do not look."""


class Corpus(Section):
    """One token file of the blend."""

    path: Path = setting(example="data/books_text_document")
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
    tokenizer: Path | None = setting(None)
    """Tokenizer that made the token files; evaluation on raw text and export need it. Unset: the
    one named by the corpora's receipts."""
    cache_dir: Path | None = setting(None)
    """Folder of the sample index; unset: `cache` beside the first corpus. Shared by all ranks."""
    mask_documents: bool = setting(False)
    """Keep attention within each document of a sample; needs the torch kernels and token files
    written with an end-of-document id."""
    reset_positions: bool = setting(False)
    """Restart positions at 0 in each document of a sample; needs the torch backend, an
    end-of-document id, and a RoPE rule that goes by distance alone. So with masks it changes
    nothing but rounding, and without them tokens of other documents are met at distances that are
    wrong, even negative."""
    num_workers: int = setting(1, ge=0, unit="processes")
    """Loader processes a rank; 0 loads in the training process."""

    @property
    def told_apart_by(self) -> str:
        """The setting that has the documents of a sample told apart, "" if none has."""
        wanted = ("mask_documents", "reset_positions")
        return next((f"data.{name}=true" for name in wanted if getattr(self, name)), "")


class Training(Section):
    """How long, how much at once, where to."""

    run_dir: Path = setting(
        Path("runs/unnamed"), unset="runs/ and the config file's name without .yaml"
    )
    """Folder of the run: resolved config, metrics, checkpoints, evaluation."""
    init_from: Path | None = setting(None)
    """Run folder or checkpoint whose weights a new run starts from; its optimizer state and step
    are left behind. Unset: random weights."""
    sequence_length: int = setting(gt=0, unit="tokens", example=4096)
    """Context length of a training sample."""
    global_batch_size: int = setting(gt=0, unit="sequences", example=1024)
    """Sequences of one optimizer step, over all ranks."""
    rampup_batch_size: tuple[Annotated[int, Field(gt=0)], ...] = setting(())
    """Let the batch grow at the start of the run: [start, increment, samples]. It begins with
    `start` sequences and grows by `increment` in equal shares of the first `samples` sequences, as
    in Megatron-LM. Empty: full from the first step."""
    micro_batch_size: int = setting(gt=0, unit="sequences", example=1)
    """Sequences of one forward pass on one rank; the rest of the batch is accumulated."""
    steps: int = setting(
        gt=0,
        unit="steps",
        unset="the fewest that read `tokens`",
        example=1000,
    )
    """Optimizer steps of the whole run. Give this or `tokens`: a file that sets one of the two
    replaces both of its base."""
    tokens: int = setting(
        gt=0,
        unit="tokens",
        unset="those of all steps",
        example=10**9,
    )
    """Token budget of the whole run. Give this or `steps`."""
    exit_duration_in_mins: float | None = setting(None, gt=0, unit="minutes")
    """Stop as if by a signal, with a checkpoint, once this start of the run is so old; the same
    command goes on. Unset: only steps and tokens end the run."""
    seed: int = setting(1234, ge=0)
    """Seed of weights and of the sample order."""
    recompute: Literal["none", "selective", "full"] = setting("none")
    """Activations computed again in the backward pass: none; selective, those within the MLP, half
    of what a layer keeps; full, all of a layer. The 2B model takes 17% and 29% more FLOPs. Changes
    no result."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one full global batch."""
        return self.global_batch_size * self.sequence_length

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of each step."""
        return BatchSizes(self.global_batch_size, self.rampup_batch_size)

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` steps read."""
        return self.batch_sizes.before(steps) * self.sequence_length

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, given: Any) -> Any:
        """Tokens from steps or steps from tokens; both given must agree."""
        if not isinstance(given, dict):
            return given
        steps, tokens = given.get("steps"), given.get("tokens")
        factors = (given.get("global_batch_size"), given.get("sequence_length"))
        known = [v for v in (steps, tokens, *factors) if v is not None]
        if None in factors or not all(type(v) is int and v > 0 for v in known):
            return given  # the fields themselves say what is wrong
        rampup = given.get("rampup_batch_size", ())
        if not isinstance(rampup, (list, tuple)) or not all(type(v) is int for v in rampup):
            return given
        batch_size, length = given["global_batch_size"], given["sequence_length"]
        sizes = BatchSizes(batch_size, tuple(rampup))
        if (
            "rampup_batch_size" in given
        ):  # a file has lists, and what this returns is no longer taken for a file
            given = {**given, "rampup_batch_size": tuple(rampup)}
        if steps is not None and tokens is None:
            return {**given, "tokens": sizes.before(steps) * length}
        if tokens is None:
            return given
        needed = sizes.steps_for(-(-tokens // length))
        if steps is not None and steps != needed:
            raise ValueError(
                f"steps={steps} and tokens={tokens:,} disagree, as {tokens:,} tokens are {needed} "
                f"steps of {batch_size} x {length} tokens: give only one of them"
            )
        return {**given, "steps": needed}


class Optimizer(Section):
    """AdamW."""

    lr: float = setting(gt=0, example=3e-4)
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
    decay_steps: int = setting(
        0, ge=0, unit="steps", unset="all steps after the warm-up; wsd: a tenth of all steps"
    )
    """Length of the decay. Cosine and linear stay at min_lr after it; constant has none."""


class Parallel(Section):
    """How model and batch are divided over ranks; the data-parallel size is what is left."""

    tensor: int = setting(1, gt=0, unit="ranks")
    """Tensor-parallel size: each matrix is split over so many ranks, best within one node."""
    pipeline: int = setting(1, gt=0, unit="stages")
    """Pipeline-parallel size: layers are split over so many stages."""
    virtual_pipeline: int = setting(1, gt=0, unit="chunks")
    """Model chunks a stage (interleaved 1F1B, Narayanan et al. 2021, section 2.2): a smaller bubble
    for more messages. A step's micro-batches must be a multiple of parallel.pipeline."""
    first_stage_layers: int | None = setting(None, gt=0, unit="layers")
    """Layers of the first stage, which also has the embedding; unset: an even share."""
    last_stage_layers: int | None = setting(None, gt=0, unit="layers")
    """Layers of the last stage, which also has the output projection; unset: an even share. Stages
    whose number is not said share the other layers evenly."""
    context: int = setting(1, gt=0, unit="ranks")
    """Context-parallel size: each sequence is split over so many ranks, two mirrored chunks each so
    that the causal mask gives all the same work; keys and values are gathered in every layer."""
    world_size: int = setting(
        gt=0,
        unit="ranks",
        unset="tensor x pipeline x context",
        derive=lambda parallel: parallel["tensor"] * parallel["pipeline"] * parallel["context"],
    )
    """Ranks that the config is meant for, which `--check` judges. A run takes the number of
    processes that were started."""
    sequence: bool = setting(False)
    """Split the activations of norms and residuals along the sequence, over the tensor-parallel
    ranks (Korthikanti et al. 2022)."""
    distributed_optimizer: bool = setting(False)
    """Split the optimizer's state over the data- and context-parallel ranks."""
    overlap_grad_reduce: bool | None = setting(None, unset="true on GPUs, false on a CPU")
    """Reduce the gradients of one bucket of weights while the backward pass computes the next."""
    overlap_param_gather: bool | None = setting(
        None, unset="overlap_grad_reduce with distributed_optimizer, else false"
    )
    """Gather the weights that other ranks updated during the next forward pass, bucket by bucket,
    not before it; needs distributed_optimizer and overlap_grad_reduce."""
    bucket_size: int | None = setting(
        None, gt=0, unit="parameters", unset="40 million, or 1 million a data-parallel rank if more"
    )
    """Weights of one bucket. Smaller ones begin earlier, larger ones use the network better."""
    overlap_p2p_comm: bool | None = setting(None, unset="true with virtual_pipeline, else false")
    """Send and receive what pipeline stages exchange while the next chunk computes; needs
    virtual_pipeline. Each chunk's output then stays until its backward pass, 2 hidden_size bytes a
    token in 16 bits."""
    tensor_overlap: bool = setting(False)
    """Overlap the communication of tensor parallelism with the matrix products; needs
    parallel.sequence and Transformer Engine, and before Hopper UB_SKIPMC=1 in the environment."""

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one sequence together: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage, all its chunks together; what does not come out evenly is
        refused by `rules.py` and rounded down here."""
        layers = [self.first_stage_layers, *[None] * (self.pipeline - 2), self.last_stage_layers]
        if self.pipeline == 1:
            return [num_layers]
        said = [number for number in layers if number is not None]
        share = (num_layers - sum(said)) // max(1, self.pipeline - len(said))
        return [share if number is None else number for number in layers]


class Precision(Section):
    """Number formats. RoPE's angles are float64 and its tables float32 in every one."""

    dtype: Literal["fp32", "bf16", "fp16"] = setting("bf16")
    """Weights and activations; bf16 and fp16 keep float32 master weights in the optimizer. fp16
    scales the loss, lest gradients vanish."""
    grad_reduce: Literal["fp32", "bf16"] = setting("fp32")
    """Accumulation and reduction of gradients; bf16 needs precision.dtype=bf16."""
    loss_scale: float = setting(4096.0, ge=1)
    """fp16: factor of the loss at the start. From the second overflow of a gradient on each halves
    it, down to 1. Losses are summed over tokens here, not averaged, so it is smaller than
    elsewhere."""
    loss_scale_window: int = setting(1000, gt=0, unit="steps")
    """fp16: so many steps in a row without an overflow double the factor."""
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8"] = setting("none")
    """Matrix products of the layers in 8 bits, by the scaling named: one factor a tensor (Hopper
    and later), a block of 128 (Hopper), or 32 numbers (Blackwell). Needs Transformer Engine and
    precision.dtype=bf16; weights and checkpoints stay bf16."""


class Kernels(Section):
    """Which implementation computes what. `auto` takes the fastest that works on this machine with
    what can be imported; the log and `megatron-ext doctor` say which and why. A choice of one's own
    that cannot be had is refused. How to install them: docs/install-gpu.md."""

    backend: Literal["auto", "transformer_engine", "torch"] = setting("auto")
    """Norms and linear layers: Transformer Engine's, or Megatron-Core's with PyTorch's norm. fp32
    takes the latter: Transformer Engine would multiply in TF32."""
    attention: Literal["auto", "transformer_engine", "flash_attn", "cudnn", "flash", "sdpa"] = (
        setting("auto")
    )
    """Attention core: Transformer Engine's; the package flash-attn's; PyTorch's SDPA with cuDNN's
    or the flash kernel and no other; or SDPA as it chooses itself, on Hopper and later cuDNN's
    first. auto takes Transformer Engine's where the backend is that and numbers have 16 bits, else
    sdpa."""
    optimizer: Literal["auto", "transformer_engine", "apex", "torch"] = setting("auto")
    """Fused AdamW of Transformer Engine, apex or PyTorch."""
    fusions: Literal["auto", "compiled", "none"] = setting("auto")
    """Rotation, SwiGLU, residual addition and each pass over the logits as one kernel, made by
    torch.compile on a GPU (Transformer Engine's rotation where it can)."""
    grad_accumulation: Literal["auto", "apex", "torch", "none"] = setting("auto")
    """Add a weight's gradient to the sum of the micro-batches within its matrix product, by apex's
    extension or PyTorch's addmm. Layers of Transformer Engine do it themselves with either."""
    cross_entropy: Literal["auto", "chunked", "whole"] = setting("auto")
    """chunked makes the logits of 1,024 tokens at a time (4,096 with compiled fusions), twice: 4%
    more FLOPs for the 2B model. whole holds those of a micro-batch, which take 2 bytes each in bf16
    with compiled fusions, else 6 (2, and 4 for float32 ones). auto takes chunks from 2^30 on."""


class Checkpoint(Section):
    """When to save, what to keep."""

    interval: int = setting(1000, gt=0, unit="steps")
    """Steps between checkpoints; the last step and a caught signal save as well."""
    keep_last: int = setting(2, gt=0, unit="checkpoints")
    """Newest checkpoints that stay."""
    keep_every: int | None = setting(None, gt=0, unit="steps")
    """A checkpoint whose step is a multiple of this stays for good."""
    async_save: bool = setting(True)
    """Copy the state to host memory and write it while training goes on; false waits until it is
    written. The losses are the same."""
    on_damage: Literal["fall_back", "refuse"] = setting("fall_back")
    """When a file of the newest checkpoint is damaged: go on from the next older one that verifies,
    or end with an error that names the file."""
    on_data_change: Literal["refuse", "allow"] = setting("refuse")
    """When files, weights, seed, batch size or number of steps, from which the order of samples is
    made, are not those of the checkpoint: refuse with their differences, or warn and go on."""


class Logging(Section):
    """What a run writes about itself."""

    interval: int = setting(10, gt=0, unit="steps")
    """Steps between two log lines and records of metrics.jsonl."""
    tensorboard: bool = setting(False)
    """Also write TensorBoard events into the run folder; needs the `track` extra."""
    wandb: str | None = setting(None)
    """Project of Weights & Biases to write into as well; needs the `track` extra. Without a key, or
    with WANDB_MODE=offline, into the run folder only."""
    peak_tflops: float | None = setting(None, gt=0, unit="TFLOP/s")
    """Peak of one rank's device, which MFU is a share of; unset: known for A100, H100, H200 and
    B200 in bf16, measured on a CPU, and otherwise MFU is null."""


TaskName = Literal[
    "perplexity", "passkey", "lines", "needle", "first_sentence",
    "ruler_niah_single_1", "ruler_niah_single_2", "ruler_niah_single_3",
    "ruler_niah_multikey_1", "ruler_niah_multikey_2", "ruler_niah_multikey_3",
    "ruler_niah_multivalue", "ruler_niah_multiquery", "ruler_variable_tracking",
    "ruler_common_words", "ruler_frequent_words",
]  # fmt: skip


class Evaluation(Section):
    """Validation and tasks while training, and what `megatron-ext evaluate` takes unless told."""

    interval: int = setting(1000, gt=0, unit="steps")
    """Steps between two measurements of the validation loss; the last step measures as well."""
    batches: int = setting(8, gt=0, unit="global batches")
    """Global batches of one measurement."""
    tasks: tuple[TaskName, ...] = setting(())
    """What else to measure while training, with the settings below, into
    RUN/evaluation/in_training: perplexity and retrieval tasks as `megatron-ext evaluate` knows
    them."""
    tasks_interval: int = setting(10000, gt=0, unit="steps")
    """Steps between two measurements of the tasks; the last step measures as well."""
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = setting(
        (), unit="tokens", unset="powers of two from 128 to twice training.sequence_length"
    )
    """Context lengths at which tasks are measured."""
    stride: int = setting(256, gt=0, unit="tokens")
    """Step of the sliding window: how many tokens each window scores anew."""
    max_tokens: int = setting(1_000_000, gt=0, unit="tokens")
    """Most tokens of text scored at each length."""
    depths: int = setting(11, gt=0, unit="points")
    """Retrieval: places of the fact in the context, evenly from 0 to 100%."""
    samples: int = setting(10, gt=0, unit="prompts")
    """Retrieval: prompts at each length and depth."""
    seed: int = setting(1, ge=0)
    """Retrieval: seed of the prompts. The same seed and tokenizer give the same prompts to every
    model."""


class Faults(Section):
    """What to do when something goes wrong."""

    max_consecutive_skips: int = setting(10, ge=0, unit="steps")
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops;
    0 stops at the first."""
    spike_sigma: float | None = setting(None, gt=0, unit="standard deviations")
    """A loss so far above the mean of the last losses is a spike; unset: none is."""
    spike_window: int = setting(100, gt=1, unit="steps")
    """Losses that a spike is measured against; no spike is seen before there are so many."""
    spike_action: Literal["warn", "skip", "roll_back"] = setting("warn")
    """What to do with a spike: say so; leave the weights as they were; or take those of the newest
    checkpoint and go on behind the spike. The last two count as skipped steps."""
    hang_timeout_s: float = setting(600.0, gt=0, unit="s")
    """A rank without progress for so long in training (a micro-batch, a batch of the validation, a
    save) has hung: the watchdog names the late ranks, dumps stacks and kills the run, so that it
    can be started again. Longer than the slowest save. Collectives fail a minute later."""
    startup_timeout_s: float = setting(3600.0, gt=0, unit="s")
    """The same before the first step, where one rank may build the sample index or verify a
    checkpoint for long while the others wait."""


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

    def resolved(self) -> "Config":
        """The same settings with what one section takes from another written out."""
        schedule, training = self.schedule, self.training
        lengths = self.evaluation.lengths or powers_of_two(128, 2 * training.sequence_length)
        decay = schedule.decay_steps
        if not decay and schedule.type == "wsd":
            decay = max(1, training.steps // 10)
        elif not decay and schedule.type != "constant":
            decay = max(1, training.steps - schedule.warmup_steps)
        return self.model_copy(
            update={
                "schedule": schedule.model_copy(update={"decay_steps": decay}),
                "evaluation": self.evaluation.model_copy(update={"lengths": lengths}),
            }
        )


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """Those in low .. high; high alone when there is none."""
    powers = tuple(2**k for k in range(high.bit_length()) if low <= 2**k <= high)
    return powers or (high,)
