"""Long texts in pieces: the ids are those of the text as a whole, or it is given whole."""

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data_tools.cli import main
from data_tools.long_texts import _SPACES, PIECE, cut, huggingface_place, sentencepiece_place
from data_tools.options import Options
from data_tools.space_marks import parse_model
from data_tools.tokenization import tokenize
from data_tools.tokenizer import load_tokenizer

from .conftest import documents, read_lines_of, write_jsonl

TEXT = (
    "the cat's hat isn't a 12 345 x\n\n  of  they'll\tn A b'S I d' t l'l été 中文 a \u0301b e c "
    "Это книга. Да?\nНет 中文。\n中 x/\ny (a) b.\nc the a of كتاب في كتاب في 。\n中"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = rf"{ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
).replace(r"\r\n", "\r\n")  # as in its file
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
HAN_KANA, HAN_MORE = "[一-龥぀-ゟ゠-ヿ]+", "[一-龥ࠀ-一가-퟿]+"


def splits(*patterns: str, last=BYTES, **options) -> pre_tokenizers.PreTokenizer:
    options = {"behavior": "isolated", **options}
    return pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(Regex(pattern), **options) for pattern in patterns), last]
    )


PATTERNS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "GPT-2": lambda: GPT2,
    "StarCoder 2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), GPT2]
    ),
    "Falcon": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("contiguous"), GPT2, pre_tokenizers.Digits(False),
         pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]
    ),
    "Qwen 2": lambda: splits(QWEN),
    "Qwen 3.5": lambda: splits(
        QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
    ),
    "Llama 3": lambda: splits(LLAMA3),
    "Phi-4, OLMo 2": lambda: splits(LLAMA3, behavior="removed", invert=True),
    "Tekken": lambda: splits(TEKKEN),
    "GPT-4o": lambda: splits(
        TEKKEN.replace(f"{LOWER}+|", f"{LOWER}+{ENDING}?|")
        .replace(f"{LOWER}*|", f"{LOWER}*{ENDING}?|")
        .replace(r"\p{N}|", r"\p{N}{1,3}|")
    ),
    "BLOOM": lambda: splits(BLOOM),
    "DeepSeek V3": lambda: splits(r"\p{N}{1,3}", HAN_KANA, DEEPSEEK3),
    "DeepSeek V2": lambda: splits(
        r"[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺА-я]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$",
        HAN_MORE,
        last=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    ),
    "DeepSeek Coder": lambda: splits(
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_MORE,
        last=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    ),
    "white space at an end apart": lambda: splits(r"\s+(?!\S)", QWEN),
}  # fmt: skip
REPLACE = normalizers.Replace(" ", "▁")
PREPEND = normalizers.Prepend("▁")
# Their pre-tokenizer while they are trained, as sentencepiece does it, and in use.
MARKS: dict[str, tuple] = {
    "Llama 2": (normalizers.Sequence([PREPEND, REPLACE]), None),
    "Mistral": (normalizers.Sequence([REPLACE, PREPEND]), None),
    "Gemma": (REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    "newlines within pieces": (REPLACE, None),
    "Metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Metaspace split": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "Metaspace never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
}
MODELS: dict[str, dict] = {
    "Llama 2's": {"byte_fallback": True, "remove_extra_whitespaces": False},
    "Gemma's": {"byte_fallback": True, "remove_extra_whitespaces": False, "add_dummy_prefix": False,
                "user_defined_symbols": ["\n", "\n\n", "▁▁", "the", "<b>"]},
    "white space removed": {"user_defined_symbols": ["the", "x", "▁▁"]},
}  # fmt: skip


def train(pre_tokenizer, normalizer=None, marks=False, **model) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>", "<unk>"], show_progress=False,
        initial_alphabet=["▁", "\n"] if marks else pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # Every pair merges that the pre-tokenizer allows: words, and what is around them.
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    return tokenizer


def train_marks(name: str) -> Tokenizer:
    lines = [] if "newlines" in name else [pre_tokenizers.Split("\n", "isolated")]
    cutting = pre_tokenizers.Sequence([*lines, pre_tokenizers.Metaspace()])
    tokenizer = train(cutting, marks=True, unk_token="<unk>", fuse_unk=True)
    spec = json.loads(tokenizer.to_str())
    normalizer, pre_tokenizer = MARKS[name]
    for key, step in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        spec[key] = step and json.loads(step.__getstate__())
    return Tokenizer.from_str(json.dumps(spec))


def train_model(**options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 400, "hard_vocab_limit": False,
               "normalization_rule_name": "identity", **options}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 9), model_writer=model, minloglevel=2, **options
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def place_of(tokenizer):
    if isinstance(tokenizer, Tokenizer):
        return huggingface_place(json.loads(tokenizer.to_str()))
    return sentencepiece_place(parse_model(tokenizer.serialized_model_proto()))


