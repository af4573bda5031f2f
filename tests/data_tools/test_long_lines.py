"""The compiled way from a long line to its document against the JSON libraries', line by line."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("numba")

from data_tools import long_lines, parts
from data_tools.documents import parse_line
from data_tools.long_lines import parse_long_line
from data_tools.tokenization import tokenize
from data_tools.tokenizer import Tokenizer
from tests.conftest import ROOT

from .conftest import documents, expected, write_jsonl

# Of all widths in UTF-8, all kinds of escapes, a surrogate pair; the longest string of its line.
LINE = (
    rb'{"meta": {"source": "c4", "n": [1, "\""]}, "text": "plain text, \"quoted\" \\ \/ \b\f\n\r\t '
    rb"\u0041\u00e9\u2581\uFFff\ud83d\ude00 "
    + "é\u2581\U0001f642中".encode()
    + rb' and the end", "z": null}'
)


@pytest.fixture(autouse=True, scope="module")
def however_short():
    """Every line takes the compiled way, if its text is more than half of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_lines, "LONG", 0)
        parse_long_line(LINE)  # compiled here and not within a test that is timed
        yield


def check(line: bytes, *keys: str) -> None:
    keys = keys or ("text", "raw_content")
    assert parse_long_line(line, keys) == parse_line(line, keys), line


@given(st.text(), st.booleans(), st.text(max_size=5), st.text(max_size=5))
@example(
    "\x00" * 9 + "\x1f\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff", True, "", ""
)
@example("\ud83d", True, "", "")
@example("a\ude00\ud83d", True, "", "")
def test_any_text(text: str, escaped: bool, before: str, after: str) -> None:
    value = {"a": before, "text": text, "b": [after]}
    line = json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass")
    check(line)


@given(st.data())
def test_any_damage(data: st.DataObject) -> None:
    line = bytearray(LINE)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(line)))
        end = start + data.draw(st.integers(0, 3))
        line[start:end] = data.draw(
            st.sampled_from([b"", b'"', b"\\", b"\\u", b"\n", b"\xff", b"\xed", b"0", b"{", b"}"])
            | st.binary(max_size=4)
        )
    check(bytes(line))


def test_every_byte_everywhere() -> None:
    for place in range(len(LINE)):
        check(LINE[:place])
        for byte in range(256):
            check(LINE[:place] + bytes([byte]) + LINE[place + 1 :])


def test_every_two_bytes_and_every_escape() -> None:
    """Two bytes at a time, for all lengths of a character; every \\u, every pair of surrogates'
    halves."""
    for first in range(256):
        for second in range(256):
            check(b'{"text": "%s"}' % bytes([first, second]))
            check(b'{"text": "%s\x80"}' % bytes([first, second]))
            check(b'{"text": "%s\xbf\xbf"}' % bytes([first, second]))
    for code in range(0x10000):
        check(b'{"text": "\\u%04x"}' % code)
    for high in range(0xD7F0, 0xE010, 7):
        for low in range(0xDBF0, 0xE010, 13):
            check(b'{"text": "\\u%04X\\u%04x"}' % (high, low))


def test_the_end_of_a_line_at_every_distance_from_the_last_eight_bytes() -> None:
    for size in range(40):
        for tail in (b'"}', b'"', b"", b"\\", b"\\u00e", b"\xe2\x96", b'\\"}', b'"} ', b'"}}'):
            check(b'{"text": "' + b"x" * size + tail)


