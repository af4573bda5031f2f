"""The three indices against Megatron-Core's own, whose shuffle alone is another."""

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import xxhash
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


def test_every_order_is_as_likely() -> None:
    size, rounds = 5, 3_000
    seen = Counter(tuple(shuffled([size], seed, size)) for seed in range(rounds))
    expected = rounds / 120
    chi_squared = sum(
        (seen[order] - expected) ** 2 / expected for order in permutations(range(size))
    )
    assert chi_squared < 190  # with 119 degrees of freedom, more is rarer than 1 in 20,000


def test_an_order_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs resume in it: where this changes, `shuffle` of corpora.fingerprint_of has to go up."""
    monkeypatch.undo()
    for size, known in ((1000, "d37a0b90840ab28e"), (3 << 20, "3c76c4bc69879040")):
        order = shuffled([size], 0, size)
        assert xxhash.xxh3_64_hexdigest(order.astype("<i4").tobytes()) == known


def built(
    kind: type[GPTDataset], folder: Path, indices: np.ndarray, samples: int | None, split: Split
) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=5,
        sequence_length=LENGTH,
        blend=([str(folder / "x")], None),
        split="250,50,0",
        path_to_cache=str(folder / kind.__name__),
        tokenizer=_TokenizerFacts(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    data = IndexedDataset(str(folder / "x"), mmap=True)
    return kind(data, str(folder / "x"), indices.astype(np.int32), samples, split, config)


def write_pair(folder: Path, lengths: np.ndarray) -> np.ndarray:
    """Random tokens in documents of these lengths; returns them."""
    with open(folder / "x.idx", "wb") as stream:
        write_index(stream, np.uint16, lengths.astype(np.int32))
    tokens = np.random.default_rng(4).integers(0, 500, lengths.sum(), dtype=np.uint16)
    tokens.tofile(folder / "x.bin")
    return tokens


def test_documents_and_samples_have_random_numbers_of_their_own(tmp_path: Path) -> None:
    lengths = np.full(100, LENGTH)
    lengths[-1] += 1  # as many samples as documents
    write_pair(tmp_path, lengths)
    dataset = built(SampleIndex, tmp_path, np.arange(100), None, Split.train)
    assert len(dataset) == len(dataset.document_index) == 100
    assert dataset.document_index.tolist() != dataset.shuffle_index.tolist()


@pytest.mark.parametrize("share", [0.4, 1.0, 1.3, 1.79, 1.9, 3.5, None])
@pytest.mark.parametrize("split", [Split.train, Split.valid])
def test_all_but_the_order_is_megatron_cores(
    share: float | None, split: Split, tmp_path: Path
) -> None:
    lengths = np.random.default_rng(3).integers(1, 60, 300)
    tokens = write_pair(tmp_path, lengths)
    indices = np.arange(250) if split is Split.train else np.arange(250, 300)
    per_epoch = int(lengths[indices].sum())
    samples = None if share is None else int(share * per_epoch) // LENGTH
    made = [built(kind, tmp_path, indices, samples, split) for kind in (GPTDataset, SampleIndex)]
    theirs, ours = made
    assert len(ours) == len(theirs)
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        assert getattr(ours, name).shape == getattr(theirs, name).shape
    assert sorted(ours.document_index) == sorted(theirs.document_index)
    assert sorted(ours.shuffle_index) == list(range(len(ours)))
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