def encode(tokenizer, text: str) -> list[int]:
    return (
        tokenizer.encode(text).ids if isinstance(tokenizer, Tokenizer) else tokenizer.encode(text)
    )


FAMILIES = {
    **{name: lambda make=make: train(make(), normalizers.NFC()) for name, make in PATTERNS.items()},
    **{name: lambda name=name: train_marks(name) for name in MARKS},
    **{f"sentencepiece, {name}": lambda o=o: train_model(**o) for name, o in MODELS.items()},
}
WORDS = [*TEXT.split(" "), *"abIS'\n\t 1é中\u0301 .я/ſ²\u3000▁"]
HARD = st.lists(st.sampled_from(WORDS), max_size=30)


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest):
    return FAMILIES[request.param]()


@settings(max_examples=150, deadline=None)
@given(text=HARD)
def test_pieces_have_the_ids_of_the_whole(tokenizer, text: list[str]) -> None:
    place = place_of(tokenizer)
    assert place is not None
    for whole in (" ".join(text), "".join(text)):
        ids = [i for piece in cut(whole, place, size=3) for i in encode(tokenizer, piece)]
        assert ids == encode(tokenizer, whole)


def test_a_book_is_cut_into_pieces_of_about_a_size(tokenizer) -> None:
    pieces = list(cut("some words " * 1000, place_of(tokenizer), size=100))
    assert max(map(len, pieces)) <= 105 and len(pieces) > 90


@pytest.mark.parametrize("family", ["GPT-2", "GPT-4o", "DeepSeek V3", "BLOOM", "Falcon"])
@pytest.mark.parametrize("text", ["Это книга ", "中文。\n", "한국어 책\n"])
def test_other_alphabets_are_cut_too(family: str, text: str) -> None:
    pieces = list(cut(text * 100, place_of(FAMILIES[family]()), size=20))
    assert max(map(len, pieces)) <= 30


def test_a_text_without_a_place_is_one_piece() -> None:
    assert list(cut("中" * 1000, _SPACES, size=100)) == ["中" * 1000]


GIVEN_WHOLE = {
    "prefix space": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lines": lambda: train(pre_tokenizers.Split(Regex(r"\n"), "isolated")),
    "nothing cut": lambda: train(BYTES),
    "cut after the bytes are mapped": lambda: train(pre_tokenizers.Sequence([BYTES, GPT2])),
    "a string apart": lambda: train(
        pre_tokenizers.Sequence([pre_tokenizers.Split("a b", "isolated"), GPT2])
    ),
    "BLOOM's pattern, a space at the end of what is left for it": lambda: train(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splits(BLOOM)])
    ),
    "unknown alternative": lambda: train(splits(r"\p{L}+ \p{L}+|\s+")),
    "alternatives that are one group": lambda: train(splits(r"(?:\p{N}|\s+)")),
    "spaces go to the word before": lambda: train(splits(QWEN, behavior="merged_with_previous")),
    "normaliser": lambda: train(GPT2, normalizers.Replace(" ", "_")),
    "NFKC": lambda: train(GPT2, normalizers.NFKC()),
    "Unigram": lambda: train_model(model_type="unigram", vocab_size=100),
    "sentencepiece's normaliser": lambda: train_model(normalization_rule_name="nmt_nfkc"),
    "mark after the word": lambda: train_model(treat_whitespace_as_suffix=True),
    "spaces lost": lambda: train_model(add_dummy_prefix=False),
}


