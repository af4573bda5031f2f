"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654) at token-exact lengths.

    RULER["ruler_niah_multikey_1"].make(kit, 4096, 50.0, np.random.default_rng(0))

The needle tasks have RULER's own prompt and needles (NVIDIA/RULER, constants.py); names are our
adjective-noun pairs. Variable tracking, common and frequent words follow RULER's construction
(hops, repetitions, the Zipf exponent) in our wording, which also says the order of the answer,
because an answer of several parts is scored token by token. Figures compare between models here,
not with RULER's published table, which counts parts found anywhere in a generated text.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_ext.evaluation.prompts import (
    NOISE,
    Ids,
    Kit,
    Sample,
    fill_exactly,
    insert,
    room,
    too_short,
)
from megatron_ext.evaluation.tasks import Task
from megatron_ext.evaluation.words import made_up_words, pairs, random_uuid

_DEPTHS = np.linspace(0, 100, 40).round()
_FREQUENT, _RARE = 30, 3  # how often common words and the others stand in the list
_COMMON = 10
_ZIPF = 2.0


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: `keys` of them, of which the first `queries` are asked for, with
    `values` each."""

    haystack: str  # noise, text or needles
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
        key = self._keys(rng)
        names = [next(key) for _ in range(self.keys)]
        facts = [(name, self._value(rng)) for name in names for _ in range(self.values)]
        answers = [value for _, value in facts[: self.queries * self.values]]
        one = len(answers) == 1
        kind = self.value.removesuffix("s") if one else self.value
        query = joined(names[: self.queries])
        introduction = (
            f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within "
            "the following text. Make sure to memorize it. I will quiz you about the "
            f"{kind} afterwards.\n"
        )
        head = kit.start(introduction)
        # Text is followed by a line break; a context made of lines ends in its own.
        before, line_break = ("a", "\n") if self.haystack == "text" else ("a\n", "")
        tail = kit.after(
            before,
            f"{line_break}What {'is' if one else 'are all'} the special magic {kind} for {query} "
            f"mentioned in the provided text? The special magic {kind} for {query} mentioned in "
            f"the provided text {'is' if one else 'are'}",
        )
        # One needle that is asked for stands at the depth asked for; several are named in order.
        depths = sorted(rng.choice(_DEPTHS, len(facts)).tolist())
        if one:
            depths = [depth, *rng.permutation(depths[1:]).tolist()]
        context = self._context(kit, length, (head, tail), facts, depths, rng)
        return Sample(
            head + context + tail, kit.after("is" if one else "are", " " + joined(answers))
        )

    def _context(
        self,
        kit: Kit,
        length: int,
        frame: tuple[Ids, Ids],
        facts: list[tuple[str, str]],
        depths: list[float],
        rng: np.random.Generator,
    ) -> Ids:
        if self.haystack == "text":
            needles = [kit.after(".", f" {self._needle(*fact)}") for fact in facts]
            text = kit.text(room(length, *frame, *needles))
            places = [
                len(text) if d == 100 else kit.sentence_end(text, int(len(text) * d / 100))
                for d in depths
            ]
            return insert(text, list(zip(places, needles, strict=True)))
        needles = [kit.line(f"{self._needle(*fact)}\n") for fact in facts]
        left = room(length, *frame, *needles)
        if self.haystack == "noise":
            return _among_noise(kit, left, needles, depths)
        others = self._keys(rng, skip={name for name, _ in facts})
        units, rest = fill_exactly(
            left, lambda: kit.line(f"{self._needle(next(others), self._value(rng))}\n"), rng
        )
        for needle, d in zip(needles, depths, strict=True):
            units.insert(round(len(units) * d / 100), needle)
        return rest + [token for unit in units for token in unit]

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _keys(self, rng: np.random.Generator, skip: set[str] = frozenset()) -> Iterator[str]:  # type: ignore[assignment]
        names = pairs(rng) if self.key == "words" else iter(lambda: random_uuid(rng), None)
        return (name for name in names if name not in skip)

    def _value(self, rng: np.random.Generator) -> str:
        if self.value == "uuids":
            return random_uuid(rng)
        return str(rng.integers(10**6, 10**7))  # 7 digits


def variable_tracking(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """One chain of assignments over 4 hops, in order, among noise; asked for are all its names."""
    words = made_up_words(rng, 2)
    names = [next(words).upper() for _ in range(5)]
    value = str(rng.integers(10**4, 10**5))
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    head = kit.start("Follow the assignments of variables that are hidden in the text below.\n")
    tail = kit.line(
        f"Which variables have the value {value}, first the one that was given it and then "
        f"each in the order of assignment? The variables with the value {value} are",
    )
    needles = [kit.line(f"{assignment}\n") for assignment in assignments]
    depths = sorted(float(rng.choice(_DEPTHS)) for _ in needles)
    context = _among_noise(kit, room(length, head, tail, *needles), needles, depths)
    return Sample(head + context + tail, kit.after("are", " " + joined(names)))


def common_words(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """A numbered list in which 10 words stand more often than the others."""
    words = made_up_words(rng)
    common = [next(words) for _ in range(_COMMON)]
    head = kit.start("Below is a numbered list of words, some of which stand in it more often.\n")
    tail = kit.line(
        f"\nWhich {_COMMON} words stand in the list most often, in the order in which each first "
        f"appears? The {_COMMON} most common words are"
    )
    left = room(length, head, tail)
    size = len(kit.line("100. " + common[0] + "\n"))
    count = left // (size + 2)  # leaves room for numbers of more digits
    often = min(_FREQUENT, count // (2 * _COMMON))  # half of a short list
    if often < _RARE + 2:
        raise too_short(length)
    listed = common * often
    while len(listed) < count:
        listed += [next(words)] * _RARE
    order = [listed[i] for i in rng.permutation(len(listed))]
    units: list[Ids] = []
    for word in itertools.chain(order, words):
        unit = kit.line(f"{len(units) + 1}. {word}\n")
        if len(unit) > left:
            break
        units.append(unit)
        left -= len(unit)
    # What is left is less than a line: the end of a line of words, which counts nowhere.
    rest = kit.line(" ".join(itertools.islice(words, 9)) + "\n")
    text = rest[len(rest) - left :] + [token for unit in units for token in unit]
    seen = kit.tokenizer.decode(text).split()
    ranked = sorted(common, key=seen.index) if all(w in seen for w in common) else common
    return Sample(head + text + tail, kit.after("are", " " + joined(ranked)))


def frequent_words(kit: Kit, length: int, depth: float, rng: np.random.Generator) -> Sample:
    """Made-up words whose counts fall as 1/rank^2; asked for are the three most frequent."""
    words = made_up_words(rng, 2)
    ranks = [next(words) for _ in range(200)]
    head = kit.start("Read the coded text below and mark how often each coded word appears.\n")
    tail = kit.line(
        "\nWhich three words appear most often in the coded text, the most frequent one first? The "
        "three most frequent words are"
    )
    left = room(length, head, tail)
    units = [kit.after("a", f" {word}") for word in ranks]
    share = np.arange(1, len(ranks) + 1) ** -_ZIPF
    share /= share.sum()
    mean = float(share @ [len(unit) for unit in units])
    counts = np.floor(share * (left / mean)).astype(int)
    while left < sum(int(n) * len(u) for n, u in zip(counts, units, strict=True)):
        counts[np.flatnonzero(counts)[-1]] -= 1
    drawn = [units[i] for i in rng.permutation(np.repeat(np.arange(len(units)), counts))]
    if not counts[0] > counts[1] > counts[2] > counts[3]:
        raise too_short(length)
    used = sum(map(len, drawn))
    singles, rest = fill_exactly(left - used, lambda: kit.after("a", f" {next(words)}"), rng)
    text = [token for unit in drawn + singles for token in unit]
    return Sample(head + rest + text + tail, kit.after("are", " " + joined(ranks[:3])))


def joined(parts: list[str]) -> str:
    """a; a, and b; a, b, and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _among_noise(kit: Kit, left: int, needles: list[Ids], depths: list[float]) -> Ids:
    """Lines of needles between lines of filler, `left` tokens of it; the first line is longer by
    what no whole line fills, so that each ends in a line break and none is empty."""
    line = kit.line(f"{NOISE}\n")
    whole, more = divmod(left, len(line))
    longer = kit.line(f"{NOISE} {NOISE} {NOISE}\n")
    first = longer[len(longer) - (min(whole, 1) * len(line) + more) :]
    noise = first + line * (whole - 1)
    places = [round(whole * d / 100) * len(line) for d in depths]
    places = [place + more if place else 0 for place in places]
    return insert(noise, list(zip(places, needles, strict=True)))


_SOURCE = "NVIDIA/RULER"
RULER = (
    Task("ruler_niah_single_1", Niah("noise"), source=_SOURCE),
    Task("ruler_niah_single_2", Niah("text"), needs_text=True, source=_SOURCE),
    Task("ruler_niah_single_3", Niah("text", value="uuids"), needs_text=True, source=_SOURCE),
    Task("ruler_niah_multikey_1", Niah("text", keys=4), needs_text=True, source=_SOURCE),
    Task("ruler_niah_multikey_2", Niah("needles"), source=_SOURCE),
    Task("ruler_niah_multikey_3", Niah("needles", "uuids", "uuids"), source=_SOURCE),
    Task("ruler_niah_multivalue", Niah("text", values=4), False, True, _SOURCE),
    Task("ruler_niah_multiquery", Niah("text", keys=4, queries=4), False, True, _SOURCE),
    Task("ruler_variable_tracking", variable_tracking, False, source="our wording"),
    Task("ruler_common_words", common_words, False, source="our wording"),
    Task("ruler_frequent_words", frequent_words, False, source="our wording"),
)
