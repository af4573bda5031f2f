"""Retrieval tasks: one fact in a long prompt, asked for at its end.

    task = TASKS["passkey"]
    sample = task.make(kit, 4096, 50.0, np.random.default_rng(0))     # the fact half-way

Prompts are those of their authors, word for word, where these are published: passkey (Landmark
Attention, epfml/landmark-attention), lines (LongEval, DachengLi1/LongChat, in the form of arXiv
2405.14591, figure 8), needle (gkamradt/LLMTest_NeedleInAHaystack). What a base model needs to
answer in the right form stands after the question, and is ours; so is the wording of
first_sentence, which Llama 2 Long (arXiv 2309.16039) describes and does not print. RULER's tasks
are in `ruler.py`. What the small study trains on, passkey's template, has names.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_ext.evaluation.prompts import Ids, Kit, Sample, fill_exactly, insert, room
from megatron_ext.evaluation.words import pairs

Make = Callable[[Kit, int, float, np.random.Generator], Sample]


@dataclass(frozen=True)
class Task:
    """How to make a sample of a length in tokens and a depth in percent."""

    name: str
    make: Make
    has_depth: bool = True
    """Whether the fact can be put anywhere; else its depth is null."""
    needs_text: bool = False
    """Whether it hides the fact in real text."""
    source: str = ""
    """Whose prompt it is."""


PASSKEY_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PASSKEY_FACT = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"


def passkey(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A number from 1 to 50,000 among sentences about grass and sky."""
    key = int(rng.integers(1, 50001))
    head = kit.start(f"{PASSKEY_INTRODUCTION}\n")
    needle = kit.after(".a", PASSKEY_FACT.format(key=key))
    question = kit.after(".a", PASSKEY_QUESTION)
    left = room(length, head, needle, question)
    before = round(left * depth / 100)
    prompt = head + kit.noise(before) + needle + kit.noise(left - before) + question
    return Sample(prompt, kit.after("is", f" {key}"))


LINES_INTRODUCTION = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each "
    "line index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will "
    "ask you to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the "
    "record start:"
)


def lines(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """The number in one of many named lines; names are distinct."""
    names = pairs(rng)

    def line(name: str, value: int) -> Ids:
        return kit.line(f"line {name}: REGISTER_CONTENT is <{value}>\n")

    name, value = next(names), int(rng.integers(1, 50001))
    asked = line(name, value)
    head = kit.start(f"Question: {LINES_INTRODUCTION}\n\n")
    question = kit.line(
        f"\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need "
        f"the number. Answer: The <REGISTER_CONTENT> in line {name} is"
    )
    left = room(length, head, asked, question)
    others, rest = fill_exactly(left, lambda: line(next(names), int(rng.integers(1, 50001))), rng)
    others.insert(round(len(others) * depth / 100), asked)
    prompt = head + rest + [token for unit in others for token in unit] + question
    return Sample(prompt, kit.after("is", f" <{value}>"))


NEEDLE = (
    "\nThe best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny "
    "day.\n"
)
NEEDLE_QUESTION = "What is the best thing to do in San Francisco?"


def needle(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A sentence about San Francisco at the end of a sentence of real text."""
    hidden = kit.after("a", NEEDLE)
    statement, fact = NEEDLE.strip().split(" is ", 1)
    question = kit.after("a", f"\n{NEEDLE_QUESTION} {statement} is")
    left = room(length, kit.start(""), hidden, question)
    text = kit.text(left)
    place = left if depth == 100 else kit.sentence_end(text, int(left * depth / 100))
    prompt = kit.start("") + insert(text, [(place, hidden)]) + question
    return Sample(prompt, kit.after("is", f" {fact}"))


_LONGEST_SENTENCE = 48  # tokens


def first_sentence(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """The first sentence of a real text, which begins at a random sentence of the haystack."""
    question = kit.after("a", "\nThe first sentence of the text above is:")
    left = room(length, kit.start(""), question)
    begin = 0
    for begin in rng.permutation(len(kit.haystack) if kit.haystack is not None else 0)[:10000]:
        opening = kit.text(_LONGEST_SENTENCE + 1, int(begin))
        ends = [i for i, token in enumerate(opening) if kit.ends_sentence(token)]
        if len(ends) > 1 and ends[0] == 0 and ends[1] > 4:
            begin, end = int(begin) + 1, ends[1]
            break
    else:
        begin, end = 0, min(_LONGEST_SENTENCE, left)
    text = kit.text(left, begin)
    sentence = kit.tokenizer.decode(text[:end]).strip()
    return Sample(kit.start("") + text + question, kit.after(":", f" {sentence}"))


BASIC = (
    Task("passkey", passkey, source="epfml/landmark-attention"),
    Task("lines", lines, source="DachengLi1/LongChat, arXiv 2405.14591"),
    Task("needle", needle, needs_text=True, source="gkamradt/LLMTest_NeedleInAHaystack"),
    Task("first_sentence", first_sentence, has_depth=False, needs_text=True, source="our wording"),
)
