"""Run folders with every file that a report reads, and with some of them missing."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jsonschema
import pytest

from megatron_ext.config import load_config, save_config
from tests.conftest import ROOT

LOSSES = {128: 4.0, 256: 4.0, 1024: 4.0}
SCHEMA = json.loads((ROOT / "megatron_ext/evaluation/results.schema.json").read_text())


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` into the test's own folder."""
    return partial(write_run, tmp_path)


@pytest.fixture
def sweep_file(config_file: Path, tmp_path: Path) -> Path:
    file = tmp_path / "bases.yaml"
    file.write_text(
        f"""\
config: {config_file.name}
folder: {tmp_path / "arms"}
settings: {{training.steps: 4, rope.bound: "off"}}
axes:
  rope.base: [1e2, 5e5]
  training.seed: [1, 2]
evaluate: [--lengths, "64,128", --max-tokens, 2000]
"""
    )
    return file


def write_run(
    parent: Path, name: str, steps: int = 40, evaluated: bool = True, seed: int = 1234
) -> Path:
    """A run folder as a run of the demo would leave it, of few steps."""
    folder = parent / name
    folder.mkdir(parents=True)
    arm = "below" if name.startswith("below") else "above"
    overrides = [f"training.run_dir={folder}", "training.steps=40", f"training.seed={seed}"]
    config = load_config(ROOT / f"configs/demo/{arm}.yaml", overrides)
    save_config(config, folder / "config.yaml")
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(10, steps + 1, 10):
            loss = 7.6 - 0.08 * step
            record = {"step": step, "tokens": step * 2048, "loss": loss, "step_time_s": 0.5}
            out.write(json.dumps(record) + "\n")
            if step % 20 == 0:
                record = {"step": step, "validation_loss": loss + 0.1}
                out.write(json.dumps(record) + "\n")
        out.write('{"step": 41, "los')  # cut short by a kill
    data = {"corpora": {"demo": {"path": f"/{name}/corpus", "idx_xxh3": "ab"}}, "seed": seed}
    (folder / "data.json").write_text(json.dumps(data))
    environment = {"world_size": 2, "device": "cpu (2 cores)", "code_revision": "ab" * 20}
    (folder / "environment.json").write_text(json.dumps(environment))
    if evaluated:
        write_perplexity(folder, steps)
    return folder


def write_perplexity(folder: Path, step: int, losses: Mapping[int, float] = LOSSES) -> None:
    """What `megatron-ext evaluate` writes; `losses`: by length."""
    lengths = [
        {
            "length": length,
            "stride": 64,
            "windows": 9,
            "tokens_scored": 4000,
            "documents": 3,
            "loss": loss,
            "token_weighted_perplexity": 60.0 + length / 100,
            "mean_document_perplexity": 62.0 + length / 100,
            "loss_by_position": [
                {"from": max(1, p), "to": p + length // 8, "tokens": 90, "loss": 4 + p / 1000}
                for p in range(0, length, length // 8)
            ],
        }
        for length, loss in losses.items()
    ]
    text = {"documents": 3, "tokens": 4003, "longest_document": 2000}
    text["notes"] = ["3 of 9 documents were scored"]
    write_results(folder, "perplexity", step, lengths, text=text)


def write_retrieval(
    folder: Path, task: str, correct: dict[int, list[int]], step: int = 40, samples: int = 10
) -> None:
    """What `megatron-ext evaluate --tasks` writes; `correct`: by length, at depths 0, 50, 100%."""
    entries = []
    for length, counts in correct.items():
        given = list(zip((0.0, 50.0, 100.0), counts, strict=True))
        records = [
            {
                "task": task, "length": length, "depth": depth, "seed": 1, "sample": number,
                "answer": "1", "prediction": "1" if number < right else "2",
                "correct": number < right,
            }
            for depth, right in given
            for number in range(samples)
        ]  # fmt: skip
        depths = [{"depth": d, "samples": samples, "correct": right} for d, right in given]
        entry = {"length": length, "samples": len(records), "depths": depths, "records": records}
        entries.append({**entry, "accuracy": sum(counts) / len(records)})
    write_results(folder, task, step, entries)


def write_results(folder: Path, task: str, step: int, lengths: list, **more: dict) -> None:
    results = {
        "format": 1,
        "task": task,
        "checkpoint": {"step": step, "manifest_sha256": "cd" * 32},
        "settings": {"bos": None},
        "aggregation": {},
        **more,
        "lengths": lengths,
    }
    jsonschema.validate(results, SCHEMA)
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / f"evaluation/{task}.json").write_text(json.dumps(results))