@pytest.mark.parametrize("name", GIVEN_WHOLE)
def test_others_are_given_the_whole_text(name: str) -> None:
    assert place_of(GIVEN_WHOLE[name]()) is None


def test_no_piece_goes_over_a_place() -> None:
    """Trained without cutting at spaces, pieces hold some: those characters make no place."""
    tokenizer = train_model(split_by_whitespace=False, vocab_size=120)
    pieces = map(tokenizer.id_to_piece, range(tokenizer.vocab_size()))
    before = {a for piece in pieces for a, b in pairwise(piece) if b == "▁"}
    assert before - {"▁"}
    place = place_of(tokenizer)
    assert not any(place.search(f"{a} b") for a in before)


def test_what_unknown_characters_become_merges_over_no_place() -> None:
    spec = json.loads(FAMILIES["Llama 2"]().to_str())
    assert huggingface_place(spec)
    for change in (
        {"ignore_merges": True},
        {"vocab": spec["model"]["vocab"] | {"<0xE4>▁": 600}},
        {"unk_token": None},  # unknown characters are left out: their neighbours meet
    ):
        assert huggingface_place(spec | {"model": spec["model"] | change}) is None


def test_a_newline_that_only_a_control_token_knows_is_no_place() -> None:
    tokenizer = FAMILIES["Gemma"]()
    spec = json.loads(tokenizer.to_str())
    assert huggingface_place(spec).search("a\nb")
    newline = spec["added_tokens"][0] | {"id": 700, "content": "\n", "special": True}
    del spec["model"]["vocab"]["\n"]
    spec["added_tokens"].append(newline)
    assert not huggingface_place(spec).search("a\nb")


def test_a_text_with_two_spaces_in_front_is_given_whole() -> None:
    spec = json.loads(FAMILIES["Llama 2"]().to_str())
    steps = spec["normalizer"]["normalizers"]
    assert huggingface_place(spec)
    spec["normalizer"]["normalizers"] = [steps[0], *steps]
    assert huggingface_place(spec) is None


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("GPT-2", AddedToken("a b")),
        ("GPT-2", AddedToken("a", rstrip=True)),
        ("GPT-2", AddedToken("b", single_word=True)),
        ("GPT-2", AddedToken("x\ny", special=True)),
        ("Llama 2", AddedToken("x")),  # the piece after a place begins with it, without a prefix
    ],
)
def test_an_added_token_that_reaches_over_a_place(family: str, token: AddedToken) -> None:
    tokenizer = FAMILIES[family]()
    tokenizer.add_tokens([token])
    assert place_of(tokenizer) is None


