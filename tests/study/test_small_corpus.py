"""The small study's text: the same every time, in the words of the evaluation; its sweep's arms."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import read_index
from data_tools.tokenizer import load_tokenizer
from megatron_ext.evaluation.prompts import NOISE, Kit
from megatron_ext.evaluation.retrieval import TASKS
from megatron_ext.rope.feasible import always_feasible_base, smallest_feasible_base
from megatron_ext.study.small_corpus import build, documents, passkey_document
from megatron_ext.study.sweep import read_sweep
from tests.conftest import ROOT

SWEEPS = [ROOT / f"configs/sweeps/{name}.yaml" for name in ("small", "small_gpu")]
TEMPLATE = re.compile(
    r"(?P<introduction>There is .* there\.\n)(?P<filler>.*)"
    r"(?P<fact>\nThe pass key is (?P<key>\d+)\. Remember it\. (?P=key) is the pass key\.\n)"
    r"(?P<asked>(?:.*\nWhat is the pass key\? The pass key is (?P=key)\n)+)"
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a few documents."""
    return build(tmp_path_factory.mktemp("small") / "data", documents(150, text_bytes=60_000))


def test_it_asks_in_the_words_of_the_evaluation(prefix: Path) -> None:
    tokenizer = load_tokenizer(prefix.parent / "tokenizer.json")
    sample = TASKS["passkey"].make(Kit(tokenizer), 160, 50.0, np.random.default_rng(7))
    prompt = tokenizer.decode(sample.prompt + sample.answer) + "\n"
    asked = TEMPLATE.fullmatch(prompt)
    assert asked is not None, prompt
    longest = 0
    for number in range(40):
        found = TEMPLATE.fullmatch(passkey_document(np.random.default_rng(number)))
        assert found is not None
        assert found["introduction"] == asked["introduction"]
        for filler in (found["filler"], *re.findall(r"^(The .*|)\nWhat is", found["asked"], re.M)):
            assert (f"{NOISE} " * 10).startswith(filler)
            longest = max(longest, len(filler))
    assert longest > len(NOISE)


def test_numbers_are_read_in_pairs_of_digits(prefix: Path) -> None:
    tokenizer = load_tokenizer(prefix.parent / "tokenizer.json")
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("key is 37836.").tolist()]
    assert pieces[-4:] == ["37", "83", "6", "."]


def test_the_same_documents_every_time_and_of_both_kinds() -> None:
    made = documents(60, text_bytes=100_000)
    assert made == documents(60, text_bytes=100_000)
    keys = [document["meta"]["path"].startswith("passkey/") for document in made]
    assert sum(keys) == 60
    real = [document["text"] for document, key in zip(made, keys, strict=True) if not key]
    assert sum(map(len, real)) > 100_000
    assert keys != sorted(keys)
    assert len({document["text"] for document in made}) == len(made)


def test_built_again_nothing_is_written_anew(prefix: Path) -> None:
    files = sorted(file for file in prefix.parent.iterdir())
    before = [(file, file.stat().st_mtime_ns) for file in files]
    assert build(prefix.parent, documents(150, text_bytes=60_000)) == prefix
    assert [(file, file.stat().st_mtime_ns) for file in files] == before
    assert read_index(prefix).documents > 150


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_sweep_has_bases_on_both_sides_of_the_bound(file: Path) -> None:
    seeds: dict[float, set[int]] = {}
    for arm in read_sweep(file).arms:
        seeds.setdefault(arm.config.rope.base, set()).add(arm.config.training.seed)
    context, width = arm.config.training.sequence_length, arm.config.model.head_dim
    assert sum(base < smallest_feasible_base(context, width) for base in seeds) >= 2
    assert sum(base > always_feasible_base(context, width) for base in seeds) >= 2
    assert len(next(iter(seeds.values()))) >= 2
    assert all(found == next(iter(seeds.values())) for found in seeds.values())
