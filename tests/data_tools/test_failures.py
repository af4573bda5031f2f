"""Bad input of every kind: nothing good is lost, everything bad is named, loss is never silent.

Files of 100 documents with one bad record after 50: on these Megatron-LM's preprocess_data.py
hangs, preprocess_data_fast.py drops the second half with exit code 0, others the whole buffer.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from data_tools.cli import main
from data_tools.errors import Failure, UserError
from data_tools.options import Options
from data_tools.tokenization import tokenize
from data_tools.tokenizer import Tokenizer

from .conftest import documents, expected, write_compressed, write_jsonl

GOOD = [f"document number {i}" for i in range(100)]
LINES = [json.dumps({"text": text}).encode() for text in GOOD]

BAD_LINES = [
    (b'{"text": "truncated', "not JSON"),
    (b'{"content": "x"}', "no text key"),
    (b'{"text": null}', "text is not a string"),
    (b'{"text": 7}', "text is not a string"),
    (b'{"text": ["a"]}', "text is not a string"),
    (b'["text"]', "not a JSON object"),
    (b'"text"', "not a JSON object"),
    (b'{"text": "\\ud800"}', "lone surrogate in text"),
    (b'{"text": "a\xff"}', "invalid UTF-8"),
    (b"\xff\xfe\x00", "invalid UTF-8"),
    (b'{"text": "a"} {"text": "b"}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "a\x00b"}', "not JSON"),
    (b"\x00" * 50, "not JSON"),
]
HARMLESS_LINES = [(b"", "blank line"), (b" \t\r", "blank line"), (b'{"text": ""}', "empty text")]


def write(path: Path, bad: bytes) -> int:
    """The file; returns the byte offset of the bad line."""
    head = b"".join(line + b"\n" for line in LINES[:50])
    write_compressed(path, head + bad + b"\n" + b"".join(line + b"\n" for line in LINES[50:]))
    return len(head)


@pytest.mark.parametrize("ending", ["", ".zst"])
@pytest.mark.parametrize(("bad", "reason"), BAD_LINES + HARMLESS_LINES)
def test_one_bad_line_costs_one_line(
    model: str, tokenizer: Tokenizer, tmp_path: Path, bad: bytes, reason: str, ending: str
) -> None:
    offset = write(tmp_path / f"x.jsonl{ending}", bad)
    source = str(tmp_path / f"x.jsonl{ending}")
    receipt = tokenize([source], model, tmp_path / "out", max_rejected="1%")
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD)
    assert receipt["counts"]["rejected"] == {reason: 1}
    (record,) = (tmp_path / "out.rejected.jsonl").read_text().splitlines()
    assert json.loads(record) == {
        "file": source,
        "line": 51,
        "offset": offset,
        "bytes": len(bad),
        "reason": reason,
    }


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES)
def test_more_bad_lines_than_allowed_is_exit_code_2(
    model: str, tokenizer: Tokenizer, tmp_path: Path, capsys, bad: bytes, reason: str
) -> None:
    write(tmp_path / "x.jsonl", bad)
    command = ["tokenize", str(tmp_path / "x.jsonl"), "--tokenizer", model]
    command += ["--output", str(tmp_path / "out"), "--workers", "1", "--quiet"]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "1 of 101 lines" in message and reason in message and "out.rejected.jsonl" in message
    assert "Traceback" not in message and message.count("\n") == 1
    assert not (tmp_path / "out.bin").exists() and not (tmp_path / "out.idx").exists()
    # Allowed more, the kept work is completed.
    assert main([*command, "--max-rejected", "1"]) == 0
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD)


@pytest.mark.parametrize("bad", [line for line, _ in HARMLESS_LINES])
def test_lines_without_text_are_no_loss(model: str, tmp_path: Path, bad: bytes) -> None:
    write(tmp_path / "x.jsonl", bad)
    tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out", max_rejected="0")
    assert len(documents(tmp_path / "out")) == 100


def test_what_only_looks_bad_is_kept(model: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A byte order mark, NaN and lone surrogates in meta, odd spacing: Python's json reads them."""
    lines = [
        b'\xef\xbb\xbf{"text": "a"}',
        b'{"text": "b", "meta": {"score": NaN, "big": 1e999}}',
        b'{"meta": "\\ud800", "text": "c"}',
        b'  {"text": "d"}  \r',
        b'{"text": "no", "text": "e"}',
        b'{"text": "\\u0000\\ud83d\\ude42"}',
        b'{"raw_content": "g"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out", max_rejected="0")
    texts = ["a", "b", "c", "d", "e", "\x00🙂", "g"]
    assert documents(tmp_path / "out") == expected(tokenizer, texts)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spooled", [False, True])
def test_a_truncated_archive_is_an_error_that_names_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ending: str, keep: float, spooled: bool,
) -> None:  # fmt: skip
    if spooled:
        monkeypatch.setattr("data_tools.shares._SMALL_BYTES", -1)
    path = tmp_path / f"x.jsonl{ending}"
    write_compressed(path, b"".join(line + b"\n" for line in LINES * 10))
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * keep), len(data) - 1)])
    with pytest.raises(Failure, match=r"x\.jsonl.*(truncated|corrupt)"):
        tokenize([str(path)], model, tmp_path / "out", max_rejected="1.0")
    assert not (tmp_path / "out.bin").exists()
    assert not (tmp_path / "out.receipt.json").exists()


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_archives_of_several_members_are_read_to_the_end(
    model: str, tokenizer: Tokenizer, tmp_path: Path, ending: str
) -> None:
    members = b""
    for i in range(0, 100, 25):
        write_compressed(tmp_path / f"x{ending}", b"".join(x + b"\n" for x in LINES[i : i + 25]))
        members += (tmp_path / f"x{ending}").read_bytes()
    (tmp_path / f"x.jsonl{ending}").write_bytes(members)
    tokenize([str(tmp_path / f"x.jsonl{ending}")], model, tmp_path / "out")
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["magic", "header", "middle", "cut", "garbage"])
def test_a_damaged_later_member_is_an_error(
    model: str, tmp_path: Path, ending: str, damage: str
) -> None:
    members = []
    for half in (LINES[:50], LINES[50:]):
        write_compressed(tmp_path / f"x{ending}", b"".join(line + b"\n" for line in half))
        members.append(bytearray((tmp_path / f"x{ending}").read_bytes()))
    first, second = members
    if damage == "cut":
        del second[len(second) // 2 :]
    elif damage == "garbage":
        second += b"garbage"
    else:
        second[{"magic": 0, "header": 3, "middle": len(second) // 2}[damage]] ^= 0x40
    if (ending, damage) in ((".zst", "middle"), (".gz", "header")):
        pytest.skip(
            "neither is protected: no checksum in this frame, a reserved flag in that header"
        )
    (tmp_path / f"x.jsonl{ending}").write_bytes(first + second)
    with pytest.raises(Failure, match=r"x\.jsonl.*(truncated|corrupt)"):
        tokenize([str(tmp_path / f"x.jsonl{ending}")], model, tmp_path / "out", max_rejected="1.0")


def test_xz_may_be_padded_with_zeros_by_fours(
    model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    halves = [lzma.compress(b"\n".join(half) + b"\n") for half in (LINES[:50], LINES[50:])]
    path = tmp_path / "x.jsonl.xz"
    path.write_bytes(halves[0] + bytes(8) + halves[1] + bytes(4))
    tokenize([str(path)], model, tmp_path / "out")
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD)
    path.write_bytes(halves[0] + bytes(6) + halves[1])
    with pytest.raises(Failure, match=r"x\.jsonl\.xz.*multiple of four"):
        tokenize([str(path)], model, tmp_path / "other")


def test_zstd_frames_without_size_with_checksum_skippable_and_a_long_window(
    model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = b"".join(line + b"\n" for line in LINES[:50])
    streamed = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    window = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    wide = zstandard.ZstdCompressor(compression_params=window).compressobj()
    content = (
        skippable
        + streamed.compress(data)
        + streamed.flush()
        + wide.compress(b"".join(line + b"\n" for line in LINES[50:]))
        + wide.flush()
        + skippable
    )
    (tmp_path / "x.jsonl.zst").write_bytes(content)
    tokenize([str(tmp_path / "x.jsonl.zst")], model, tmp_path / "out", window_bytes=1 << 31)
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD)


@pytest.mark.parametrize("kind", ["zst", "zst in one segment", "zst later", "xz"])
def test_an_archive_that_needs_much_memory_is_read_on_request(
    model: str, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    ending = kind.split()[0]
    # Each needs 2 MiB or a little more; the single segment for want of any smaller window.
    lines = [*LINES, b" " * (2 << 20)] if kind == "zst in one segment" else LINES
    data = b"".join(line + b"\n" for line in lines)
    if ending == "xz":
        filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2 << 20}]
        content = lzma.compress(data, filters=filters)
    else:
        one_segment = kind == "zst in one segment"
        window = zstandard.ZstdCompressionParameters(window_log=27 if one_segment else 21)
        compressor = zstandard.ZstdCompressor(compression_params=window)
        stream = compressor.compressobj()  # of unknown size: the window is not made to fit
        content = (
            compressor.compress(data) if one_segment else stream.compress(data) + stream.flush()
        )
        assert zstandard.get_frame_parameters(content).window_size > 1 << 20
        if kind == "zst later":
            content = zstandard.compress(b"\n") + content
    path = tmp_path / f"x.jsonl.{ending}"
    path.write_bytes(content)
    for workers in (1, 2):
        with pytest.raises(UserError, match=rf"x\.jsonl\.{ending} .*--max-window-bytes 1048576"):
            tokenize([str(path)], model, tmp_path / "out", window_bytes=1 << 20, workers=workers)
    tokenize([str(path)], model, tmp_path / "out", window_bytes=4 << 20)
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD)


def test_a_damaged_window_is_a_damaged_archive(model: str, tmp_path: Path) -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    content = bytearray(stream.compress(b'{"text": "a"}\n') + stream.flush())
    content[5] = 0xFF  # the window's size
    (tmp_path / "x.jsonl.zst").write_bytes(content)
    with pytest.raises(Failure, match=r"x\.jsonl\.zst is truncated or corrupt"):
        tokenize([str(tmp_path)], model, tmp_path / "out", window_bytes=1 << 31)


def test_a_flipped_bit_in_a_checked_archive_is_an_error(
    model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    data = b"".join(line + b"\n" for line in LINES * 10)
    archives = {".gz": gzip.compress(data)}
    archives[".zst"] = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    archives[".bz2"], archives[".xz"] = bz2.compress(data), lzma.compress(data)
    for ending, content in archives.items():
        path = tmp_path / f"x.jsonl{ending}"
        for place in range(20, len(content), max(1, len(content) // 40)):
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            path.write_bytes(damaged)
            if ending == ".bz2" and bz2_means_the_same(damaged, data):
                tokenize([str(path)], model, tmp_path / "out", overwrite=True)
                assert documents(tmp_path / "out") == expected(tokenizer, GOOD * 10)
                continue
            with pytest.raises(Failure, match=r"x\.jsonl"):
                tokenize([str(path)], model, tmp_path / "out", overwrite=True)


def bz2_means_the_same(damaged: bytes, data: bytes) -> bool:
    """Some bits of a bzip2 header describe codes that no symbol uses: nothing depends on them."""
    try:
        return bz2.decompress(damaged) == data
    except OSError:
        return False


def test_a_name_that_contradicts_the_content_is_an_error(model: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(LINES[0])
    with pytest.raises(Failure, match="misnamed"):
        tokenize([str(tmp_path / "x.jsonl.gz")], model, tmp_path / "out")


def test_a_compressed_file_without_the_ending_is_understood(
    model: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(LINES[0]))
    tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out")
    assert documents(tmp_path / "out") == expected(tokenizer, GOOD[:1])


def test_a_plain_file_cut_in_the_middle_is_accounted_for(model: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(LINES)[:-5])
    receipt = tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out", max_rejected="1")
    assert receipt["counts"]["documents"] == 99
    assert receipt["counts"]["rejected"] == {"not JSON": 1}


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_an_over_long_line_is_named_and_the_rest_kept(
    model: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr("data_tools.shares._SMALL_BYTES", 0)
    long = json.dumps({"text": "a" * 300_000}).encode()
    for part_bytes in (100, 5000, 1 << 20):
        offset = write(tmp_path / f"x.jsonl{ending}", long)
        prefix = tmp_path / f"out{part_bytes}"
        options = Options(part_bytes=part_bytes, max_line_bytes=2000)
        tokenize([str(tmp_path / f"x.jsonl{ending}")], model, prefix, options, max_rejected="1")
        assert documents(prefix) == expected(tokenizer, GOOD)
        record = json.loads(Path(f"{prefix}.rejected.jsonl").read_text())
        assert (record["line"], record["offset"], record["bytes"]) == (51, offset, len(long))
        assert record["reason"] == "line too long"


def test_a_refused_replacement_leaves_the_list_of_what_is_finished(
    model: str, tmp_path: Path
) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes(b'{"text": "a"}\nbad\n')
    tokenize([str(source)], model, tmp_path / "out", max_rejected="1")
    before = (tmp_path / "out.rejected.jsonl").read_bytes()
    source.write_bytes(b"bad\nworse\n")
    with pytest.raises(UserError, match=r"out\.work/rejected\.jsonl"):
        tokenize([str(source)], model, tmp_path / "out", max_rejected="0", overwrite=True)
    assert (tmp_path / "out.rejected.jsonl").read_bytes() == before


def test_a_damaged_plan_is_named(model: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", ["a"])
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work/plan.json").write_text('{"inputs": ')
    with pytest.raises(UserError, match=r"plan\.json is damaged .* remove "):
        tokenize([str(source)], model, tmp_path / "out")


def test_hopeless_input_stops_early(model: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"body": "x"}\n' * 60_000)
    options = Options(part_bytes=16384)
    with pytest.raises(UserError, match=r"lines were rejected \([\d,]+ no text key\)") as caught:
        tokenize([str(tmp_path / "x.jsonl")], model, tmp_path / "out", options)
    lines = int(str(caught.value).split(" of ")[1].split()[0].replace(",", ""))
    assert 10_000 <= lines < 20_000


def test_a_file_that_changes_while_it_is_read_is_an_error(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data_tools.workers

    path = tmp_path / "x.jsonl"
    write(path, LINES[0])
    real = data_tools.workers.encode_part

    def change(part, options, worker):
        result = real(part, options, worker)
        with open(path, "ab") as stream:
            stream.write(b"more\n")
        return result

    monkeypatch.setattr(data_tools.workers, "encode_part", change)
    with pytest.raises(Failure, match="changed while it was read"):
        tokenize([str(path)], model, tmp_path / "out")
    assert not (tmp_path / "out.bin").exists()