def test_added_tokens_of_spaces_reach_over_none() -> None:
    tokenizer = FAMILIES["GPT-2"]()
    tokenizer.add_tokens([AddedToken("  "), AddedToken("   ")])  # GPT-NeoX's
    text = "a b  c   d e"
    pieces = list(cut(text, place_of(tokenizer), size=1))
    assert len(pieces) > 1
    assert [i for p in pieces for i in encode(tokenizer, p)] == encode(tokenizer, text)


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_library_is_given_a_long_text_in_pieces(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"tokenizer.{kind}"
    if kind == "model":
        file.write_bytes(train_model().serialized_model_proto())
    else:
        FAMILIES["Llama 2"]().save(str(file))
    tokenizer = load_tokenizer(file)
    text = "the cats of a hat  isn't\n" * (PIECE // 10)
    whole, given_sizes, encode_given = tokenizer._encode([text])[0], [], tokenizer._encode

    def spy(texts: list[str]) -> list[np.ndarray]:
        given_sizes.extend(map(len, texts))
        return encode_given(texts)

    monkeypatch.setattr(tokenizer, "_encode", spy)
    assert np.array_equal(tokenizer.encode(text), whole)
    assert len(given_sizes) == 3 and max(given_sizes) < PIECE + 100
    for one, wanted in zip(tokenizer.encode_batch([text, "the"]), [text, "the"], strict=True):
        assert np.array_equal(one, encode_given([wanted])[0])


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("cuts", [True, False])
def test_what_a_library_would_be_given_whole_is_rejected_with_its_place(
    kind: str, cuts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"tokenizer.{kind}"
    if kind == "model":
        model = train_model() if cuts else train_model(model_type="unigram", vocab_size=100)
        file.write_bytes(model.serialized_model_proto())
    else:
        made = FAMILIES["Llama 2"]()
        if not cuts:
            made.normalizer = normalizers.Sequence([normalizers.NFKC(), made.normalizer])
        made.save(str(file))
    least = 4 * PIECE
    book = "the cat's hat isn't é\n" * 60_000
    texts = ["short", book, "a" * least, "b" * (least + 1), "the end"]
    write_jsonl(tmp_path / "x.jsonl", texts)
    command = ["tokenize", str(tmp_path / "x.jsonl"), "--tokenizer", str(file), "--no-append-eod",
               "--no-fast", "--output", str(tmp_path / "out")]  # fmt: skip
    assert main([*command, "--max-uncut-bytes", str(least - 1)]) == 2
    assert f"{least - 1} is too small: write {least} or more" in capsys.readouterr().err
    assert main(command) == 2
    reason = "more than --max-uncut-bytes in one piece"
    assert f"{2 - cuts} {reason}" in capsys.readouterr().err
    assert main([*command, "--max-rejected", "2"]) == 0
    rejected = [(r["line"], r["reason"]) for r in read_lines_of(tmp_path / "out.rejected.jsonl")]
    assert rejected == [(line, reason) for line in ((4,) if cuts else (2, 4))]
    assert main([*command, "--max-uncut-bytes", "0"]) == 2  # made with other options
    assert main([*command, "--max-uncut-bytes", "0", "--overwrite"]) == 0
    tokenizer = load_tokenizer(file)
    assert documents(tmp_path / "out") == [tokenizer._encode([t])[0].tolist() for t in texts]


def test_what_a_normaliser_makes_long_counts_as_that(tmp_path: Path) -> None:
    """NFKC writes U+FDFA as 18 characters."""
    made = FAMILIES["Llama 2"]()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), made.normalizer])
    made.save(str(tmp_path / "tokenizer.json"))
    count = 4 * PIECE // 18
    texts = ["\ufdfa" * count, "\ufdfa" * (count + 1), "short"]
    write_jsonl(tmp_path / "x.jsonl", texts)
    tokenize([str(tmp_path / "x.jsonl")], tmp_path / "tokenizer.json", tmp_path / "out",
             Options(append_eod=False), max_rejected="1")  # fmt: skip
    (rejected,) = read_lines_of(tmp_path / "out.rejected.jsonl")
    assert rejected["line"] == 2
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert documents(tmp_path / "out") == [
        tokenizer._encode([text])[0].tolist() for text in (texts[0], texts[2])
    ]


def test_what_the_kernel_and_the_library_made_is_not_mixed(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["short", "b" * (4 * PIECE + 1), "the end"])
    command = ["tokenize", str(tmp_path / "x.jsonl"), "--tokenizer", model, "--max-rejected", "1"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert main([*command, "--output", str(tmp_path / "out"), "--no-fast"]) == 2
    for task in range(2):
        fast = ["--fast", "--no-fast"][task]
        assert main([*command, "--output", str(tmp_path / "t"), "--task", f"{task}/2", fast]) == 0
    capsys.readouterr()
    tasks = [str(path) for path in sorted(tmp_path.glob("t.*.idx"))]
    assert main(["merge", *tasks, "--output", str(tmp_path / "all")]) == 2
    assert "different options" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "a"), "--max-uncut-bytes", "0"]) == 0
    slow = ["--no-fast", "--max-uncut-bytes", "0"]
    assert main([*command, "--output", str(tmp_path / "a"), *slow]) == 0
    assert "already done" in capsys.readouterr().out
