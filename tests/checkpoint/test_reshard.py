"""Saved at any layout, read at any other: model and optimizer bit for bit, and the same losses on.

The table of docs/checkpoints.md: pytest -s tests/checkpoint/test_reshard.py -k continues
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tensors import differing, tensors
from tests.conftest import environment, launch, metrics, pretrain

LAYOUTS = {
    "1": (1, []),
    "1, distributed": (1, ["parallel.distributed_optimizer=true"]),
    "TP2 DP2": (4, ["parallel.tensor=2"]),
    "TP2 DP2, distributed": (4, ["parallel.tensor=2", "parallel.distributed_optimizer=true"]),
    "TP4": (4, ["parallel.tensor=4"]),
    "PP4": (4, ["parallel.pipeline=4"]),
    "PP2 VPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "CP2, distributed": (2, ["parallel.context=2", "parallel.distributed_optimizer=true"]),
    "TP2 PP2 DP2": (8, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "TP2 PP2 DP2, distributed": (
        8,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.distributed_optimizer=true"],
    ),
}


def rewrite(config_file: Path, target: Path, layout: str, *settings: str) -> Path:
    """The checkpoint that `layout` makes of the newest one of the config's run."""
    processes, own = LAYOUTS[layout]
    script = Path(__file__).with_name("rewrite.py")
    command = launch(config_file, target, *settings, *own, processes=processes, script=script)
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    (written,) = (target / "checkpoints").iterdir()
    return written


def assert_same_tensors(ours: Path, reference: Path) -> None:
    assert differing(tensors(ours), tensors(reference)) == []
    steps = [json.loads((c / "run.json").read_text())["optimizer_steps"] for c in (ours, reference)]
    assert steps[0] == steps[1] > 0


def test_rewritten_at_another_layout_every_tensor_is_the_same(
    config_file: Path, tmp_path: Path
) -> None:
    """bf16 with its float32 master weights, tied embeddings, the optimizer divided and whole."""
    common = ["precision.dtype=bf16", "training.steps=3", "model.tied_embeddings=true"]
    processes, layout = LAYOUTS["TP2 DP2, distributed"]
    pretrain(config_file, *common, *layout, processes=processes)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    sizes = [file.stat().st_size for file in saved.glob("*.distcp")]
    assert len(sizes) == 4 and max(sizes) < 1.3 * sum(sizes) / 4  # no rank holds it all
    kept = tensors(saved)
    weight = kept["embedding.word_embeddings.weight"]
    master = kept["optimizer.state.fp32_param.embedding.word_embeddings.weight"]
    assert torch.equal(master.bfloat16(), weight) and not torch.equal(master, weight.float())
    assert kept["optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"].min() > 0
    assert_same_tensors(rewrite(config_file, tmp_path / "alone", "1", *common), saved)


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_rewritten_at_any_layout_every_tensor_is_the_same(
    layout: str, config_file: Path, tmp_path: Path
) -> None:
    pretrain(config_file, "training.steps=3")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    there = rewrite(config_file, tmp_path / "there", layout, "training.steps=3")
    assert_same_tensors(there, saved)
    moved = f"training.run_dir={tmp_path / 'there'}"
    back = rewrite(config_file, tmp_path / "back", "TP2 DP2", "training.steps=3", moved)
    assert_same_tensors(back, saved)


MOVES = [
    ("TP2 PP2 DP2", "1"),
    ("TP2 PP2 DP2, distributed", "1"),
    ("TP2 PP2 DP2, distributed", "1, distributed"),
    ("1", "TP4"),
    ("1", "TP2 DP2, distributed"),
    ("PP4", "TP2 DP2"),
    ("PP4", "TP2 DP2, distributed"),
    ("TP2 DP2, distributed", "TP2 PP2 DP2"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Runs of 20 steps with a checkpoint of step 10, by layout; each made once."""
    known: dict[str, Path] = {}

    def run(config_file: Path, layout: str) -> Path:
        if layout not in known:
            processes, settings = LAYOUTS[layout]
            run_dir = tmp_path_factory.mktemp("run")
            pretrain(
                config_file, f"training.run_dir={run_dir}", "checkpoint.interval=10", *settings,
                processes=processes,
            )  # fmt: skip
            known[layout] = run_dir
        return known[layout]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_run_continues_at_another_layout(
    source: str, target: str, config_file: Path, runs, tmp_path: Path
) -> None:
    reference = metrics(runs(config_file, "1"))
    moved = tmp_path / "run"
    shutil.copytree(runs(config_file, source), moved)
    shutil.rmtree(moved / "checkpoints" / "step_00000020")
    processes, settings = LAYOUTS[target]
    printed = pretrain(config_file, *settings, processes=processes)
    assert "resuming after step 10" in printed
    names = ("loss", "grad_norm", "validation_loss")
    worst = dict.fromkeys(names, 0.0)
    assert len(metrics(moved)) == len(reference)
    for ours, wanted in zip(metrics(moved), reference, strict=True):
        for name in {*names} & wanted.keys() if wanted["step"] > 10 else ():
            worst[name] = max(worst[name], abs(ours[name] / wanted[name] - 1))
    print(f"\n| {source} | {target} | {worst['loss']:.1e} | {worst['grad_norm']:.1e} |")
    assert max(worst.values()) < 1e-4, worst
