"""Ids of the compiled kernel against the tokenizer's own library, on every kind of text."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.corpus import find_sources
from data_tools.documents import parse_line
from data_tools.encoding import KernelEncoder, LibraryEncoder, make_encoder, probe_texts
from data_tools.lines import read_lines
from data_tools.tokenizer import load_tokenizer
from data_tools.twin import write_twin

from .conftest import SHARED, library_text, shared

pytest.importorskip("numba")
KINDS = ("sentencepiece", "huggingface")


@pytest.fixture(scope="module")
def pairs(model: str, huggingface: str):
    """Tokenizer and encoder of both kinds."""
    made = {}
    for kind, path in (("sentencepiece", model), ("huggingface", huggingface)):
        tokenizer = load_tokenizer(path)
        encoder = make_encoder(tokenizer)
        assert isinstance(encoder, KernelEncoder), encoder.note
        made[kind] = (tokenizer, encoder)
    return made


def check(pair, texts: list[str]) -> None:
    tokenizer, encoder = pair
    ids, lengths = encoder.encode([text.encode() for text in texts], -1, 2)
    found = np.split(ids, np.cumsum(lengths)[:-1])
    for text, one in zip(texts, found, strict=True):
        assert one.tolist() == [*tokenizer.encode(text).tolist(), 2], ascii(text[:200])


# Letters of the vocabulary make merges likely, the rest of Unicode makes surprises likely.
TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\t\u2581abcdefinorstu_=().,'\"0123456789<>/s"),
        st.characters(exclude_categories=["Cs"]),
    ),
    min_size=1,
    max_size=300,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_random_unicode_gives_the_library_ids(pairs, kind: str, texts: list[str]) -> None:
    check(pairs[kind], texts)


@pytest.mark.parametrize("kind", KINDS)
def test_known_trouble_gives_the_library_ids(pairs, kind: str) -> None:
    check(pairs[kind], probe_texts())
    check(pairs[kind], library_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "unit", [" ", "\n", "=", "a", "\u2581", "\x00", "東", "🙂", " a", "e\u0301"]
)
def test_long_runs_give_the_library_ids(pairs, kind: str, unit: str) -> None:
    sizes = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 50, 1000, 5000)
    check(pairs[kind], [unit * size for size in sizes])
    check(pairs[kind], ["x" + unit * size + "y" for size in sizes])


def test_units_of_every_length_up_to_the_cache_line(pairs) -> None:
    rng = random.Random(3)
    words = ["".join(rng.choices("abdeinorst", k=size)) for size in range(1, 70) for _ in range(20)]
    check(pairs["sentencepiece"], [" ".join(words), *words, *(word + word[::-1] for word in words)])


def test_a_warm_cache_changes_nothing(pairs) -> None:
    for _ in range(3):
        check(pairs["sentencepiece"], library_text()[:2])


def test_an_almost_full_cache_changes_nothing(model: str) -> None:
    from data_tools.kernel import Kernel
    from data_tools.tables import build_tables

    tokenizer = load_tokenizer(model)
    tiny = KernelEncoder(Kernel(build_tables(tokenizer), cache_lines=2), "always")
    check((tokenizer, tiny), library_text()[:2])


def random_merges(spec: dict, rng: random.Random) -> dict:
    """A BPE of "abc" whose merges come in no order: a later, longer piece may go first."""
    kept = {p: i for p, i in spec["model"]["vocab"].items() if p.startswith("<") or p == "\u2581"}
    pieces = list(kept) + list("abc")
    letters = list("abc")
    merges = []
    for _ in range(rng.randint(1, 30)):
        left, right = rng.choice(letters), rng.choice(letters)
        if len(left + right) <= 12 and left + right not in letters:
            letters.append(left + right)
            pieces.append(left + right)
            merges.append([left, right])
    for left, right in rng.sample([(x, y) for x in letters for y in letters], 9):
        if left + right in letters and [left, right] not in merges:  # a second way to a piece
            merges.append([left, right])
    rng.shuffle(merges)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    added = [t | {"id": vocabulary[t["content"]]} for t in spec["added_tokens"]]
    model = spec["model"] | {"vocab": vocabulary, "merges": merges}
    return spec | {"model": model, "added_tokens": added}


@pytest.mark.parametrize("seed", range(16))
def test_a_text_without_cuts_is_merged_in_windows(
    huggingface: str, tmp_path: Path, seed: int
) -> None:
    from data_tools.kernel import Kernel
    from data_tools.tables import build_tables

    rng = random.Random(seed)
    spec = json.loads(Path(huggingface, "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(random_merges(spec, rng)))
    tokenizer = load_tokenizer(tmp_path)
    texts = ["".join(rng.choices("abc", k=rng.randint(33, 400))) for _ in range(40)]
    texts += [
        rng.choice(["a", "ab", "aab", "abc", "abcaab"]) * rng.randint(33, 99) for _ in "12345"
    ]
    texts += ["".join(rng.choices("aabbcc東🙂", k=200)) for _ in range(5)]
    for window in (1, 2, 3, 9, 24, 60):
        encoder = KernelEncoder(Kernel(build_tables(tokenizer), 2, window), "always")
        check((tokenizer, encoder), texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [9, 50, 300])
def test_windows_of_real_text_give_the_library_ids(pairs, kind: str, window: int) -> None:
    from data_tools.kernel import Kernel
    from data_tools.tables import build_tables

    tokenizer = pairs[kind][0]
    encoder = KernelEncoder(Kernel(build_tables(tokenizer), 2, window), "always")
    texts = [" " * 5000, "=" * 3000, "東" * 999, "\u2581" * 777, " a" * 3000]
    check((tokenizer, encoder), [*texts, *(text.replace(" ", "") for text in library_text())])


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_the_text_stay_text(pairs, kind: str) -> None:
    tokenizer, encoder = pairs[kind]
    ids, _ = encoder.encode([b"a<s>b</s>c<unk>d <s> </s>"])
    assert not set(ids.tolist()) & {0, 1, 2}
    assert not set(tokenizer.encode("a<s>b</s>c<unk>d <s> </s>").tolist()) & {0, 1, 2}


def test_both_kinds_agree_and_round_trip(pairs) -> None:
    text = library_text()[0]
    ids = [pairs[kind][0].encode(text).tolist() for kind in KINDS]
    assert ids[0] == ids[1]
    assert [pairs[kind][0].decode(ids[0]) for kind in KINDS] == [text, text]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_metaspace_twins_give_the_library_ids(
    huggingface: str, tmp_path: Path, scheme: str
) -> None:
    spec = json.loads(Path(huggingface, "tokenizer.json").read_text())
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": scheme,
        "split": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, KernelEncoder), encoder.note
    check((tokenizer, encoder), [*probe_texts(), *library_text()[:1]])


TRAINING = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({**IDENTITY, "model_type": "unigram"}, "not BPE"),
        ({"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False}, "normalises"),
        ({"normalization_rule_name": "identity"}, "white space"),
        ({**IDENTITY, "user_defined_symbols": ["<tool>"]}, "user-defined"),
        ({**IDENTITY, "byte_fallback": False}, "byte fallback"),
    ],
)
def test_a_model_the_kernel_cannot_serve_is_left_to_its_library(
    tmp_path: Path, arguments: dict, words: str
) -> None:
    buffer = io.BytesIO()
    lines = iter("\n".join(library_text()[:2]).split("\n"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=buffer, **{**TRAINING, **arguments}
    )
    (tmp_path / "m.model").write_bytes(buffer.getvalue())
    tokenizer = load_tokenizer(tmp_path / "m.model")
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, LibraryEncoder)
    assert words in encoder.note
    check((tokenizer, encoder), ["a  b <tool> ﬁ", " x ", "\n"])


def test_pieces_without_a_dummy_prefix_or_single_characters(tmp_path: Path) -> None:
    """A character may exist only inside longer pieces: it merges, but is no piece itself."""
    from data_tools.space_marks import _fields

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(library_text()[:2]).split("\n")),
        model_writer=buffer,
        **{**TRAINING, **IDENTITY, "add_dummy_prefix": False},
    )
    data = buffer.getvalue()
    # Turn the piece "e" into one that no text holds: "e" then lives inside longer pieces only.
    for field, value in _fields(data):
        if field == 1 and dict(_fields(value)).get(1) == b"e":
            data = data.replace(value, value.replace(b"\n\x01e", b"\n\x01\x7f"), 1)
            break
    (tmp_path / "m.model").write_bytes(data)
    tokenizer = load_tokenizer(tmp_path / "m.model")
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, KernelEncoder), encoder.note
    check((tokenizer, encoder), [*probe_texts(), *library_text()[:2], "eeee ee e", "re the se"])


def test_without_numba_the_library_is_used_and_one_line_says_so(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "data_tools.kernel", None)
    tokenizer = load_tokenizer(model)
    encoder = make_encoder(tokenizer)
    assert isinstance(encoder, LibraryEncoder)
    assert "pip install 'megatron-ext[data]'" in encoder.note
    check((tokenizer, encoder), probe_texts()[:40])


def shared_texts(limit: int) -> list[str]:
    texts = []
    for source in find_sources([str(SHARED / "redpajama_sample")]):
        for line in read_lines(source):
            text = parse_line(line.data).text.decode()
            if len(text) <= limit:
                texts.append(text)
    return texts


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory):
    """The 32k tokenizer of the shared data, of both kinds."""
    path = shared("tokenizers", "mistral_v1_32k", "tokenizer.model")
    folder = tmp_path_factory.mktemp("large")
    shutil.copy(path, folder / "tokenizer.model")
    write_twin(path, folder)
    return {"sentencepiece": load_tokenizer(path), "huggingface": load_tokenizer(folder)}


@pytest.mark.parametrize("kind", KINDS)
def test_shared_sample_gives_the_library_ids(large, kind: str) -> None:
    encoder = make_encoder(large[kind])
    assert isinstance(encoder, KernelEncoder), encoder.note
    texts = shared_texts(20_000)
    check((large[kind], encoder), texts[:: 4 if kind == "sentencepiece" else 8])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_shared_text_gives_the_library_ids(large, kind: str) -> None:
    import gzip

    encoder = make_encoder(large[kind])
    books = [gzip.decompress(p.read_bytes()).decode() for p in (SHARED / "pg_books").glob("*.gz")]
    texts = shared_texts(10**9) + books
    assert len(texts) == 2168
    for text in texts:
        check((large[kind], encoder), [text])


@pytest.mark.slow
def test_ten_megabyte_documents_give_the_library_ids(large) -> None:
    encoder = make_encoder(large["sentencepiece"])
    book = "".join(shared_texts(10**9))[: 10 << 20]
    for text in (book, book.replace("\n", " "), book.replace(" ", ""), " " * (10 << 20)):
        check((large["sentencepiece"], encoder), [text])
