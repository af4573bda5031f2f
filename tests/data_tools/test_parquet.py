"""Parquet: rows of every type that writers choose, and memory that a small file cannot blow up."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import parquet_pages
from data_tools.cli import main
from data_tools.corpus import WINDOW_BYTES, find_sources
from data_tools.documents import EMPTY, NO_TEXT, NOT_UTF8, TOO_LONG, WRONG_TYPE
from data_tools.errors import Failure, UserError
from data_tools.lines import MAX_LINE_BYTES
from data_tools.merge import merge
from data_tools.options import Options
from data_tools.parquet import read_rows, rows_before
from data_tools.parquet_pages import Pages, largest_pages, metadata_bytes, row_groups
from data_tools.tokenization import tokenize

from .conftest import documents, expected, flip_a_bit, outputs, read_lines_of

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PLAIN = {"use_dictionary": False, "compression": "none"}


def write(path: Path, columns: Any, **options: Any) -> Path:
    parquet.write_table(pa.table(columns), path, **options)
    return path


def rows(path: Path, window: int = WINDOW_BYTES, most: int = MAX_LINE_BYTES) -> list[tuple]:
    """(row, size, text, slice, reason, characters) of every row."""
    (source,) = find_sources([str(path)], window)
    return [(line.number, line.size, *document)
            for line, document in read_rows(source, ("text", "raw_content"), most)]  # fmt: skip


def pages_of(path: Path, columns: list[str]) -> Pages:
    return largest_pages(str(path), row_groups(str(path), ("text", "meta")), columns)


def texts(path: Path) -> list[str]:
    return [text.decode() for _, _, text, *_ in rows(path)]


@pytest.mark.parametrize(
    "type_",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
     pa.dictionary(pa.int32(), pa.string()), pa.json_()],
    ids=str,
)  # fmt: skip
def test_text_of_every_type(type_: Any, tmp_path: Path) -> None:
    given = ["plain", "naïve 🙂", "", None, '"quoted"\n']
    values = [v if v is None or "binary" not in str(type_) else v.encode() for v in given]
    path = write(tmp_path / "x.parquet", {"text": pa.array(values).cast(type_)})
    found = [(text.decode(), reason, count) for _, _, text, _, reason, count in rows(path)]
    assert found == [
        ("plain", None, 5),
        ("naïve 🙂", None, 7),
        ("", EMPTY, 0),
        ("", WRONG_TYPE, 0),
        ('"quoted"\n', None, 9),
    ]


def test_what_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "number.parquet", {"text": [1, None], "raw_content": ["a", "b"]})
    assert [row[4] for row in rows(path)] == [WRONG_TYPE] * 2
    nested = [[{"a": "b"}], [["b"]], pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))]
    for value in nested:
        path = write(tmp_path / "nested.parquet", {"text": value, "raw_content": ["a"]})
        assert [row[4] for row in rows(path)] == [WRONG_TYPE]
    path = write(tmp_path / "no.parquet", {"content": ["a", "b"]})
    assert [(row[0], row[4]) for row in rows(path)] == [(1, NO_TEXT), (2, NO_TEXT)]
    values = [b"good", b"\xff", b"\xed\xa0\x80", "cut é".encode()[:-1], b"x" * (1 << 20) + b"\xc3"]
    path = write(tmp_path / "bytes.parquet", {"text": values})
    assert [row[4] for row in rows(path)] == [None, *[NOT_UTF8] * 4]
    assert rows(write(tmp_path / "none.parquet", {"text": pa.array([], pa.string())})) == []


def test_characters_of_long_texts(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "".join(rng.choices("aé東🙂", k=1_500_000))
    ((_, size, content, _, _, count),) = rows(write(tmp_path / "x.parquet", {"text": [text]}))
    assert (size, content.decode(), count) == (len(text.encode()), text, len(text))


def test_slices_from_columns_and_structures(tmp_path: Path) -> None:
    meta = [{"source": "arxiv", "url": "u"}, {"source": None, "url": "u"}, None]
    path = write(tmp_path / "c4.parquet", {"text": ["a", "b", "c"], "meta": meta})
    assert [row[3] for row in rows(path)] == ["arxiv", None, None]
    meta = [{"redpajama_set_name": b"RedPajamaGithub"}, {"redpajama_set_name": b"\xff"}]
    path = write(tmp_path / "slim.parquet", {"text": ["a", "b"], "meta": meta})
    assert [row[3] for row in rows(path)] == ["github", None]
    subset = {"text": ["a", "b"], "red_pajama_subset": ["book", "wikipedia"]}
    assert [row[3] for row in rows(write(tmp_path / "v1.parquet", subset))] == ["book", "wikipedia"]


def test_metadata_of_any_bytes(model: str, tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["a", "b"], "meta": [b"\xff\xfe", b"arxiv"]})
    tokenize([str(path)], model, tmp_path / "out", max_rejected="0")
    assert documents(tmp_path / "out") == expected(tokenizer, ["a", "b"])


def test_long_rows_in_one_group_take_little_memory(tmp_path: Path) -> None:
    table = {"text": [chr(97 + i % 26) * (4 << 20) for i in range(64)]}
    path = write(tmp_path / "x.parquet", table, write_batch_size=1, **PLAIN)  # a page a row
    del table
    (source,) = find_sources([str(path)])
    held = [pa.total_allocated_bytes() for _ in read_rows(source, ("text",), MAX_LINE_BYTES)]
    assert len(held) == 64 and max(held) < 32 << 20


@pytest.mark.parametrize("encoding", ["RLE_DICTIONARY", "DELTA_BYTE_ARRAY"])
def test_a_value_that_is_stored_once_is_not_held_for_many_rows(
    encoding: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {}
    if encoding != "RLE_DICTIONARY":
        options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    path = write(tmp_path / "x.parquet", {"text": ["a" * (8 << 20)] * 20}, **options)
    assert path.stat().st_size < 1 << 20
    (source,) = find_sources([str(path)])
    held = [pa.total_allocated_bytes() for _ in read_rows(source, ("text",), MAX_LINE_BYTES)]
    assert len(held) == 20 and max(held) < 48 << 20


@pytest.mark.parametrize("where", ["text", "meta"])
def test_a_list_of_one_long_value_is_not_read(where: str, tmp_path: Path) -> None:
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), ["a" * (1 << 20)])
    values = pa.ListArray.from_arrays([0, 200], value)
    table = {"text": values}
    if where == "meta":
        table = {"text": ["fine"], "meta": pa.StructArray.from_arrays([values], ["source"])}
    path = write(tmp_path / "x.parquet", table, store_schema=False)
    pool = pa.default_memory_pool()
    before = pool.max_memory()  # only ever grows
    reasons = [row[4] for row in rows(path)]
    assert reasons == [WRONG_TYPE if where == "text" else None]
    assert pool.max_memory() <= max(before, 64 << 20)


def test_several_columns_of_one_name(tmp_path: Path) -> None:
    arrays = [pa.array(["a"]), pa.array(["arxiv"]), pa.array(["book"])]
    names = ["text", "red_pajama_subset", "red_pajama_subset"]
    parquet.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "x.parquet")
    assert [(row[2], row[3]) for row in rows(tmp_path / "x.parquet")] == [(b"a", None)]
    names = ["text", "text", "meta"]
    parquet.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet has several columns named text: write"):
        rows(tmp_path / "x.parquet")


def test_a_huge_row_is_refused_by_its_file_or_rejected_with_its_place(
    model: str, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["one", "a" * (3 << 20), "three"]}, **PLAIN)
    command = ["tokenize", str(path), "--tokenizer", model, "--output", str(tmp_path / "out"),
               "--max-line-bytes", str(2 << 20), "--max-rejected", "1"]  # fmt: skip
    assert main([*command, "--max-window-bytes", str(3 << 20)]) == 2
    said = capsys.readouterr().err
    assert f"{path} needs 3,14" in said and "at once for its metadata and pages" in said
    assert "write 314" in said
    assert not (tmp_path / "out.bin").exists()
    needed = said.split("write ")[1].split(",")[0]
    assert main([*command, "--max-window-bytes", needed]) == 0
    assert documents(tmp_path / "out") == expected(tokenizer, ["one", "three"])
    (record,) = read_lines_of(tmp_path / "out.rejected.jsonl")
    assert record == {
        "file": str(path), "line": 2, "offset": 0, "bytes": 3 << 20, "reason": TOO_LONG,
    }  # fmt: skip


def test_a_huge_row_is_not_copied(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["a", "b" * 5000]}, **PLAIN)
    assert [(row[1], row[2], row[4]) for row in rows(path, most=4999)] == [
        (1, b"a", None),
        (5000, b"", TOO_LONG),
    ]
    assert [row[4] for row in rows(path, most=5000)] == [None, None]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_pages_against_what_was_written(
    version: str, compression: str, dictionary: bool, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    values = [rng.bytes(int(size)).hex() for size in rng.integers(0, 3000, 700)]
    columns = {"text": values, "meta": [{"source": "c4", "url": v[:9]} for v in values]}
    path = write(
        tmp_path / "x.parquet", columns, compression=compression, use_dictionary=dictionary,
        data_page_version=version, data_page_size=20_000, write_batch_size=7, row_group_size=400,
        dictionary_pagesize_limit=50_000, write_page_checksum=True,
    )  # fmt: skip
    pages = pages_of(path, ["text"])
    # Whatever the headers say, pyarrow has filled each page until it held 20,000 bytes.
    largest = 50_000 + 7 * 6000 if dictionary else 20_000 + 7 * 6000
    assert 20_000 <= pages.largest <= largest
    assert pages.largest <= pages.held <= 3 * largest
    more = pages_of(path, ["text", "meta.url", "meta.source"])
    assert more.largest == pages.largest and more.held > pages.held
    assert more == pages_of(path, ["text", "meta"])
    assert pages_of(path, ["tex", "meta.sourc"]) == (0, 0)


def test_the_largest_page_to_the_byte(tmp_path: Path) -> None:
    for count in (1, 3):
        path = write(tmp_path / f"{count}.parquet", {"text": ["a" * 5000] * count}, **PLAIN)
        levels = 6  # none is missing: the length of a run, and the run
        page = count * (4 + 5000) + levels
        assert pages_of(path, ["text"]) == (page, page)
    path = write(tmp_path / "d.parquet", {"text": ["a" * 5000, "b"] * 9}, compression="none")
    dictionary = 4 + 5000 + 4 + 1
    assert pages_of(path, ["text"]) == (
        2 * dictionary + 2 * 16,
        dictionary,
    )


def test_long_statistics_before_a_page(tmp_path: Path) -> None:
    values = [letter * 2000 for letter in "abc"]
    options = {"write_statistics": True, "data_page_size": 1, "write_batch_size": 1, **PLAIN}
    path = write(tmp_path / "x.parquet", {"text": values}, **options)
    # Of each page the least and the greatest value are in its header, and the value in the page.
    assert path.read_bytes().count(b"b" * 2000) == 3
    assert 2000 < pages_of(path, ["text"]).largest < 2020
    assert texts(path) == values


def test_a_flipped_bit_is_found_where_pages_have_checksums(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet", {"text": ["a", "m" * 99, "z"]}, write_page_checksum=True, **PLAIN
    )
    flip_a_bit(path, path.read_bytes().index(b"mmmm") + 7)
    with pytest.raises(Failure, match=r"x\.parquet is truncated or corrupt: .*CRC"):
        rows(path)


def test_damaged_files_fail_in_our_way_or_are_read(tmp_path: Path) -> None:
    rng = random.Random(7)
    original = write(
        tmp_path / "x.parquet",
        {"text": ["some text", "more of it", "🙂" * 50] * 20, "meta": [{"source": "c4"}] * 60},
        data_page_size=300, write_batch_size=5, compression="none", row_group_size=25,
    ).read_bytes()  # fmt: skip
    path = tmp_path / "x.parquet"
    failed = 0
    (source,) = find_sources([str(path)])
    for _ in range(1500):
        damaged = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(4, len(damaged))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(4, len(damaged)) :]
        path.write_bytes(damaged)
        cuts = [0, *sorted(rng.sample(range(source.size), 2)), source.size]
        try:
            # Each row group alone looks whole when it has lost rows.
            counts = [len(list(read_rows(source, ("text",), MAX_LINE_BYTES, *cut)))
                      for cut in pairwise(cuts)]  # fmt: skip
            assert sum(counts) == len(rows(path)) == 60
        except (Failure, UserError):
            failed += 1
    assert 500 < failed < 1500


def test_row_groups_are_shared_out_to_parts_and_tasks(
    reference: Path, texts: list[str], model: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "c4.parquet", {"text": [*texts[:150], "", None, *texts[150:]]},
                 row_group_size=20)  # fmt: skip
    assert len(row_groups(str(path), ())) == 16
    options = Options(part_bytes=5000)
    tokenize([str(path)], model, tmp_path / "out", options, workers=2, max_rejected="1")
    assert outputs(tmp_path / "out") == outputs(reference / "out")
    rejected = read_lines_of(tmp_path / "out.rejected.jsonl")
    assert [(row["line"], row["reason"]) for row in rejected] == [(151, EMPTY), (152, WRONG_TYPE)]
    tasks = [tmp_path / f"t{i}" for i in range(5)]
    for i, task in enumerate(tasks):
        options = Options(part_bytes=5000, task=(i, 5))
        counts = tokenize([str(path)], model, task, options, max_rejected="1")["counts"]
        assert 0 < counts["documents"] < 150
    merge([str(task) for task in tasks], tmp_path / "merged")
    assert outputs(tmp_path / "merged") == outputs(reference / "out")
    files = [file for task in tasks if (file := Path(f"{task}.rejected.jsonl")).exists()]
    assert [row for file in files for row in read_lines_of(file)] == rejected


def test_every_row_group_lies_in_one_range_of_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": [str(i) * i for i in range(90)]},
                 row_group_size=9)  # fmt: skip
    (source,) = find_sources([str(path)])
    whole = [text for _, _, text, *_ in rows(path)]
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.sample(range(source.size), rng.randint(0, 9)))
        found: list[bytes] = []
        for start, end in pairwise([0, *cuts, source.size]):
            assert rows_before(source, start) == len(found)
            part = list(read_rows(source, ("text",), MAX_LINE_BYTES, start, end))
            assert [line.number for line, _ in part] == list(range(1, len(part) + 1))
            found += [document.text for _, document in part]
        assert found == whole


def test_row_groups_that_do_not_lie_in_their_order_keep_it() -> None:
    def group(begin: int, rows: int = 1) -> dict:
        chunk = {3: [b"text"], 5: 1, 7: 9, 9: begin}  # path, values, bytes, first page
        return {1: [{3: chunk}], 3: rows}

    def begins(*groups: dict, rows: int) -> list[int]:
        metadata = {3: rows, 4: list(groups)}
        return [found.begin for found in parquet_pages._groups_of(metadata, 100, ("text",))]

    assert begins(group(40), group(4), group(60), group(20), rows=4) == [40, 40, 60, 60]
    with pytest.raises(ValueError, match="begins at byte 100, behind the file's end"):
        begins(group(4), group(100), rows=2)
    with pytest.raises(ValueError, match="2 rows and not 3"):
        begins(group(4), group(9), rows=3)
    with pytest.raises(ValueError, match="a row group has -1 rows"):
        begins(group(4, 2), group(9, -1), rows=1)


def test_pages_too_wide_in_a_later_row_group(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet", {"text": ["a", "b" * (3 << 20)]}, row_group_size=1, **PLAIN
    )
    (source,) = find_sources([str(path)], 2 << 20)
    later = row_groups(str(path), ())[1].begin
    ((_, document),) = read_rows(source, ("text",), MAX_LINE_BYTES, 0, later)
    assert document.text == b"a"
    for start in (0, later):
        with pytest.raises(
            UserError, match=r"x\.parquet needs 3,.* at once for its metadata and pages"
        ):
            list(read_rows(source, ("text",), MAX_LINE_BYTES, start))


def test_metadata_too_large_to_be_held(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"text": ["a"] * 1999}, row_group_size=1)
    needed = 10 * metadata_bytes(str(path))
    assert 1 << 20 < needed < 10 * path.stat().st_size
    (source,) = find_sources([str(path)], 1 << 20)
    with pytest.raises(
        UserError, match=rf"needs {needed:,} bytes at once for its metadata, .*write {needed},"
    ):
        list(read_rows(source, ("text",), MAX_LINE_BYTES))
    assert len(rows(path)) == 1999
