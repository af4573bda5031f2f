"""Token files to batches: a weighted blend of .bin/.idx corpora over `megatron.core.datasets`.

    train, validation = build_datasets(config)
    for micro_batch in micro_batches(train, config, layout, first_step=0, last_step=100):
        micro_batch["tokens"]           # [micro_batch_size, sequence_length] int64

The order of samples depends on the seed, the blend and the number of steps, never on the layout:
step n begins where the batches before it end (config/batch_sizes.py). Every rank reads its own
samples from the memory-mapped files, so nothing is broadcast. What is refused: see `corpora.py`.
"""

import json
import mmap
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
import xxhash
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from megatron_ext.config import Config, Data
from megatron_ext.config.batch_sizes import BatchSizes
from megatron_ext.data.corpora import cache_parent, eod_id, fingerprint_of
from megatron_ext.data.positions import per_document
from megatron_ext.data.sample_index import SampleIndex

_AT_ONCE = 2  # corpora whose index is built: time against memory, about 13 bytes a document each


@dataclass(frozen=True)
class _TokenizerFacts:
    """What `megatron.core.datasets` asks of a tokenizer when the text is tokenized already."""

    eod: int = -1  # only looked at for masks, which are made from our own batches
    pad: int = -1  # no id of a token file, so no token is ever taken for padding
    vocab_size: int | None = None  # None: the type of the ids is read from the .idx

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": "tokenized"}


def build_datasets(config: Config) -> tuple[Dataset, Dataset]:
    """The training and the validation samples of the whole run; called by every rank.

    The sample index is built once into a private folder and published by a rename, so neither a
    kill nor another job that builds the same one leaves half an index behind. The folder's name is
    made from the data's fingerprint: token files written anew never meet an old index. Expects
    corpora that `check_corpora` let through.
    """
    parent = cache_parent(config)
    cache = parent / _cache_key(config)
    private = _as_rank_0_says(
        lambda: None if cache.is_dir() else parent / f".{cache.name}.{uuid.uuid4()}"
    )
    if private is not None:
        try:
            _open(config, private, built=False)
        except BaseException:
            if dist.get_rank() == 0:  # who builds it: megabytes of no use on a full disk
                shutil.rmtree(private, ignore_errors=True)
            raise
        dist.barrier()
        if dist.get_rank() == 0:
            _publish(private, cache)
        dist.barrier()
    return _open(config, cache, built=True)


def _cache_key(config: Config) -> str:
    made_from = {
        "data": fingerprint_of(config),
        "validation_batches": config.evaluation.batches,
        "megatron-core": megatron.core.__version__,
    }
    return xxhash.xxh3_64_hexdigest(json.dumps(made_from, sort_keys=True).encode())


def _as_rank_0_says(question: Callable[[], Path | None]) -> Path | None:
    # Nobody else looks: a shared file system may remember for a while that a folder was not there.
    answer = [question() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer)
    return answer[0]


def _publish(private: Path, cache: Path) -> None:
    for file in private.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    try:
        private.rename(cache)
    except OSError:
        if not cache.is_dir():
            raise
        shutil.rmtree(private, ignore_errors=True)  # another job was faster, with the same content


def _open(config: Config, cache: Path, built: bool) -> tuple[Dataset, Dataset]:
    """Map the sample index in `cache`; if it is not `built`, rank 0 does so and the others wait."""
    corpora = list(config.data.corpora.values())
    fraction = config.data.validation_fraction
    batch = config.training.global_batch_size
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
        num_dataset_builder_threads=min(_AT_ONCE, len(corpora)),
    )
    # Spares each rank the numbers of all documents, 4 bytes each, which only building reads. Set
    # here because the constructor refuses it for a blend that is split.
    dataset_config.fast_cache_load = built
    sizes = [
        config.training.batch_sizes.before(config.training.steps),
        config.evaluation.batches * batch,
        0,
    ]
    builder = BlendedMegatronDatasetBuilder(SampleIndex, sizes, lambda: True, dataset_config)
    train, validation, _ = builder.build()
    for blended in (train, validation):
        for part in getattr(blended, "datasets", [blended]):
            # Samples lie anywhere in the file: without this the kernel reads megabytes ahead of
            # each 8 kB (19 times fewer cold samples a second).
            part.dataset.bin_reader._bin_buffer_mmap._mmap.madvise(mmap.MADV_RANDOM)
    return train, validation


@dataclass(frozen=True)
class Layout:
    """This rank's place among the data-parallel ranks."""

    data_parallel_rank: int
    data_parallel_size: int


def micro_batches(
    dataset: Dataset,
    config: Config,
    layout: Layout,
    first_step: int,
    last_step: int,
    sizes: BatchSizes | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of steps first_step .. last_step - 1, in order; `sizes` are those
    of the run's global batches unless others are given.

    Each is a dict of tokens and labels [micro_batch_size, sequence_length] int64 and loss_mask
    float32, with data.mask_documents also document_ids and with data.reset_positions position_ids,
    int64; on the CPU, pinned when there is a GPU.
    """
    workers = config.data.num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=MicroBatchSampler(
            sizes or config.training.batch_sizes,
            config.training.micro_batch_size,
            layout,
            range(first_step, last_step),
        ),
        collate_fn=partial(
            _collate, config.data, eod_id(config) if config.data.told_apart_by else None
        ),
        num_workers=workers,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers > 0 else None,
        # Its own, lest every start and every evaluation advance the run's random numbers.
        generator=torch.Generator(),
    )
    return iter(loader)


def _ignore_stop_signals(worker: int) -> None:
    """A signal to the whole process group is the training process' to answer: were its loader to
    die of it, the last step could not be finished and saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _collate(
    data: Data, eod: int | None, samples: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    batch = {
        name: torch.stack([sample[name] for sample in samples])
        for name in ("tokens", "labels", "loss_mask")
    }
    if eod is not None:
        documents, positions = per_document(batch["tokens"], eod)
        if data.mask_documents:
            batch["document_ids"] = documents
        if data.reset_positions:
            batch["position_ids"] = positions
    return batch


class MicroBatchSampler:
    """Sample numbers of this rank, a list for each micro-batch; sized, as DataLoader wants it."""

    def __init__(self, batches: BatchSizes, micro_batch: int, layout: Layout, steps: range) -> None:
        self.batches = batches
        self.size = micro_batch
        self.layout = layout
        self.steps = steps

    def __len__(self) -> int:
        samples = self.batches.before(self.steps.stop) - self.batches.before(self.steps.start)
        return samples // (self.size * self.layout.data_parallel_size)

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.size * self.layout.data_parallel_size
        mine = self.size * self.layout.data_parallel_rank
        for step in self.steps:
            begin, end = self.batches.before(step), self.batches.before(step + 1)
            for start in range(begin + mine, end, stride):
                yield list(range(start, start + self.size))
