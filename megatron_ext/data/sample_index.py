"""Which tokens each sample holds: Megatron-Core's three indices, built quicker and in less memory.

    builder = BlendedMegatronDatasetBuilder(SampleIndex, sizes, lambda: True, dataset_config)

Its GPTDataset reads them: the documents in the order of reading, where in them each sample begins,
and the order of the samples. How many epochs there are and which part of them is shuffled by itself
are as there; the shuffle is another. Fisher-Yates over an array larger than the processor's cache
waits for memory at each step, so the items are dealt at random into buckets that fit, and those
shuffled: every order is still as likely (Sandelius, "A simple randomization procedure", 1962). It
depends on the seed alone, not on the number of threads.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset

from data_tools.indexed import HEADER_BYTES
from data_tools.options import available_cores

_BUCKETS = 256  # as many as a byte tells apart
_CHUNK = 1 << 20  # items dealt at once
_FINAL_EPOCH = 0.8  # of its samples: a last epoch that needs fewer stays apart, at the end


class SampleIndex(GPTDataset):
    """GPTDataset with these indices, built by rank 0 where the cache has none, always mapped."""

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        name = f"{self.unique_description_hash}-{self.index_split.name}"
        folder = Path(self.config.path_to_cache)
        files = [folder / f"{name}-{kind}_index.npy" for kind in ("document", "sample", "shuffle")]
        if not all(file.is_file() for file in files) and _first_rank():
            folder.mkdir(parents=True, exist_ok=True)
            self._write(*files)
        return tuple(np.load(file, mmap_mode="r") for file in files)

    def _write(self, document_file: Path, sample_file: Path, shuffle_file: Path) -> None:
        length, first, count = self.config.sequence_length, int(self.indices[0]), len(self.indices)
        # Read, not mapped: they begin at an odd place in the file, where looking them up is slow.
        lengths = np.fromfile(
            f"{self.dataset.path_prefix}.idx", "<i4", count, offset=HEADER_BYTES + 4 * first
        )
        tokens = int(lengths.sum(dtype=np.int64))
        wanted = tokens if self.num_samples is None else self.num_samples * length + 1
        epochs = max(1, -(-wanted // tokens))
        samples, before_last = ((n * tokens - 1) // length for n in (epochs, epochs - 1))
        needed = int(_FINAL_EPOCH * ((tokens - 1) // length))
        apart = epochs > 1 and self.num_samples - before_last < needed
        seeds = np.random.SeedSequence(self.config.random_seed).spawn(4)
        parts = [(epochs - 1) * count, count] if apart else [epochs * count]
        documents = _shuffled(parts, np.dtype(np.int32), seeds[:2], count)
        np.save(sample_file, _beginnings(documents, lengths, samples, length))
        documents += first
        np.save(document_file, documents)
        del documents, lengths
        parts = [before_last, samples - before_last] if apart else [samples]
        dtype = np.dtype(np.uint32 if samples < 2**32 - 1 else np.int64)
        np.save(shuffle_file, _shuffled(parts, dtype, seeds[2:], samples))


def _beginnings(
    documents: np.ndarray, lengths: np.ndarray, samples: int, length: int
) -> np.ndarray:
    """Where in `documents`, and at which token of that one, each sample begins and the last ends.

    Sample k has the tokens k * length .. (k + 1) * length of all `documents` (numbers of
    `lengths`) in a row, the last of which is the first of the next. Returns [samples + 1, 2].
    """
    out = np.empty((samples + 1, 2), np.int32 if len(documents) < 2**31 else np.int64)
    starts = range(0, len(documents), _CHUNK)

    def sizes_of(start: int) -> np.ndarray:  # "clip" does not look at each number first
        return np.take(lengths, documents[start : start + _CHUNK], mode="clip")

    def tokens(start: int) -> int:
        return int(sizes_of(start).sum(dtype=np.int64))

    def find(start: int, token: int) -> None:
        sizes = sizes_of(start)
        ends = np.cumsum(sizes, dtype=np.int64) + token
        first, last = -(-token // length), min(samples, (int(ends[-1]) - 1) // length)
        # Sample k begins behind all documents that end at token k * length or before: to count them
        # is much quicker than to search for each sample.
        begun = (ends - 1) // length + 1 - first  # of these samples, before each document's end
        places = np.cumsum(np.bincount(begun))[: last - first + 1]
        begins = np.arange(first, last + 1) * length
        out[first : last + 1, 0] = start + places
        out[first : last + 1, 1] = begins - (ends[places] - sizes[places])

    with _threads() as pool:
        before = accumulate(pool.map(tokens, starts), initial=0)
        list(pool.map(find, starts, before))
    return out


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, available_cores()))


def _first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _shuffled(
    parts: list[int], dtype: np.dtype, seeds: list[np.random.SeedSequence], modulus: int
) -> np.ndarray:
    """0, 1, .. modulo `modulus`, shuffled within each of the `parts` (their sizes)."""
    out = np.empty(sum(parts), dtype)
    start = 0
    for size, seed in zip(parts, seeds, strict=False):  # one part needs one of the two seeds
        _shuffle_into(out[start : start + size], start, seed, modulus)
        start += size
    return out


def _modulo(numbers: np.ndarray, modulus: int) -> np.ndarray:
    # The first epoch, mostly the only one, is spared the divisions.
    return numbers % modulus if numbers.max(initial=0) >= modulus else numbers


def _shuffle_into(out: np.ndarray, first: int, seed: np.random.SeedSequence, modulus: int) -> None:
    """Fill `out` with first, first + 1, .. modulo `modulus` in an order that `seed` decides."""
    if len(out) <= 2 * _CHUNK:  # it fits as it is
        out[:] = _modulo(np.arange(first, first + len(out)), modulus)
        np.random.default_rng(seed).shuffle(out)
        return
    dealing, *mixing = map(np.random.default_rng, seed.spawn(1 + _BUCKETS))
    buckets = dealing.integers(0, _BUCKETS, len(out), dtype=np.uint8)
    starts = range(0, len(out), _CHUNK)
    sizes = np.array(
        [np.bincount(buckets[s : s + _CHUNK], minlength=_BUCKETS) for s in starts]
    )  # [chunks, buckets]
    ends = np.cumsum(sizes.T).reshape(_BUCKETS, -1).T  # where in `out` each chunk's share ends

    def deal(chunk: int) -> None:
        start = starts[chunk]
        order = np.argsort(buckets[start : start + _CHUNK], kind="stable")
        items = _modulo(order + (first + start), modulus).astype(out.dtype)
        shares = np.split(items, np.cumsum(sizes[chunk])[:-1])
        for end, share in zip(ends[chunk], shares, strict=True):
            out[end - len(share) : end] = share

    def mix(bucket: int) -> None:
        end = ends[-1, bucket]
        mixing[bucket].shuffle(out[end - sizes[:, bucket].sum() : end])

    with _threads() as pool:
        for work, number in ((deal, len(starts)), (mix, _BUCKETS)):
            list(pool.map(work, range(number)))  # raises what they raise
