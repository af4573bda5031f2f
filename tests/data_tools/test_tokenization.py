"""`tokenize` as a whole: the same bytes however the work is cut, receipts, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from data_tools.corpus import find_sources
from data_tools.errors import Failure, UserError
from data_tools.merge import merge
from data_tools.options import Options
from data_tools.receipt import is_intact, read_receipt
from data_tools.tokenization import tokenize
from data_tools.tokenizer import Tokenizer
from data_tools.verification import verify

from .conftest import (
    documents,
    expected,
    outputs,
    read_lines_of,
    shared,
    write_compressed,
    write_jsonl,
)

ENDINGS = ("", ".gz", ".zst", ".bz2", ".xz")


def test_ids_are_those_of_the_library(
    reference: Path, texts: list[str], tokenizer: Tokenizer
) -> None:
    assert documents(reference / "out") == expected(tokenizer, texts)
    assert verify(reference / "out") == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("part_bytes", "workers"), [(1024, 1), (5000, 2), (1 << 20, 3)])
def test_bytes_do_not_depend_on_parts_workers_or_compression(
    reference: Path, texts: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ending: str, part_bytes: int, workers: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("data_tools.shares._SMALL_BYTES", 0)  # compressed files are spooled too
    write_jsonl(tmp_path / f"c4.jsonl{ending}", texts)
    options = Options(part_bytes=part_bytes)
    tokenize([str(tmp_path)], model, tmp_path / "out", options, workers=workers)
    assert outputs(tmp_path / "out") == outputs(reference / "out")


def test_a_seed_shuffles_documents_reproducibly(
    reference: Path, model: str, tmp_path: Path
) -> None:
    source = str(reference / "c4.jsonl")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tokenize([source], model, tmp_path / name, Options(seed=seed, part_bytes=4096))
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b") != outputs(tmp_path / "c")
    assert documents(tmp_path / "a") != documents(reference / "out")
    assert sorted(documents(tmp_path / "a")) == sorted(documents(reference / "out"))
    merge([str(reference / "out")], tmp_path / "m", seed=1)
    assert outputs(tmp_path / "m") == outputs(tmp_path / "a")
    assert verify(tmp_path / "a") == []


def test_hugging_face_twin_gives_the_same_files(
    reference: Path, huggingface: str, tmp_path: Path
) -> None:
    tokenize([str(reference / "c4.jsonl")], huggingface, tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(reference / "out")


def test_a_disk_full_of_waiting_parts_changes_nothing(
    reference: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.tokenization._PARTS_AHEAD", 1)
    options = Options(part_bytes=5000)
    tokenize([str(reference / "c4.jsonl")], model, tmp_path / "out", options, workers=2)
    assert outputs(tmp_path / "out") == outputs(reference / "out")


def test_byte_level_tokenizers_go_to_their_library(
    texts: list[str], tmp_path: Path, capsys
) -> None:
    """GPT-2's kind, and Llama 3's: their ids, and no control id where one is spelled out."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = byte_level
    library.train_from_iterator(texts[:50], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    some = [*texts[:50], "a <|endoftext|> b"]
    source = write_jsonl(tmp_path / "x.jsonl", some)
    receipt = tokenize(
        [str(source)], tmp_path / "tokenizer.json", tmp_path / "out", eod_token="<|endoftext|>"
    )
    library.encode_special_tokens = True
    assert documents(tmp_path / "out") == [[*library.encode(text).ids, 0] for text in some]
    assert receipt["counts"]["literal_control_tokens"] == {"<|endoftext|>": 1}
    assert "ids come from the tokenizer's own library" in receipt["encoder"]
    assert "ids come from the tokenizer's own library" in capsys.readouterr().err


def test_without_the_kernel_the_files_are_the_same(
    reference: Path, model: str, tmp_path: Path, capsys
) -> None:
    source = [str(reference / "c4.jsonl")]
    receipt = tokenize(source, model, tmp_path / "out", fast=False, workers=2)
    assert outputs(tmp_path / "out") == outputs(reference / "out")
    # That it was slow is said, whatever else is not.
    assert receipt["encoder"] == "the fast path is switched off"
    assert capsys.readouterr().err == "tokenize: the fast path is switched off\n"


def test_bos_eod_and_shortest_length(model: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["a", "hello world, this is long", "b"])
    options = Options(append_eod=False, prepend_bos=True, min_tokens=3)
    receipt = tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out", options)
    assert documents(tmp_path / "out") == [
        [tokenizer.bos_id, *tokenizer.encode("hello world, this is long").tolist()]
    ]
    assert receipt["counts"]["rejected"] == {"fewer than --min-tokens tokens": 2}
    rejected = read_lines_of(tmp_path / "out.rejected.jsonl")
    assert [record["line"] for record in rejected] == [1, 3]


def test_parquet_gives_the_same_files(
    reference: Path, texts: list[str], model: str, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c4.parquet", row_group_size=70)
    tokenize([str(tmp_path / "c4.parquet")], model, tmp_path / "out", workers=2)
    assert outputs(tmp_path / "out") == outputs(reference / "out")
    data = (tmp_path / "c4.parquet").read_bytes()
    (tmp_path / "c4.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(Failure, match=r"c4\.parquet"):
        tokenize([str(tmp_path / "c4.parquet")], model, tmp_path / "cut")


def test_receipt_says_what_went_in_and_out(
    texts: list[str], model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "arxiv_1.jsonl", texts[:10])
    write_jsonl(tmp_path / "book.jsonl.zst", [*texts[10:20], "a literal <s> and </s></s>", ""])
    write_jsonl(tmp_path / "mixed.jsonl", texts[20:22], red_pajama_subset="github")
    receipt = tokenize([str(tmp_path)], model, tmp_path / "out", max_rejected="0")
    assert receipt == {**(read_receipt(tmp_path / "out") or {}), "reused": False}
    assert is_intact({k: v for k, v in receipt.items() if k != "reused"})
    counts = receipt["counts"]
    kept = [*texts[:20], "a literal <s> and </s></s>", *texts[20:22]]
    assert counts["documents"] == len(kept) == len(documents(tmp_path / "out"))
    assert counts["characters"] == sum(map(len, kept))
    assert counts["bytes"] == sum(len(text.encode()) for text in kept)
    assert counts["tokens"] == sum(map(len, expected(tokenizer, kept)))
    assert counts["rejected"] == {"empty text": 1}
    literal = {
        token: n
        for token in ("<s>", "</s>", "<unk>")
        if (n := sum(text.count(token) for text in kept))
    }
    assert counts["literal_control_tokens"] == literal
    assert {name: c["documents"] for name, c in counts["slices"].items()} == {
        "arxiv": 10,
        "book": 11,
        "github": 2,
    }
    assert receipt["tokenizer"]["vocab_size"] == 1000
    assert receipt["tokenizer"]["eod_id"] == 2
    assert receipt["encoder"] == "the compiled kernel"
    assert receipt["tokenizer"]["hash"] == tokenizer.hash
    xxhash = pytest.importorskip("xxhash")
    for entry in (*receipt["inputs"], *(receipt["outputs"]["pairs"][0][e] for e in ("bin", "idx"))):
        data = (tmp_path / entry["path"]).read_bytes()
        assert (entry["size"], entry["checksum"]) == (
            len(data),
            f"xxh128:{xxhash.xxh3_128_hexdigest(data)}",
        )


def test_redpajama_v2_is_read_as_it_is_laid_out(
    texts: list[str], model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for snapshot, language, bucket, part in (
        ("2023-06", "en", "head", texts[:3]),
        ("2023-06", "de", "middle", texts[3:5]),
        ("2022-49", "en", "head", texts[5:6]),
    ):
        folder = tmp_path / "documents" / snapshot / "0000"
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"url": "https://example.org", "digest": "sha1:x", "bucket": bucket}
        lines = (json.dumps({**fields, "raw_content": text}) + "\n" for text in part)
        write_compressed(folder / f"{language}_{bucket}.json.gz", "".join(lines).encode())
    receipt = tokenize([str(tmp_path)], model, tmp_path / "out", max_rejected="0")
    order = [*texts[5:6], *texts[3:5], *texts[:3]]  # by path
    assert documents(tmp_path / "out") == expected(tokenizer, order)
    slices = {name: counts["documents"] for name, counts in receipt["counts"]["slices"].items()}
    assert slices == {"v2_de_middle": 2, "v2_en_head": 4}


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        ({"source": "arxiv"}, "arxiv"),
        ({"source": "cc/2023-06/en_head_0000.json.gz/line401859"}, "common_crawl"),
        ({"redpajama_set_name": "RedPajamaStackExchange"}, "stackexchange"),
        ({"redpajama_set_name": "RedPajamaCommonCrawl"}, "common_crawl"),
        ({"redpajama_set_name": "RedPajamaBook", "source": "c4"}, "book"),
        ({"source": "somewhere else"}, "github"),
        ({}, "github"),
        ("no object", "github"),
    ],
)
def test_the_slice_is_the_documents_own_or_else_the_paths(
    model: str, tmp_path: Path, meta: object, name: str
) -> None:
    source = write_jsonl(tmp_path / "github.jsonl", ["one", "two"], meta=meta)
    receipt = tokenize([str(source)], model, tmp_path / "out")
    assert list(receipt["counts"]["slices"]) == [name]
    assert receipt["counts"]["slices"][name]["documents"] == 2


def test_a_finished_command_is_left_alone(
    texts: list[str], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts[:20])
    first = tokenize([str(source)], model, tmp_path / "out")
    before = os.stat(tmp_path / "out.bin").st_mtime_ns
    # Written again with the same content it is the same input.
    os.utime(source, ns=(1, 1))
    again = tokenize([str(source)], model, tmp_path / "out")
    assert again == {**first, "reused": True}
    assert os.stat(tmp_path / "out.bin").st_mtime_ns == before
    assert not (tmp_path / "out.work").exists()


def test_another_command_does_not_replace_a_finished_one(
    texts: list[str], model: str, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts[:20])
    tokenize([str(source)], model, tmp_path / "out")
    before = outputs(tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        tokenize([str(source)], model, tmp_path / "out", Options(append_eod=False))
    write_jsonl(source, texts[:19])
    with pytest.raises(UserError, match="--overwrite"):
        tokenize([str(source)], model, tmp_path / "out")
    assert outputs(tmp_path / "out") == before
    receipt = tokenize([str(source)], model, tmp_path / "out", overwrite=True)
    assert receipt["counts"]["documents"] == 19
    assert verify(tmp_path / "out") == []


def test_standard_input(texts: list[str], model: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", texts[:50])
    command = [sys.executable, "-m", "data_tools", "tokenize", "-", "--tokenizer", model]
    command += ["--output", str(tmp_path / "out"), "--quiet"]
    root = Path(__file__).parents[2]
    subprocess.run(command, input=source.read_bytes(), check=True, cwd=root)
    assert documents(tmp_path / "out") == expected(tokenizer, texts[:50])


def test_eod_is_refused_where_the_tokenizer_names_none(
    huggingface: str, texts: list[str], tmp_path: Path
) -> None:
    spec = Path(huggingface, "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(spec)
    source = write_jsonl(tmp_path / "x.jsonl", texts[:5])
    with pytest.raises(UserError, match="--eod-token"):
        tokenize([str(source)], tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="not in the vocabulary"):
        tokenize([str(source)], tmp_path, tmp_path / "out", eod_token="<eos>")
    assert not list(tmp_path.glob("out*"))
    receipt = tokenize([str(source)], tmp_path, tmp_path / "out", eod_token="</s>")
    assert receipt["tokenizer"]["eod_id"] == 2
    tokenize([str(source)], tmp_path, tmp_path / "bare", Options(append_eod=False))
    assert all(len(d) for d in documents(tmp_path / "bare"))


def test_int32_where_the_vocabulary_needs_it(
    huggingface: str, texts: list[str], tmp_path: Path
) -> None:
    """The same vocabulary with ids beyond 65,500: Megatron's rule asks for int32."""
    spec = json.loads(Path(huggingface, "tokenizer.json").read_text())
    spec["model"]["vocab"]["<extra>"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    source = write_jsonl(tmp_path / "x.jsonl", texts[:50])
    receipt = tokenize([str(source)], tmp_path, tmp_path / "out", eod_token="</s>")
    assert receipt["outputs"]["dtype"] == "int32"
    tokenize([str(source)], huggingface, tmp_path / "small")
    assert documents(tmp_path / "out") == documents(tmp_path / "small")


def test_no_documents_give_a_valid_empty_pair(model: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"")
    receipt = tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out")
    assert receipt["counts"]["documents"] == 0
    assert verify(tmp_path / "out") == []
    assert documents(tmp_path / "out") == []


def test_byte_ranges_of_crlf_and_unterminated_files(
    model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": f"document {i}"}).encode() for i in range(40)]
    for name, data in (("a", b"\r\n".join(lines) + b"\r\n"), ("b", b"\n".join(lines))):
        write_compressed(tmp_path / f"{name}.jsonl", data)
        for part_bytes in (1, 7, 23, 24, 25, 100):
            prefix = tmp_path / f"{name}{part_bytes}"
            options = Options(part_bytes=part_bytes)
            tokenize([str(tmp_path / f"{name}.jsonl")], model, prefix, options)
            assert documents(prefix) == expected(tokenizer, [f"document {i}" for i in range(40)])


def peak_memory(source: Path, model: str, prefix: Path) -> int:
    """Of tokenizing with two workers, in KiB, what they share counted for each."""
    # Its own peak from /proc: ru_maxrss begins at that of the process that started it.
    script = (
        "import resource, sys\n"
        "from data_tools.options import Options\n"
        "from data_tools.tokenization import tokenize\n"
        "tokenize([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, max_rejected='1')\n"
        "own = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(own + 2 * child)\n"
    )
    command = [sys.executable, "-c", script, str(source), model, str(prefix)]
    root = Path(__file__).parents[2]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True).stdout)


@pytest.mark.slow
def test_memory_stays_bounded_on_a_line_of_four_gigabytes(model: str, tmp_path: Path) -> None:
    good = json.dumps({"text": "good"}).encode() + b"\n"
    with open(tmp_path / "x.jsonl", "wb") as stream:
        stream.write(good)
        stream.write(b'{"text": "')
        stream.seek(4 << 30, os.SEEK_CUR)  # zeros: a hole in the file
        stream.write(b'"}\n' + good)
    assert peak_memory(tmp_path / "x.jsonl", model, tmp_path / "out") < 1 << 20
    (record,) = read_lines_of(tmp_path / "out.rejected.jsonl")
    assert (record["line"], record["offset"], record["reason"]) == (2, len(good), "line too long")
    assert record["bytes"] == (4 << 30) + 12
    assert len(documents(tmp_path / "out")) == 2


def test_memory_stays_bounded_on_text_without_a_place_to_cut(model: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["in" * (15 << 20)] * 2)
    assert peak_memory(tmp_path / "x.jsonl", model, tmp_path / "out") < 1 << 20
    assert len(documents(tmp_path / "out")) == 2


def test_shared_sample_end_to_end(tmp_path: Path) -> None:
    sample = shared("redpajama_sample")
    receipt = tokenize(
        [str(sample)], shared("tokenizers", "mistral_v1_32k"), tmp_path / "out", workers=2
    )
    counts = receipt["counts"]
    slices = {name: (c["documents"], c["bytes"]) for name, c in counts["slices"].items()}
    assert slices == {
        "arxiv": (634, 2_943_570),
        "book": (2, 2_590_587),
        "c4": (1095 + 59, 6_639_606 + 368_459),
        "github": (370, 6_414_176),
    }
    # The README's counts leave out the EOD of each document.
    tokens = 1_084_317 + 685_649 + 1_738_298 + 103_615 + 1_961_210
    assert counts["tokens"] == tokens + counts["documents"]
    assert [source.slice for source in find_sources([str(sample)])] == [
        "arxiv", "book", "c4", "c4", "github",
    ]  # fmt: skip
