"""Prompts of an exact number of tokens, put together from encoded pieces.

    kit = Kit(tokenizer, haystack=tokens)                   # tokens: of real text, for the tasks
    that need it kit.start("A text.\n") + kit.noise(100) + kit.after("\n", "The end")

Each piece is encoded as it reads in its place, and only filler is cut, between two tokens: a prompt
decodes to the very text of its template, whatever the tokenizer, and needs no second encoding.
Where a text is made of whole lines or words, the last ones are chosen so that their tokens add up.
Refuses (UserError) lengths that cannot hold what must be in them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.evaluation.texts import Tokens

Ids = list[int]

# The filler of Landmark Attention's passkey test (Mohtashami and Jaggi 2023) and of RULER.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CANDIDATES = 48  # units among which those are sought that add up
_TRIES = 1000


@dataclass(frozen=True)
class Sample:
    """A prompt of exactly the length asked for, and the tokens that have to follow it."""

    prompt: Ids
    answer: Ids


@dataclass
class Kit:
    """A tokenizer, and what prompts are made of. `bos`: the id that begins every prompt, if any."""

    tokenizer: Tokenizer
    haystack: Tokens | None = None
    bos: int | None = None
    _known: dict[Any, Ids] = field(default_factory=dict)

    def start(self, text: str) -> Ids:
        """Ids of a text that a prompt begins with."""
        return ([] if self.bos is None else [self.bos]) + self.tokenizer.encode(text).tolist()

    def after(self, before: str, text: str) -> Ids:
        """Ids of a text that follows `before`, itself encoded elsewhere."""
        head = self._encoded(before)
        whole = self.tokenizer.encode(before + text).tolist()
        if whole[: len(head)] != head:  # the two grow together: then it begins anew
            return self.tokenizer.encode(text).tolist()
        return whole[len(head) :]

    def line(self, text: str) -> Ids:
        """Ids of a text that follows a line break."""
        return self.after("a\n", text)

    def noise(self, count: int) -> Ids:
        """The first `count` tokens of the filler sentences, at the beginning of a line."""
        known = self._known.setdefault("noise", [])
        if len(known) < count:
            each = len(self.line(f"{NOISE} ")) - 1  # pieces of a word, at most, at either end
            known[:] = self.line(" ".join([NOISE] * (count // (each // 2) + 2)))
        return known[:count]

    def text(self, count: int, begin: int = 0) -> Ids:
        """`count` tokens of the haystack from token `begin` on, which starts anew at its end.
        Raises UserError when there is none."""
        if self.haystack is None or len(self.haystack) == 0:
            raise UserError("this task hides its needles in real text: name a file by --text")
        places = (begin + np.arange(count)) % len(self.haystack)
        return self.haystack[places].tolist()

    def ends_sentence(self, token: int) -> bool:
        """Whether the token's text ends in a full stop."""
        key = ("stop", token)
        if key not in self._known:
            stop = self.tokenizer.decode([token]).rstrip(" ").endswith(".")
            self._known[key] = [int(stop)]
        return bool(self._known[key][0])

    def sentence_end(self, ids: Ids, place: int) -> int:
        """The last place up to `place` that has a full stop before it; 0 when there is none."""
        while place and not self.ends_sentence(ids[place - 1]):
            place -= 1
        return place

    def _encoded(self, text: str) -> Ids:
        key = ("text", text)
        if key not in self._known:
            self._known[key] = self.tokenizer.encode(text).tolist()
        return self._known[key]


def room(length: int, *pieces: Ids) -> int:
    """Tokens left for filler. Raises UserError when the pieces alone are longer."""
    left = length - sum(map(len, pieces))
    if left < 0:
        raise too_short(length)
    return left


def too_short(length: int) -> UserError:
    """The mistake of asking for a context that a task's text alone overfills."""
    return UserError(
        f"a prompt of {length} tokens is too short for this task: ask for longer ones by --lengths"
    )


def fill_exactly(
    budget: int, draw: Callable[[], Ids], rng: np.random.Generator
) -> tuple[list[Ids], Ids]:
    """Drawn units that have `budget` tokens together, and the rest: the end of one more unit, where
    no choice of whole units adds up (else empty)."""
    pool = [draw() for _ in range(_CANDIDATES)]
    sizes = np.array([len(unit) for unit in pool])
    units: list[Ids] = []
    while budget > 4 * sizes.max():
        units.append(draw())
        budget -= len(units[-1])
    for _ in range(_TRIES if budget else 0):
        order = rng.permutation(_CANDIDATES)
        count = int(np.searchsorted(np.cumsum(sizes[order]), budget)) + 1
        if count <= _CANDIDATES and sizes[order[:count]].sum() == budget:
            return units + [pool[i] for i in order[:count]], []
    rest = pool[0]
    for unit in pool[1:]:
        if budget <= len(rest):
            break
        units.append(rest)
        budget -= len(rest)
        rest = unit
    return units, rest[len(rest) - budget :]


def insert(ids: Ids, pieces: Sequence[tuple[int, Ids]]) -> Ids:
    """The ids with each piece put in before the place it names."""
    out, done = [], 0
    for place, piece in sorted(pieces, key=lambda item: item[0]):
        out += [*ids[done:place], *piece]
        done = place
    return out + ids[done:]
