"""The small study's text: the same every time, in the words of the evaluation; its sweep's arms."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import read_index
from data_tools.tokenizer import load_tokenizer
from megatron_ext.evaluation.prompts import NOISE, Kit
from megatron_ext.evaluation.retrieval import TASKS
from megatron_ext.rope.feasible import always_feasible_base, smallest_feasible_base
from megatron_ext.study.demo_corpus import Document
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
def made() -> list[Document]:
    return documents(150, text_bytes=60_000)


@pytest.fixture(scope="module")
def prefix(made: list[Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of a few documents."""
    return build(tmp_path_factory.mktemp("small") / "data", made)


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


def test_documents_of_both_kinds_in_no_order(made: list[Document]) -> None:
    keys = [document["meta"]["path"].startswith("passkey/") for document in made]
    assert sum(keys) == 150
    real = [document["text"] for document, key in zip(made, keys, strict=True) if not key]
    assert sum(map(len, real)) > 60_000
    assert keys not in (sorted(keys), sorted(keys, reverse=True))
    assert len({document["text"] for document in made}) == len(made)


def test_made_again_the_documents_and_files_are_the_same(
    made: list[Document], prefix: Path
) -> None:
    files = sorted(prefix.parent.iterdir())
    before = [(file, file.stat().st_mtime_ns) for file in files]
    again = documents(150, text_bytes=60_000)
    assert again == made
    assert build(prefix.parent, again) == prefix
    assert [(file, file.stat().st_mtime_ns) for file in files] == before
    assert read_index(prefix).documents == len(made)


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


@pytest.mark.slow
def test_an_arm_in_miniature_trains_and_is_asked(prefix: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "mini.yaml"
    sweep.write_text(
        f"""\
config: {ROOT / "configs/runs/small/cpu.yaml"}
folder: {tmp_path / "arms"}
settings:
  data.corpora.small.path: {prefix}
  training.steps: 2
  schedule.warmup_steps: 0
  schedule.decay_steps: 1
axes: {{rope.base: [200]}}
evaluate: [--tasks, passkey, --lengths, "80,128", --depths, 2, --samples, 2]
"""
    )
    command = [sys.executable, "-m", "megatron_ext.cli", "sweep", str(sweep), "--local"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "arms/base_200/evaluation/passkey.json").read_text())
    assert [entry["samples"] for entry in results["lengths"]] == [4, 4]
    assert "Retrieval by distance: passkey" in (tmp_path / "arms/report.html").read_text()
