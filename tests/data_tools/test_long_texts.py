"""Long texts in pieces: the ids of a Hugging Face tokenizer are those of the text as a whole."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_tools.long_texts import _WORDS, cut, cuts_at_words

BYTES = {"add_prefix_space": False}
LLAMA3 = _WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CUTTING = {
    "GPT-2": lambda: pre_tokenizers.ByteLevel(**BYTES),
    "Llama 3": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
         pre_tokenizers.ByteLevel(**BYTES, use_regex=False)]
    ),
    "Qwen": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"),
         pre_tokenizers.ByteLevel(**BYTES, use_regex=False)]
    ),
    "digits apart": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**BYTES)]
    ),
}  # fmt: skip
TEXT = "the cat's hat isn't a 12 345 x\n\n  of  they'll\tn A b'S I d' t l'l été 中文 a \u0301b e c"


def train(pre_tokenizer, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # Every pair merges that the pre-tokenizer allows: words, and what is around them.
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=CUTTING)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train(CUTTING[request.param](), normalizers.NFC())


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(TEXT.split(" ") + list("abIS'\n\t 1é中\u0301")), max_size=30))
def test_pieces_have_the_ids_of_the_whole(tokenizer: Tokenizer, text: list[str]) -> None:
    assert cuts_at_words(json.loads(tokenizer.to_str()))
    for whole in (" ".join(text), "".join(text)):
        pieces = cut(whole, size=3)
        assert "".join(pieces) == whole
        ids = [i for piece in pieces for i in tokenizer.encode(piece).ids]
        assert ids == tokenizer.encode(whole).ids


def test_a_text_is_cut_into_pieces_of_about_a_size() -> None:
    pieces = cut("word " * 1000, size=100)
    assert max(map(len, pieces)) <= 105 and len(pieces) > 45
    assert cut("中" * 1000, size=100) == ["中" * 1000]


@pytest.mark.parametrize(
    "tokenizer",
    [
        train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        train(pre_tokenizers.Metaspace()),
        train(pre_tokenizers.Split(Regex(r"\n"), "isolated")),
        train(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Replace(" ", "_")),
    ],
    ids=["prefix space", "metaspace", "lines", "nothing cut", "normaliser"],
)
def test_others_are_given_the_whole_text(tokenizer: Tokenizer) -> None:
    assert not cuts_at_words(json.loads(tokenizer.to_str()))


def test_an_added_token_with_a_space_is_not_cut() -> None:
    tokenizer = train(CUTTING["GPT-2"]())
    tokenizer.add_tokens(["a b"])
    assert not cuts_at_words(json.loads(tokenizer.to_str()))
