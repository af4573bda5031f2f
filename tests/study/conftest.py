"""Run folders with every file that a report reads, and with some of them missing."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megatron_ext.config import load_config, save_config
from tests.conftest import ROOT


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` into the test's own folder."""
    return partial(write_run, tmp_path)


def write_run(
    parent: Path, name: str, steps: int = 40, evaluated: bool = True, seed: int = 1234
) -> Path:
    """A run folder as a run of the demo would leave it, of few steps."""
    folder = parent / name
    folder.mkdir()
    arm = name if name in ("below", "above") else "above"
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


def write_perplexity(folder: Path, step: int) -> None:
    """What `megatron-ext evaluate` writes."""
    lengths = [
        {
            "length": length,
            "stride": 64,
            "windows": 9,
            "tokens_scored": 4000,
            "documents": 3,
            "loss": 4.0,
            "token_weighted_perplexity": 60.0 + length / 100,
            "mean_document_perplexity": 62.0 + length / 100,
            "loss_by_position": [
                {"from": max(1, p), "to": p + length // 8, "tokens": 90, "loss": 4 + p / 1000}
                for p in range(0, length, length // 8)
            ],
        }
        for length in (128, 256, 1024)
    ]
    results = {
        "format": 1,
        "task": "perplexity",
        "checkpoint": {"step": step},
        "text": {"documents": 3, "tokens": 4003, "notes": ["3 of 9 documents were scored"]},
        "lengths": lengths,
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation/perplexity.json").write_text(json.dumps(results))
