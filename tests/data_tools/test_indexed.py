"""The .bin/.idx format, against Megatron-Core's own reader and writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools import indexed
from data_tools.errors import UserError

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write_pair(prefix: Path, dtype, documents: list[np.ndarray]) -> None:
    bin_path, idx_path = indexed.paths(prefix)
    bin_path.write_bytes(b"".join(d.astype(dtype).tobytes() for d in documents))
    with open(idx_path, "wb") as stream:
        indexed.write_index(stream, dtype, np.array([len(d) for d in documents], dtype=np.int32))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_writes_the_same_bytes(tmp_path: Path, dtype) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60000, size=n) for n in (5, 1, 0, 300, 77)]
    write_pair(tmp_path / "ours", dtype, documents)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        ours = (tmp_path / f"ours.{ending}").read_bytes()
        assert ours == (tmp_path / f"theirs.{ending}").read_bytes()


def test_megatron_reads_every_document(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 60000, size=n) for n in (5, 1, 300, 77)]
    write_pair(tmp_path / "corpus", np.uint16, documents)
    dataset = megatron.IndexedDataset(str(tmp_path / "corpus"))
    assert [list(dataset[i]) for i in range(len(dataset))] == [list(d) for d in documents]
    index = indexed.read_index(tmp_path / "corpus")
    tokens = indexed.open_tokens(tmp_path / "corpus", index)
    for i, document in enumerate(documents):
        start, end = index.span(i)
        assert list(tokens[start:end]) == list(document)


@pytest.mark.parametrize("given", ["a.b/c.d", "a.b/c.d.bin", "a.b/c.d.idx", Path("a.b/c.d.bin")])
def test_a_prefix_may_be_given_as_one_of_its_files(given: str | Path) -> None:
    assert indexed.prefix(given) == Path("a.b/c.d")
    assert indexed.paths(given) == (Path("a.b/c.d.bin"), Path("a.b/c.d.idx"))


@pytest.mark.parametrize("vocab_size", [2, 32000, 65499, 65500, 65536, 200000])
def test_dtype_rule_is_megatrons(vocab_size: int) -> None:
    assert indexed.token_dtype(vocab_size) is megatron.DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("keep", [0, 5, 33, 34, 60])
def test_truncated_index_is_refused_in_one_sentence(tmp_path: Path, keep: int) -> None:
    write_pair(tmp_path / "corpus", np.uint16, [np.arange(4), np.arange(9)])
    path = tmp_path / "corpus.idx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"corpus\.idx"):
        indexed.read_index(tmp_path / "corpus")
