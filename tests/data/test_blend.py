"""Which samples reach which rank, and what is refused before training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.config import Config, load_config
from megatron_ext.data import blend
from megatron_ext.data.corpora import eod_id


def config_with(config: Config, **training: object) -> Config:
    section = config.training.model_copy(update=training)
    return config.model_copy(update={"training": section})


def sampler(config: Config, layout: blend.Layout, first: int, last: int) -> blend.MicroBatchSampler:
    training = config.training
    return blend.MicroBatchSampler(
        training.batch_sizes, training.micro_batch_size, layout, range(first, last)
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_together_read_each_global_batch_once(
    ranks: int, micro_batch_size: int, config_file: Path
) -> None:
    config = config_with(load_config(config_file), micro_batch_size=micro_batch_size)
    for step in (0, 3):
        read = []
        for rank in range(ranks):
            layout = blend.Layout(rank, ranks)
            lists = list(sampler(config, layout, step, step + 1))
            assert len(lists) == len(sampler(config, layout, step, step + 1))
            assert all(len(numbers) == micro_batch_size for numbers in lists)
            read += [number for numbers in lists for number in numbers]
        assert sorted(read) == list(range(step * 8, step * 8 + 8))


def test_resumed_reading_continues_the_same_order(config_file: Path) -> None:
    config = load_config(config_file)
    layout = blend.Layout(1, 2)
    whole = list(sampler(config, layout, 0, 6))
    parts = [
        *sampler(config, layout, 0, 4),
        *sampler(config, layout, 4, 6),
    ]
    assert parts == whole


def test_a_growing_batch_leaves_no_sample_out(config_file: Path) -> None:
    config = load_config(config_file, ["training.rampup_batch_size=[2,2,20]"])
    ranks = [list(sampler(config, blend.Layout(rank, 2), 0, 12)) for rank in (0, 1)]
    read = [number for pair in zip(*ranks, strict=True) for numbers in pair for number in numbers]
    assert read == list(range(config.training.batch_sizes.before(12)))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_documents_are_told_apart_as_asked(mask: bool, reset: bool, config_file: Path) -> None:
    config = load_config(
        config_file,
        [f"data.mask_documents={mask}", f"data.reset_positions={reset}", "data.num_workers=0"],
    )
    eod = eod_id(config)
    row = torch.tensor([7, eod, 7, 7, eod, 7, 7, 7])
    sample = {"tokens": row, "labels": row, "loss_mask": torch.ones(8)}
    samples = [sample] * config.training.global_batch_size
    batch = next(blend.micro_batches(samples, config, blend.Layout(0, 1), 0, 1))  # type: ignore[arg-type]
    given = {
        name: batch[name][0].tolist() for name in ("document_ids", "position_ids") if name in batch
    }
    documents = {"document_ids": [0, 0, 1, 1, 1, 2, 2, 2]} if mask else {}
    positions = {"position_ids": [0, 1, 0, 1, 2, 0, 1, 2]} if reset else {}
    assert given == documents | positions


def test_samples_are_the_tokens_of_the_files(config_file: Path, corpus: Path) -> None:
    """Every sample, shifted by one, stands somewhere in the .bin as it was written."""
    from tests.model.conftest import single_process

    config = load_config(config_file)
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16)
    with single_process(config):
        train, validation = blend.build_datasets(config)
        for dataset in (train, validation):
            for number in (0, 1, len(dataset) - 1):
                sample = dataset[number]
                inputs, labels = sample["tokens"].numpy(), sample["labels"].numpy()
                assert (inputs[1:] == labels[:-1]).all()
                # Documents are shuffled, so compare the piece before the first document's end.
                piece = np.concatenate([inputs, labels[-1:]])
                ends = np.flatnonzero(piece == eod_of(corpus))
                piece = piece[: ends[0] + 1] if len(ends) and ends[0] > 8 else piece[-8:]
                windows = np.lib.stride_tricks.sliding_window_view(tokens, len(piece))
                assert (windows == piece).all(axis=1).any()
                assert sample["loss_mask"].all()


def eod_of(corpus: Path) -> int:
    return json.loads(Path(f"{corpus}.receipt.json").read_text())["tokenizer"]["eod_id"]
