"""Records arrive in every sink, read back with that sink's own reader."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import load_config
from megatron_ext.training.journal import percentile
from megatron_ext.training.sinks import JsonLines, TensorBoard, WeightsAndBiases

RECORDS = [
    {"step": 1, "loss": 6.5, "skipped": False, "mfu": None, "fault": "text"},
    {"step": 2, "loss": math.nan, "skipped": True, "mfu": 0.5},
]


def test_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    sink = JsonLines(file, done_steps=2)
    sink.write({"step": 3, "loss": math.nan})
    sink.close()
    read = [json.loads(line) for line in file.read_text().splitlines()]
    assert read == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_tensorboard_reads_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoard(tmp_path, done_steps=0)
    for record in RECORDS:
        sink.write(record)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss", "skipped", "mfu"]
    assert [(e.step, e.value) for e in events.Scalars("skipped")] == [(1, 0.0), (2, 1.0)]


def test_weights_and_biases_works_offline_and_keeps_its_id(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    for done in (0, 2):
        sink = WeightsAndBiases(load_config(config_file, ["logging.wandb=tests"]))
        for record in RECORDS:
            sink.write({**record, "step": record["step"] + done})
        sink.close()
    left = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    name = (tmp_path / "run" / "wandb_id").read_text()
    assert left and all(name in file.name for file in left)


def test_weights_and_biases_without_its_server_writes_for_later(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs the package wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    (tmp_path / "run").mkdir()
    sink = WeightsAndBiases(load_config(config_file, ["logging.wandb=tests"]))
    sink.write(RECORDS[0])
    sink.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_percentiles_are_those_of_numpy() -> None:
    values = list(np.random.default_rng(0).exponential(size=37))
    assert percentile(values, 50) == pytest.approx(np.percentile(values, 50))
    assert percentile(values, 95) == pytest.approx(np.percentile(values, 95))
    assert percentile([3.0], 95) == 3.0
