"""Token files to batches: a weighted blend of .bin/.idx corpora over `megatron.core.datasets`.

    train, validation = build_datasets(config)
    for micro_batch in micro_batches(train, config, layout, first_step=0, last_step=100):
        micro_batch["tokens"]           # [micro_batch_size, sequence_length] int64

The order of samples depends on the seed, the blend and the number of steps, never on the layout:
step n holds samples n * global_batch_size and following. Every rank reads its own samples from the
memory-mapped files, so nothing is broadcast. Refuses missing files, a corpus too small for one
sample, and tokens beyond the model's vocabulary.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from megatron_ext.config import Config
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class _TokenizerFacts:
    """What `megatron.core.datasets` asks of a tokenizer when the text is tokenized already."""

    eod: int = -1  # only looked at when documents are masked apart
    pad: int = -1  # no id of a token file, so no token is ever taken for padding
    vocab_size: int | None = None  # None: the type of the ids is read from the .idx

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": "tokenized"}


def build_datasets(config: Config) -> tuple[Dataset, Dataset]:
    """The training and the validation samples of the whole run; called by every rank.

    Rank 0 builds the sample index into the cache folder, the others then map it.
    Raises UserError when a corpus is missing or holds too few documents.
    """
    corpora = list(config.data.corpora.values())
    check_corpora(config)
    samples = config.training.steps * config.training.global_batch_size
    validation_samples = config.evaluation.batches * config.training.global_batch_size
    cache = config.data.cache_dir or corpora[0].path.parent / "cache"
    fraction = config.data.validation_fraction
    dataset_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=config.training.sequence_length,
        blend=([str(c.path) for c in corpora], [c.weight for c in corpora]),
        split=f"{1 - fraction},{fraction},0",
        path_to_cache=str(cache),
        tokenizer=_TokenizerFacts(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [samples, validation_samples, 0], lambda: True, dataset_config
    )
    train, validation, _ = builder.build()
    for name, dataset in (("training", train), ("validation", validation)):
        if dataset is None or len(dataset) == 0:
            raise UserError(
                f"the corpora give no {name} sample of {config.training.sequence_length} tokens: "
                "add documents, or change data.validation_fraction or training.sequence_length"
            )
    return train, validation


def check_corpora(config: Config) -> None:
    """Raise UserError when a token file is missing or was made for a larger vocabulary."""
    if not config.data.corpora:
        raise UserError(
            "data.corpora is empty: name a token file, such as data.corpora.books.path=PREFIX"
        )
    for name, corpus in config.data.corpora.items():
        for suffix in (".bin", ".idx"):
            file = Path(f"{corpus.path}{suffix}")
            if not file.is_file():
                raise UserError(
                    f"data.corpora.{name}.path={corpus.path}: {file} does not exist; "
                    f"write it with data-tools tokenize ... --output {corpus.path}"
                )
        vocab_size = _receipt(corpus.path).get("tokenizer", {}).get("vocab_size", 0)
        if vocab_size > config.model.vocab_size:
            raise UserError(
                f"data.corpora.{name} was tokenized with {vocab_size} ids, more than "
                f"model.vocab_size={config.model.vocab_size}: raise it to at least {vocab_size}"
            )


def fingerprint(config: Config) -> dict[str, Any]:
    """What the sample order is made from; equal fingerprints mean the same tokens in the same
    order. Kept in the run folder and in every checkpoint."""
    corpora = {}
    for name, corpus in config.data.corpora.items():
        index = Path(f"{corpus.path}.idx")
        corpora[name] = {
            "path": str(corpus.path),
            "weight": corpus.weight,
            "bin_bytes": Path(f"{corpus.path}.bin").stat().st_size,
            "idx_bytes": index.stat().st_size,
            "idx_xxh3": _checksum(index),
            "tokenizer": _receipt(corpus.path).get("tokenizer", {}).get("hash"),
        }
    return {
        "corpora": corpora,
        "validation_fraction": config.data.validation_fraction,
        "sequence_length": config.training.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        "samples": config.training.steps * config.training.global_batch_size,
        "seed": config.training.seed,
    }


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError, naming the first difference, when a checkpoint was made on other data or in
    another order; token files may have moved."""
    for key in now:
        before, after = _without_paths(saved.get(key)), _without_paths(now[key])
        if before != after:
            raise UserError(
                f"the checkpoint was trained with {key}={before} but this run has {after}: restore "
                "the old data and settings, or start a new run with another training.run_dir"
            )


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_paths(item) for name, item in value.items() if name != "path"}


def tokenizer_path(config: Config) -> Path:
    """The tokenizer of the corpora: data.tokenizer, else the one that the first receipt names.

    Raises UserError when neither says.
    """
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    for corpus in config.data.corpora.values():
        path = _receipt(corpus.path).get("tokenizer", {}).get("path")
        if path:
            return Path(path)
    raise UserError("no receipt beside the corpora names their tokenizer: set data.tokenizer=PATH")


@dataclass(frozen=True)
class Layout:
    """This rank's place among the data-parallel ranks."""

    data_parallel_rank: int
    data_parallel_size: int


def micro_batches(
    dataset: Dataset, config: Config, layout: Layout, first_step: int, last_step: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of steps first_step .. last_step - 1, in order.

    Each is a dict of tokens, labels, position_ids [micro_batch_size, sequence_length] int64 and
    loss_mask float32, on the CPU (pinned when there is a GPU).
    """
    workers = config.data.num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=_indices(config, layout, first_step, last_step),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers > 0 else None,
    )
    return iter(loader)


class _indices:
    """Sample numbers of this rank, a list for each micro-batch; sized, as DataLoader wants it."""

    def __init__(self, config: Config, layout: Layout, first_step: int, last_step: int) -> None:
        self.batch = config.training.global_batch_size
        self.size = config.training.micro_batch_size
        self.layout = layout
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps) * self.batch // (self.size * self.layout.data_parallel_size)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.size * self.layout.data_parallel_size
        mine = self.size * self.layout.data_parallel_rank
        for step in self.steps:
            for start in range(step * self.batch + mine, (step + 1) * self.batch, stride):
                yield list(range(start, start + self.size))


def _receipt(prefix: Path) -> dict[str, Any]:
    file = Path(f"{prefix}.receipt.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
