"""The three indices against Megatron-Core's own, whose shuffle alone is another."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from data_tools.indexed import write_index
from megatron_ext.data import sample_index
from megatron_ext.data.blend import _TokenizerFacts
from megatron_ext.data.sample_index import SampleIndex, _beginnings, _shuffled

LENGTH = 16


@pytest.fixture(params=[1 << 20, 7, 1], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones take the way of large indices: buckets, threads and many pieces."""
    monkeypatch.setattr(sample_index, "_CHUNK", request.param)
    monkeypatch.setattr(sample_index, "_BUCKETS", 4)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(1, 50))
def test_beginnings_are_megatron_cores(sizes: list[int], length: int) -> None:
    lengths = np.array(sizes, dtype=np.int32)
    documents = np.random.default_rng(0).permutation(len(sizes)).astype(np.int32)
    tokens = int(lengths.sum())
    if tokens <= length:
        return
    theirs = helpers.build_sample_idx(lengths, documents, length, 1, tokens, True, True)
    ours = _beginnings(documents, lengths, (tokens - 1) // length, length)
    assert ours.dtype == theirs.dtype
    if lengths[documents[0]] == 0:  # it begins there, and ours at the first token
        theirs[0] = np.flatnonzero(lengths[documents])[0], 0
    assert ours.tolist() == theirs.tolist()


def shuffled(parts: list[int], seed: int, modulus: int) -> np.ndarray:
    return _shuffled(parts, np.dtype(np.int32), np.random.SeedSequence(seed).spawn(2), modulus)


def test_each_part_holds_its_own_numbers() -> None:
    assert sorted(shuffled([1000], 0, 1000)) == list(range(1000))
    both = shuffled([2000, 1000], 0, 1000)
    assert sorted(both[:2000]) == sorted([*range(1000)] * 2)
    assert sorted(both[2000:]) == list(range(1000))
    assert both[2000:].tolist() != list(range(1000))
    apart = shuffled([20, 10], 0, 30)
    assert sorted(apart[20:]) == list(range(20, 30))


def test_the_order_is_the_seeds_and_not_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for threads in (1, 2, 8):
        monkeypatch.setattr(sample_index, "available_cores", lambda threads=threads: threads)
        orders.append(shuffled([500], 1, 500).tolist())
    assert orders[0] == orders[1] == orders[2]
    assert shuffled([500], 2, 500).tolist() != orders[0]


def test_every_number_is_as_likely_in_every_place() -> None:
    size, rounds = 8, 1500
    seen = np.zeros((size, size))
    following = np.zeros((size, size))
    for seed in range(rounds):
        order = shuffled([size], seed, size)
        seen[np.arange(size), order] += 1
        for left, right in pairwise(order):
            following[left, right] += 1
    # Chi-squared with 7 x 7 and, of the 56 pairs, 55 degrees of freedom; 110 is beyond 1 in 10^5.
    assert ((seen - rounds / size) ** 2 / (rounds / size)).sum() < 110
    expected = rounds * (size - 1) / (size * (size - 1))
    off_diagonal = following[~np.eye(size, dtype=bool)]
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 120


@pytest.mark.parametrize("share", [0.4, 1.0, 1.3, 1.79, 1.9, 3.5, None])
@pytest.mark.parametrize("split", [Split.train, Split.valid])
def test_all_but_the_order_is_megatron_cores(
    share: float | None, split: Split, tmp_path: Path
) -> None:
    lengths = np.random.default_rng(3).integers(1, 60, 300).astype(np.int32)
    with open(tmp_path / "x.idx", "wb") as stream:
        write_index(stream, np.uint16, lengths)
    tokens = np.random.default_rng(4).integers(0, 500, lengths.sum(), dtype=np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    indices = np.arange(250, dtype=np.int32) if split is Split.train else np.arange(250, 300)
    per_epoch = int(lengths[indices].sum())
    samples = None if share is None else int(share * per_epoch) // LENGTH
    made = []
    for kind in (GPTDataset, SampleIndex):
        config = GPTDatasetConfig(
            random_seed=5,
            sequence_length=LENGTH,
            blend=([str(tmp_path / "x")], None),
            split="250,50,0",
            path_to_cache=str(tmp_path / kind.__name__),
            tokenizer=_TokenizerFacts(),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        data = IndexedDataset(str(tmp_path / "x"), mmap=True)
        made.append(
            kind(data, str(tmp_path / "x"), indices.astype(np.int32), samples, split, config)
        )
    theirs, ours = made
    assert len(ours) == len(theirs)
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        assert getattr(ours, name).shape == getattr(theirs, name).shape
    # The last epoch is kept apart, or not, as there.
    earlier = len(ours.document_index) - len(indices)
    begin = (earlier // len(indices) * per_epoch - 1) // LENGTH
    if earlier:
        apart = [
            (
                len(set(np.bincount(one.document_index[:earlier], minlength=300)[indices])) == 1,
                max(one.shuffle_index[:begin]) < begin,
            )
            for one in made
        ]
        assert apart[0] == apart[1] in ((True, True), (False, False))
    # Sample k is the tokens k * LENGTH and on of all documents in their order.
    ends = np.cumsum(lengths)
    stream_ = np.concatenate([tokens[ends[d] - lengths[d] : ends[d]] for d in ours.document_index])
    for number in range(len(ours)):
        k = int(ours.shuffle_index[number])
        sample = ours[number]
        assert sample["tokens"].tolist() == stream_[k * LENGTH : (k + 1) * LENGTH].tolist()
        assert sample["labels"].tolist() == stream_[k * LENGTH + 1 : (k + 1) * LENGTH + 1].tolist()
