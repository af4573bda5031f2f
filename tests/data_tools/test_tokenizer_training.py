"""Which text a tokenizer is trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.corpus import find_sources
from data_tools.errors import UserError
from data_tools.tokenization import tokenize
from data_tools.tokenizer_training import TrainingOptions, sample, train_tokenizer
from data_tools.verification import verify

from .conftest import library_text


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


@pytest.fixture(scope="module")
def trained(corpora: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"text": library_text()[0][:20_000]}), '{"no": 1}', "not json"]
    (folder / "bad.jsonl").write_text("\n".join(lines))
    receipt = train_tokenizer([*corpora, str(folder / "bad.jsonl")], folder / "t", 400)
    assert receipt["rejected"] == {"no text key": 1, "not JSON": 1}
    return folder


def train_again(corpora: list[str], trained: Path, *more: str) -> int:
    inputs = [*corpora, str(trained / "bad.jsonl")]
    return main(
        ["train-tokenizer", *inputs, "--vocab-size", "400", "--output", str(trained / "t"), *more]
    )


def test_a_model_is_replaced_only_where_asked(corpora: list[str], trained: Path, capsys) -> None:
    before = {p: p.read_bytes() for p in trained.iterdir()}
    assert [p.name for p in sorted(before)] == ["bad.jsonl", "t.model", "t.model.receipt.json"]
    assert train_again(corpora, trained, "--seed", "1") == 2
    assert "write --overwrite" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in trained.iterdir()} == before
    assert train_again(corpora, trained) == 0
    assert "already done" in capsys.readouterr().out
    assert train_again(corpora, trained, "--seed", "1", "--overwrite") == 0
    assert "2 lines passed over (1 no text key, 1 not JSON)" in capsys.readouterr().out
    receipt = trained / "t.model.receipt.json"
    assert receipt.read_bytes() != before[receipt]
    for broken in ("garbage", "[]", '{"wanted": 1}'):
        receipt.write_text(broken)
        assert train_again(corpora, trained) == 2
        assert "no receipt says" in capsys.readouterr().err


def test_killed_in_its_last_steps_the_same_command_goes_on(
    corpora: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = [*corpora, str(trained / "bad.jsonl")], tmp_path / "t", 400
    for step in ("write_json", "write_file"):
        with monkeypatch.context() as patch:
            patch.setattr(f"data_tools.tokenizer_training.{step}", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train_tokenizer(*request)
    assert not train_tokenizer(*request)["reused"]
    # In a folder that nobody may write there can be no lock, and what is finished needs none.
    monkeypatch.delattr("data_tools.tokenizer_training.exclusive")
    assert train_tokenizer(*request)["reused"]


def test_its_receipt_is_not_that_of_token_files_of_its_name(trained: Path) -> None:
    source, prefix = str(trained / "bad.jsonl"), trained / "t"
    tokenize([source], str(trained / "t.model"), prefix, max_rejected="2")
    assert verify(prefix) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "-1"),
        ("--sample-bytes", "0"),
        ("--character-coverage", "7"),
        ("--character-coverage", "nan"),
        ("--vocab-size", "299"),
        ("--output", "x/"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(
    corpora: list[str], tmp_path: Path, capsys, option: str, value: str
) -> None:
    given = {"--vocab-size": "300", "--output": str(tmp_path / "t"), option: value}
    command = ["train-tokenizer", *corpora, *(word for pair in given.items() for word in pair)]
    assert main(command) == 2
    assert f"{option} {value}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path) -> None:
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 100)))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": letters}))
    inputs = [str(tmp_path / "x.jsonl")]
    for wrong, words in ((300, "is too small"), (9000, "is more than")):
        with pytest.raises(UserError, match=f"{wrong} {words}") as refusal:
            train_tokenizer(inputs, tmp_path / "t", wrong, character_coverage=1.0)
        (right,) = re.findall(r"write (\d+) or", str(refusal.value))
        train_tokenizer(inputs, tmp_path / right, int(right), character_coverage=1.0)


def test_parquet_can_be_trained_on(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["some text"] * 9}), tmp_path / "c4.parquet")
    texts, slices = sample(find_sources([str(tmp_path)]), TrainingOptions(300))
    assert (len(texts), slices) == (9, {"c4": 81})
