"""Prompts have exactly the tokens asked for and their template's very text, with any tokenizer."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_tools.tokenizer import load_tokenizer
from megatron_ext.errors import UserError
from megatron_ext.evaluation.prompts import Kit, fill_exactly
from megatron_ext.evaluation.retrieval import TASKS

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A byte-level BPE, as Llama 3 and Qwen have, whose merges reach over full stop and newline."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(r" ?[^\s\w]+[\r\n]*|\s+(?!\S)| ?\w+|\s+"), "isolated"
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    text = f"{FILLER}\n" * 50 + (corpus.parent / "docs.jsonl").read_text()[:200_000]
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    file = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(params=["sentencepiece", "byte level", "Mistral's"])
def kit(request: pytest.FixtureRequest, corpus: Path) -> Kit:
    if request.param == "sentencepiece":
        tokenizer = load_tokenizer(corpus.parent / "tokenizer.model")
    elif request.param == "byte level":
        tokenizer = load_tokenizer(request.getfixturevalue("byte_level"))
    else:
        folder = request.getfixturevalue("shared") / "data/tokenizers/mistral_v1_32k"
        tokenizer = load_tokenizer(folder)
    text = "A first sentence stands here. Then comes another one, a bit longer than that. " * 60
    return Kit(tokenizer, tokenizer.encode(text + "It all ends."))


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_has_exactly_the_tokens_asked_for(task: str, kit: Kit) -> None:
    for length, depth in ((2400, 0.0), (2401, 37.5), (2777, 100.0)):
        sample = TASKS[task].make(kit, length, depth, np.random.default_rng(length))
        assert len(sample.prompt) == length
        assert sample.answer


def text_of(kit: Kit, ids: list[int]) -> str:
    return kit.tokenizer.decode(ids)


@pytest.mark.parametrize("depth", [0.0, 50.0, 100.0])
def test_the_passkey_prompt_is_that_of_landmark_attention(kit: Kit, depth: float) -> None:
    for length in range(800, 810):
        sample = TASKS["passkey"].make(kit, length, depth, np.random.default_rng(length))
        whole = text_of(kit, sample.prompt + sample.answer)
        lines = whole.split("\n")
        assert len(lines) == 5
        assert lines[0] == (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there."
        )
        key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", lines[2])
        assert key is not None and 1 <= int(key[1]) <= 50000
        assert lines[4] == f"What is the pass key? The pass key is {key[1]}"
        endless = " ".join([FILLER] * 100)
        assert endless.startswith(lines[1]) and endless.startswith(lines[3])
        share = len(lines[1]) / (len(lines[1]) + len(lines[3]))
        assert share == pytest.approx(depth / 100, abs=0.02)


def test_the_lines_prompt_is_that_of_longeval_with_distinct_names(kit: Kit) -> None:
    for depth in (0.0, 50.0, 100.0):
        sample = TASKS["lines"].make(kit, 3000, depth, np.random.default_rng(1))
        whole = text_of(kit, sample.prompt + sample.answer)
        head, record, tail = whole.split("\n\n")
        assert head.startswith("Question: Below is a record of lines I want you to remember. Each")
        assert head.endswith("Now the record start:")
        found = re.findall(r"^line ([a-z]+-[a-z]+): REGISTER_CONTENT is <(\d+)>$", record, re.M)
        lines = record.split("\n")
        assert len(lines) - len(found) in (0, 1)  # the first line may be the end of one
        values = dict(found)
        assert len(values) == len(found) > 20
        assert all(1 <= int(value) <= 50000 for value in values.values())
        asked = re.fullmatch(
            r"Now the record is over\. Tell me what is the <REGISTER_CONTENT> in line (\S+)\? "
            r"I need the number\. Answer: The <REGISTER_CONTENT> in line \1 is <(\d+)>",
            tail,
        )
        assert asked is not None and values[asked[1]] == asked[2]
        place = [name for name, _ in found].index(asked[1])
        assert place / (len(found) - 1) == pytest.approx(depth / 100, abs=0.03)


def test_the_needle_stands_at_the_end_of_a_sentence(kit: Kit) -> None:
    needle = (
        "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day.\n"
    )
    for depth in (10.0, 50.0, 90.0):
        sample = TASKS["needle"].make(kit, 900, depth, np.random.default_rng(1))
        whole = text_of(kit, sample.prompt + sample.answer)
        before, after = whole.split(needle, 1)
        assert before.endswith(".")
        assert len(before) / len(before + after) == pytest.approx(depth / 100, abs=0.15)
        assert after.endswith(
            "\nWhat is the best thing to do in San Francisco? The best thing to do in San "
            "Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
        )


@pytest.mark.parametrize(
    ("task", "needles", "answers"),
    [
        ("single_1", 1, 1), ("single_2", 1, 1), ("single_3", 1, 1), ("multikey_1", 4, 1),
        ("multikey_2", None, 1), ("multikey_3", None, 1), ("multivalue", 4, 4),
        ("multiquery", 4, 4),
    ],
)  # fmt: skip
def test_rulers_needles_are_asked_for_in_its_words(
    task: str, needles: int | None, answers: int, kit: Kit
) -> None:
    sample = TASKS[f"ruler_niah_{task}"].make(kit, 2500, 50.0, np.random.default_rng(2))
    whole = text_of(kit, sample.prompt + sample.answer)
    what = "uuid" if task in ("single_3", "multikey_3") else "number"
    if answers == 1:
        assert whole.startswith(
            f"A special magic {what} is hidden within the following text. Make sure to memorize "
            f"it. I will quiz you about the {what} afterwards.\n"
        )
        question = (
            rf"\nWhat is the special magic {what} for (\S+) mentioned in the provided text\? "
            rf"The special magic {what} for \1 mentioned in the provided text is (\S+)$"
        )
    else:
        assert whole.startswith("Some special magic numbers are hidden within the following text.")
        question = (
            r"\nWhat are all the special magic numbers for (.+) mentioned in the provided text\? "
            r"The special magic numbers for \1 mentioned in the provided text are (.+)$"
        )
    asked = re.search(question, whole)
    assert asked is not None
    assert "\n\n" not in whole
    found = re.findall(rf"One of the special magic {what}s for (\S+) is: (\S+)\.", whole)
    assert len(found) == needles if needles else len(found) > 10
    keys = re.split(r", and |, ", asked[1])
    expected = [value for key in keys for name, value in found if name == key]
    assert re.split(r", and |, ", asked[2]) == expected
    assert len(expected) == answers
    if what == "number":
        assert all(re.fullmatch(r"\d{7}", value) for _, value in found)


def test_no_line_of_rulers_noise_is_empty(kit: Kit) -> None:
    for length in range(800, 850):  # the lengths of two lines, whatever is left of one
        for task in ("ruler_niah_single_1", "ruler_variable_tracking"):
            for depth in (0.0, 100.0):
                sample = TASKS[task].make(kit, length, depth, np.random.default_rng(0))
                assert len(sample.prompt) == length
                assert "\n\n" not in text_of(kit, sample.prompt)


def test_counts_give_the_words_asked_for(kit: Kit) -> None:
    for seed in range(3):
        sample = TASKS["ruler_common_words"].make(kit, 3500, 0.0, np.random.default_rng(seed))
        listed, answer = text_of(kit, sample.prompt + sample.answer).split("\n\nWhich ")
        words = re.findall(r"\d+\. (\S+)", listed)
        numbers = [int(n) for n in re.findall(r"^(\d+)\. \S+$", listed, re.M)]
        assert numbers == list(range(1, len(numbers) + 1))
        common = re.split(r", and |, ", answer.split(" are ")[-1])
        counts = {word: words.count(word) for word in words}
        assert set(common) == set(sorted(counts, key=counts.__getitem__)[-10:])
        assert common == sorted(common, key=words.index)

        sample = TASKS["ruler_frequent_words"].make(kit, 2000, 0.0, np.random.default_rng(seed))
        coded, answer = text_of(kit, sample.prompt + sample.answer).split("\nWhich ")
        words = coded.split("\n", 1)[1].split()
        counts = {word: words.count(word) for word in words}
        assert (
            re.split(r", and |, ", answer.split(" are ")[-1])
            == sorted(counts, key=counts.__getitem__, reverse=True)[:3]
        )


def test_variables_are_those_of_the_chain(kit: Kit) -> None:
    sample = TASKS["ruler_variable_tracking"].make(kit, 1500, 0.0, np.random.default_rng(4))
    whole = text_of(kit, sample.prompt + sample.answer)
    [(name, value)] = re.findall(r"^VAR (\S+) = (\d+)$", whole, re.M)
    chain = [name]
    for new, old in re.findall(r"^VAR (\S+) = VAR (\S+)$", whole, re.M):
        assert old == chain[-1]
        chain.append(new)
    assert len(chain) == 5
    assert whole.endswith(f"with the value {value} are {', '.join(chain[:4])}, and {chain[4]}")


def test_the_first_sentence_is_what_the_text_begins_with(kit: Kit) -> None:
    sample = TASKS["first_sentence"].make(kit, 400, 0.0, np.random.default_rng(5))
    sentence = text_of(kit, sample.answer).strip()
    assert text_of(kit, sample.prompt).strip().startswith(sentence)
    assert sentence.endswith(".") and sentence.count(".") == 1


def test_a_bos_begins_the_prompt_and_counts(kit: Kit) -> None:
    with_bos = Kit(kit.tokenizer, kit.haystack, bos=1)
    for task in TASKS.values():
        sample = task.make(with_bos, 2600, 50.0, np.random.default_rng(0))
        assert len(sample.prompt) == 2600
        assert sample.prompt[0] == 1 and sample.prompt.count(1) == 1


def test_units_add_up_or_one_is_cut() -> None:
    rng = np.random.default_rng(0)
    sizes = iter(rng.integers(7, 12, 10_000).tolist())
    units, rest = fill_exactly(1003, lambda: [0] * next(sizes), rng)
    assert sum(map(len, units)) == 1003 and not rest
    units, rest = fill_exactly(1003, lambda: list(range(10)), rng)
    assert sum(map(len, units)) + len(rest) == 1003
    assert rest == [7, 8, 9]


def test_a_context_that_cannot_hold_the_text_is_refused(kit: Kit) -> None:
    with pytest.raises(UserError, match="a prompt of 20 tokens is too short"):
        TASKS["passkey"].make(kit, 20, 0.0, np.random.default_rng(0))
