"""Token files to batches: a weighted blend of .bin/.idx corpora over `megatron.core.datasets`.

    train, validation = build_datasets(config)
    for micro_batch in micro_batches(train, config, layout, first_step=0, last_step=100):
        micro_batch["tokens"]           # [micro_batch_size, sequence_length] int64

The order of samples depends on the seed, the blend and the number of steps, never on the layout:
step n holds samples n * global_batch_size and following. Every rank reads its own samples from the
memory-mapped files, so nothing is broadcast. What is refused: see `corpora.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from megatron_ext.config import Config
from megatron_ext.data.corpora import check_corpora


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
    Raises UserError when a corpus cannot serve.
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
    return train, validation


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
        batch_sampler=MicroBatchSampler(config, layout, first_step, last_step),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers > 0 else None,
    )
    return iter(loader)


class MicroBatchSampler:
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