STAND_IN = long_lines._STAND_IN_BYTES


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": %s, "b": "long enough to be more than half of the whole line"}' % STAND_IN,
        b'{"text": %s.0, "b": "long enough to be more than half of the whole line"}' % STAND_IN,
        b'{"text": "more than half of the whole line, surely", "text": "b"}',
        b'{"text": "b", "text": "more than half of the whole line, surely"}',
        b'{"text": null, "raw_content": "more than half of the whole line, surely"}',
        b'{"raw_content": "more than half of the whole line, surely", "text": "b"}',
        b'{"raw_content": "more than half of the whole line, surely"}',
        b'{"more than half of the whole line is a key, of all things": "a", "text": "b"}',
        b'{"text": ["more than half of the whole line, surely, in a list"]}',
        b'{"text": 1"more than half of the whole line, surely"}',
        b'{"text": -"more than half of the whole line, surely"}',
        b'{"text": "more than half of the whole line, surely"0}',
        b'{"text": "more than half of the whole line, surely".0}',
        b'{"text": "more than half of the whole line, surely"e0}',
        b'{"text": "more than half of the whole line, surely" "b"}',
        b'"more than half of the whole line, surely"',
        b'["text", "more than half of the whole line, surely"]',
        b'\xef\xbb\xbf{"text": "more than half of the whole line, surely"}',
        b'{"n": NaN, "text": "more than half of the whole line, surely"}',
        b'{"text": "more than half of the whole line, surely", "n": Infinity}',
        b'{"te\\u0078t": "more than half of the whole line, surely"}',
        b'{"text": "%s, more than half of the whole line, surely"}' % STAND_IN,
        b'{"a": %s, "text": "more than half of the whole line, surely"}' % STAND_IN,
        b'{"text": "", "b": 1}',
        b'""',
        b'"',
        b"",
        b"{" * 5000 + b'"' + b"x" * 9000 + b'"' + b"}" * 5000,
        b'{"text": "' + b"x" * 9000 + b'", "a": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    ],
)
def test_what_could_be_taken_for_the_text(line: bytes) -> None:
    check(line)
    check(line, "b", "text")


@pytest.mark.parametrize("name", ["red_pajama_subset", "meta"])
def test_a_text_under_the_name_of_a_slice(name: str) -> None:
    for meta in (b"", b', "meta": {"source": "arxiv"}', b', "red_pajama_subset": "c4"'):
        check(b'{"%s": "C4/%s"%s}' % (name.encode(), b"x" * 200, meta), name)


def test_a_long_text_never_becomes_a_str(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    alphabet = 'abcdefgh \n"\\é\u2581中\U0001f642'
    text = "".join(rng.choices(alphabet, k=200_000))
    line = json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaBook"}}).encode()
    expected = parse_line(line)
    monkeypatch.setattr(long_lines, "parse_line", None)
    document = parse_long_line(line)
    assert document == expected
    assert document.text.decode() == text and document.characters == len(text)
    assert document.slice == "book"


@pytest.mark.parametrize("around", [b'"', b"\\", b"A", b"\x80"])
def test_nothing_outside_of_a_line_is_read_or_written(around: bytes) -> None:
    body = LINE[LINE.index(b'"plain') :]
    for end in range(1, len(body) + 1):
        for line in (body[:end], body[:end] + b'"', b'"' + b"x" * (end % 17) + b'"'):
            memory = np.frombuffer(around * 64 + line + around * 64, dtype=np.uint8)
            out = np.full(len(memory), 0xA5, dtype=np.uint8)
            inside = slice(64, 64 + len(line))
            alone = np.empty(len(line), dtype=np.uint8)
            expected = long_lines._longest(np.frombuffer(line, dtype=np.uint8), alone)
            assert long_lines._longest(memory[inside], out[inside]) == expected
            assert bytes(out[inside][: expected[2]]) == bytes(alone[: expected[2]])
            assert (out[:64] == 0xA5).all() and (out[inside.stop :] == 0xA5).all()


def test_tokenize_reads_long_lines_so(
    model: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (long_lines, parts):
        monkeypatch.setattr(module, "parse_line", None)
    text = "naïve café 東京 🙂\n" * 9
    write_jsonl(tmp_path / "c4.jsonl", [text])
    tokenize([str(tmp_path / "c4.jsonl")], model, tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == expected(tokenizer, [text])


def test_lines_that_are_not_long_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_lines, "LONG", 1 << 16)
    monkeypatch.setattr(long_lines, "_longest", None)
    assert parse_long_line(LINE) == parse_line(LINE)


def test_compiled_code_lies_in_a_place_of_its_own_beside_others(tmp_path) -> None:
    """Of NUMBA_CACHE_DIR, which other packages share, or of the user's cache folder."""
    code = (
        "from data_tools.long_lines import LONG, parse_long_line; parse_long_line(bytes(LONG));"
        "import numba; print(numba.config.CACHE_DIR)"
    )
    for name, value, folder in (
        ("NUMBA_CACHE_DIR", tmp_path / "own", tmp_path / "own"),
        ("XDG_CACHE_HOME", tmp_path / "cache", tmp_path / "cache/megatron-ext/numba"),
    ):
        environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, name: str(value)}, cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == ("" if name == "XDG_CACHE_HOME" else str(value))
        (place,) = folder.iterdir()
        assert {file.suffix for file in place.rglob("*") if file.is_file()} == {".nbi", ".nbc"}
