"""`verify` against damage of every kind, anywhere in the files."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools import indexed
from data_tools import pair as pair_module
from data_tools.cli import main
from data_tools.errors import UserError
from data_tools.files import read_json, write_json
from data_tools.receipt import read_receipt
from data_tools.tokenization import tokenize
from data_tools.verification import verify

from .conftest import library_text, write_jsonl


@pytest.fixture(scope="module")
def sound(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    text = "\n".join(library_text()[:3])
    write_jsonl(folder / "x.jsonl", [text[i : i + 900] for i in range(0, len(text), 900)])
    with pytest.MonkeyPatch.context() as patch:
        # Small blocks, so that the damage has to be located among several.
        patch.setattr(pair_module, "CHECKED_BYTES", 4096)
        tokenize([str(folder / "x.jsonl")], model, folder / "out")
    return folder


def damage(data: bytes, rng: random.Random) -> tuple[bytes, int]:
    """Damaged content that differs from `data`, and where the damage begins."""
    while True:
        made, place = bytearray(data), rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            made[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made = made[:place]
        elif kind == 2:
            made[place : place + rng.randrange(1, 600)] = b""
        elif kind == 3:
            end = min(len(made), place + rng.randrange(1, 5000))
            made[place:end] = bytes(end - place)
        elif kind == 4:
            made += rng.randbytes(rng.randrange(1, 100))
            place = len(data)
        else:
            made[place:place] = made[place : place + rng.randrange(1, 64)]
        if made != data:
            return bytes(made), place


def inject(count: int, seed: int, sound: Path, folder: Path) -> dict[str, int]:
    """Inject faults; asserts that each is found, and flipped bits in .bin in their place."""
    rng = random.Random(seed)
    for file in sound.glob("out*"):
        shutil.copy(file, folder)
    assert verify(folder / "out") == []
    files = ["out.bin", "out.bin", "out.idx", "out.idx", "out.receipt.json"]
    found = dict.fromkeys(set(files), 0)
    for _ in range(count):
        name = rng.choice(files)
        whole = (folder / name).read_bytes()
        made, place = damage(whole, rng)
        (folder / name).write_bytes(made)
        problems = verify(folder / "out")
        assert problems, (name, place)
        if name == "out.bin" and len(made) == len(whole):
            spans = [re.search(r"bytes ([\d,]+) to ([\d,]+)", problem) for problem in problems]
            starts = [int(span[1].replace(",", "")) for span in spans if span]
            # Equal bytes may hide where a long overwrite begins, never by more than its length.
            assert any(start <= place + 5000 and place < start + 4096 for start in starts), problems
        (folder / name).write_bytes(whole)
        found[name] += 1
    assert verify(folder / "out") == []
    return found


def test_injected_faults_are_all_found(sound: Path, tmp_path: Path) -> None:
    inject(80, 0, sound, tmp_path)


@pytest.mark.slow
def test_a_thousand_injected_faults_are_all_found(sound: Path, tmp_path: Path, capsys) -> None:
    found = inject(1000, 1, sound, tmp_path)
    with capsys.disabled():
        print("\nverify found", ", ".join(f"{n} of {n} in {name}" for name, n in found.items()))


def test_without_a_receipt_the_structure_is_checked(sound: Path, tmp_path: Path, capsys) -> None:
    for ending in ("bin", "idx"):
        shutil.copy(sound / f"out.{ending}", tmp_path)
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "structure only" in capsys.readouterr().out
    index = bytearray((tmp_path / "out.idx").read_bytes())
    index[indexed.HEADER_BYTES + 4 * 7] ^= 1  # the length of document 7
    (tmp_path / "out.idx").write_bytes(index)
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "sequence 8 begins at" in capsys.readouterr().out


def test_a_last_document_longer_than_a_block_ends_where_the_file_ends(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_module, "CHECKED_BYTES", 4096)
    for count in (0, 1, 3):
        texts = [*(["short"] * count), library_text()[0]]
        write_jsonl(tmp_path / f"{count}.jsonl", texts)
        tokenize([str(tmp_path / f"{count}.jsonl")], model, tmp_path / f"out{count}")
        assert (tmp_path / f"out{count}.bin").stat().st_size > 3 * 4096
        assert verify(tmp_path / f"out{count}") == []


def test_wrong_ids_are_named_even_if_checksums_agree(sound: Path, tmp_path: Path) -> None:
    """A pair written wrongly from the start: an id beyond the vocabulary, an EOD missing."""
    from data_tools.pair import PairWriter, publish
    from data_tools.receipt import write_receipt

    index = indexed.read_index(sound / "out")
    tokens = np.array(indexed.open_tokens(sound / "out", index))
    tokens[index.span(3)[0]] = 1000
    tokens[index.span(5)[1] - 1] = 17
    writer = PairWriter(tmp_path / "work", np.uint16)
    writer.append([tokens.tobytes()], np.array(index.lengths))
    pairs = writer.complete(tmp_path / "out")
    publish(writer.folder, tmp_path / "out", pairs)
    receipt = read_receipt(sound / "out")
    assert receipt is not None
    write_receipt(tmp_path / "out", {**receipt, "outputs": {"dtype": "uint16", "pairs": pairs}})
    problems = "\n".join(verify(tmp_path / "out"))
    assert "outside the vocabulary of 1,000 (document 3)" in problems
    assert "document 5 does not end with EOD" in problems


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.pop("outputs"), "the receipt has no outputs"),
        (lambda r: r.update(kind="tokenizer"), "format 1, kind tokenizer"),
        (lambda r: r.update(format=2), "format 2, kind tokens"),
        (lambda r: r["outputs"]["pairs"][0]["bin"].update(size="1"), "size is not int"),
        (lambda r: r["outputs"]["pairs"][0]["bin"]["blocks"].append(3), "] is not str"),
        (lambda r: r["tokenizer"].pop("hash"), "tokenizer"),
        (lambda r: r["counts"]["slices"].update(c4={}), "c4 has no documents"),
        (lambda r: r.update(shard={"number": 1}), "shard has no counts"),
    ],
)
def test_a_receipt_that_lacks_something_is_refused_by_what_it_lacks(
    sound: Path, tmp_path: Path, change, problem: str
) -> None:
    receipt = read_json(sound / "out.receipt.json")
    assert read_receipt(sound / "out") == receipt
    change(receipt)
    write_json(tmp_path / "out.receipt.json", receipt)
    with pytest.raises(UserError, match=re.escape(problem)):
        read_receipt(tmp_path / "out")
