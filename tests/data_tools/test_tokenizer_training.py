"""Which text a tokenizer is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.corpus import find_sources
from data_tools.errors import UserError
from data_tools.tokenizer_training import TrainingOptions, sample, train_tokenizer


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two slices, the first ten times the second."""
    folder = tmp_path_factory.mktemp("slices")
    for name, count in (("c4", 1000), ("arxiv", 100)):
        lines = (json.dumps({"text": f"{name} {i} " + "word " * 20}) for i in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return [str(folder)]


def drawn(corpora: list[str], **options) -> dict[str, int]:
    texts, slices = sample(find_sources(corpora), TrainingOptions(300, 50_000, **options))
    assert sum(slices.values()) == sum(map(len, texts)) <= 50_000
    return slices


def test_every_slice_gives_as_much_as_it_has(corpora: list[str]) -> None:
    slices = drawn(corpora)
    assert slices["c4"] / slices["arxiv"] == pytest.approx(10, rel=0.4)


def test_shares_of_the_slices_are_met(corpora: list[str]) -> None:
    slices = drawn(corpora, slice_shares=(("arxiv", 0.2), ("c4", 0.8)))
    assert slices["arxiv"] == pytest.approx(10_000, abs=200)
    assert slices["c4"] == pytest.approx(40_000, abs=200)
    assert set(drawn(corpora, slice_shares=(("c4", 1.0),))) == {"c4"}


def test_the_draw_is_the_seeds_alone(corpora: list[str]) -> None:
    def texts(inputs: list[str], seed: int) -> list[bytes]:
        return sample(find_sources(inputs), TrainingOptions(300, 20_000, seed))[0]

    folder = Path(corpora[0])
    files = [str(folder / "c4.jsonl"), str(folder / "arxiv.jsonl")]
    assert texts(files, 1) == texts(files[::-1], 1) != texts(files, 2)


@pytest.mark.parametrize(
    ("shares", "message"),
    [({"c4": 0.5}, "add up to 1"), ({"c4": 2.0, "arxiv": -1.0}, "above 0"),
     ({"c4": float("nan")}, "add up to 1"),
     ({"c4": 0.5, "books": 0.5}, "books=0.5 .* more than the 0 bytes of this slice"),
     ({"c4": 0.00001, "arxiv": 0.99999}, "arxiv=0.99999 .* more than the")],
)  # fmt: skip
def test_shares_that_cannot_be_met_are_refused(
    corpora: list[str], tmp_path: Path, shares: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(corpora, tmp_path / "t.model", 300, slice_shares=shares)
    assert not list(tmp_path.iterdir())
