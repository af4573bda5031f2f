"""Names and numbers that retrieval prompts hide: drawn, never repeated within a prompt.

names = pairs(rng)                  # endless, distinct: "amber-anchor", ..
words = made_up_words(rng)          # endless, distinct, pronounceable: "toriva", ..
"""

import uuid
from collections.abc import Iterator

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    """
    amber ancient arid bitter blunt bold brave brief bright brisk broad calm careful cheap clever
    coarse cold cosmic crisp cruel curious damp daring dark deep dense distant dull eager early
    empty exact faint fancy fast fierce firm flat fond fragile fresh frosty gentle giant glad grand
    grave green grim happy harsh heavy hidden hollow humble icy idle jolly keen kind large late lazy
    light lively lonely loud lucky mellow mild modest narrow neat noble odd pale plain polite proud
    quick quiet rapid rare rough royal rusty sharp shy silent simple sleepy slim smooth sober soft
    solid sour stable steep sturdy subtle sunny swift tall tame tender thin tidy tiny tough vague
    vast vivid warm wary wild wise witty young zealous
    """
)
_NOUNS = _words(
    """
    anchor apple arrow badge banner barrel basket beacon bell bench blanket boat bottle branch brick
    bridge bucket button cabin camel candle canyon carpet castle cedar chain chapel cherry circle
    cliff cloud coffee comet copper coral cotton crane crown dagger desert diamond dragon drum eagle
    engine falcon feather fence field flame flute forest fountain garden garnet gate glacier goose
    hammer harbor hazel helmet hill hinge honey horn island ivory jacket jungle kettle kitchen
    ladder lantern lemon lion lizard magnet maple marble market meadow mirror mountain needle ocean
    onion orchard otter oyster palace paper parrot pebble pepper piano pillow planet pocket prairie
    quartz rabbit ribbon river rocket saddle salmon school shadow shell silver spider spoon stone
    summit table temple thunder tiger tower trumpet tunnel turtle valley velvet violin wagon walnut
    whale willow window winter wolf
    """
)
_ONSETS = _words("b br c cl d dr f fl g gr h j k l m n p pl r s sh st t tr v w z")
_VOWELS = _words("a e i o u ai ea oo")
MOST_PAIRS = len(_ADJECTIVES) * len(_NOUNS)


def pairs(rng: np.random.Generator) -> Iterator[str]:
    """Adjective-noun names in random order, then numbered ones."""
    for again in range(10**6):
        for number in rng.permutation(MOST_PAIRS):
            noun, adjective = divmod(int(number), len(_ADJECTIVES))
            name = f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}"
            yield f"{name}-{again + 1}" if again else name


def made_up_words(rng: np.random.Generator, syllables: int = 3) -> Iterator[str]:
    """Distinct words of so many syllables; over a million of them."""
    seen = set()
    while True:
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
        if word not in seen:
            seen.add(word)
            yield word


def random_uuid(rng: np.random.Generator) -> str:
    """A version 4 UUID from the given generator."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
