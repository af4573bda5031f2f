"""Tables of workloads: what is read, what is refused, and how near the published rows it comes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.errors import UserError
from megatron_ext.planning.prediction import predict
from megatron_ext.planning.sources import usable_for_time
from megatron_ext.planning.workload import from_rows, gpu_table, read_rows
from tests.conftest import ROOT
from tests.planning.rows import GPT

PUBLISHED = ROOT.parent / "shared/planner/fit_rows.csv"
published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="../shared is not there")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def test_the_command_answers_every_row_without_torch(tmp_path: Path) -> None:
    table = write(tmp_path / "rows.csv", [{**GPT, "row_id": f"r{i}"} for i in range(3)])
    code = (
        "import sys; from megatron_ext.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--rows", str(table), "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers = json.loads(done.stdout)
    assert [answer["row_id"] for answer in answers] == ["r0", "r1", "r2"]
    assert set(answers[0]) == {
        "row_id", "step_time_s", "tokens_per_s_per_gpu", "memory_gb", "fits",
    }  # fmt: skip
    tokens = 64 * 2048 / 8
    assert answers[0]["tokens_per_s_per_gpu"] == pytest.approx(
        tokens / answers[0]["step_time_s"], rel=1e-4
    )


def test_a_source_that_nobody_fitted_has_the_default_factor() -> None:
    known, unknown = predict(from_rows([GPT])), predict(from_rows([{**GPT, "source_id": "mine"}]))
    assert known.step_time_s == unknown.step_time_s


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"gpu": "v100"}, "gpu v100 is unknown: choose a100_40gb"),
        ({"num_layers": "many"}, "row gpt: num_layers=many is no number"),
        ({"hidden": 0}, "row gpt: hidden=0 is no number of at least 1"),
        ({"vocab": ""}, "row gpt has no vocab"),
    ],
)
def test_rows_that_say_nothing_are_refused(different: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_rows([{**GPT, **different}])


def test_a_table_without_columns_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "rows.csv", [{"row_id": 1, "gpu": "a100"}])
    with pytest.raises(UserError, match="lacks the columns gpus, num_layers"):
        read_rows(table)


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    sheet = {**gpu_table()["a100_80gb"], "memory_gib": 10}
    (tmp_path / "gpus.json").write_text(json.dumps({"mine": sheet}))
    work = from_rows([{**GPT, "gpu": "mine"}], gpu_table(tmp_path / "gpus.json"))
    assert not predict(work).fits[0]
    (tmp_path / "half.json").write_text('{"mine": {"peak_tflops": 1}}')
    with pytest.raises(UserError, match="mine lacks fp8_tflops"):
        gpu_table(tmp_path / "half.json")


@published
def test_published_step_times_and_memory_are_met() -> None:
    """The numbers of docs/planner.md, with a margin: a broken formula does not hide in them."""
    with PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    work = from_rows(rows)
    answer = predict(work)
    a100 = np.char.startswith(work.gpu_name, "a100") & usable_for_time(work)
    timed = a100 & np.array(["time" in r["use"] for r in rows])
    seconds = np.array([float(r["step_time_s"] or "nan") for r in rows])
    wrong = np.abs(answer.step_time_s / seconds - 1)[timed]
    assert np.median(wrong) < 0.045
    assert np.quantile(wrong, 0.95) < 0.16
    held = np.array(["mem" in r["use"] and bool(r["mem_gb"]) for r in rows])
    memory = np.array([float(r["mem_gb"] or "nan") for r in rows])
    wrong = np.abs(answer.memory_gb / memory - 1)[held]
    assert np.median(wrong) < 0.045
    assert np.quantile(wrong, 0.95) < 0.19
    assert answer.fits[held].mean() > 0.93
