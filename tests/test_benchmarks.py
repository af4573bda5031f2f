"""The benchmarks that wait for a GPU run, at toy size, on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.contenders import BUILDERS, Case, peer_step
from benchmarks.gpu_train import TOY, Measured, finish
from benchmarks.kernel_paths import KERNELS
from benchmarks.step_profile import by_category, covered, longest_of, profiled
from benchmarks.worker import Worker
from tests.conftest import ROOT, environment


def run(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)], cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_training_step_beside_its_peers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "train.json"
    shown = run("benchmarks/gpu_train.py", "--toy", "--rounds", 2, "--steps", 2, "--json", file)
    found = json.loads(file.read_text())["toy"]
    for name in ("transformers", "plain PyTorch", "ours"):
        assert f"| {name} | " in shown
        mine = found["contenders"][name]
        assert mine["tokens_per_s"] > 0 and mine["peak_gb"] > 0 and len(mine["step_s"]) == 4
        assert mine["loss"] == pytest.approx(6.24, abs=0.1)  # ln 512: all are one model
    assert found["profile_us"]["matrix products"] > 0
    assert found["profile_us"]["attention"] > 0
    assert "| no kernel running | " in shown


@pytest.mark.slow
def test_a_profiler_that_brings_the_process_down_takes_no_figure_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    profile = Worker.profile

    def killed(worker: Worker) -> object:
        os.killpg(worker.process.pid, signal.SIGKILL)
        return profile(worker)

    monkeypatch.setattr(Worker, "profile", killed)
    worker, mine = Worker("ours", TOY["toy"]), Measured()
    worker.step()
    finish(worker, mine)
    assert len(mine.seconds) == 1 and mine.peak_gb > 0 and mine.profile is None
    assert "no profile of ours: died" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "options", "reason"),
    [
        ("raise OSError('broken | wheel')", [], "OSError: broken | wheel"),
        ("import time; time.sleep(1000)", ["--patience", 20], "no answer in 20 s"),
    ],
)
def test_a_contender_that_fails_or_hangs_is_left_out_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, options: list, reason: str
) -> None:
    (tmp_path / "transformers.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    file = tmp_path / "train.json"
    toy = ("--toy", "--rounds", 1, "--steps", 1)
    shown = run("benchmarks/gpu_train.py", *toy, "--json", file, *options)
    found = json.loads(file.read_text())["toy"]
    assert f"transformers left out: {reason}" in shown
    assert found["left_out"] == {"transformers": reason}
    assert found["contenders"]["plain PyTorch"]["ratio"] == 1
    assert found["contenders"]["ours"]["of_matmul"] > 0


def test_a_worker_says_why_it_gives_no_answer_and_leaves_no_process() -> None:
    unknown = Worker("no contender", TOY["toy"])
    with pytest.raises(RuntimeError, match="KeyError: 'no contender'"):
        unknown.step()
    unknown.kill()
    slow = Worker("plain PyTorch", TOY["toy"], patience=0.1)
    with pytest.raises(RuntimeError, match=r"no answer in 0.1 s"):
        slow.step()
    assert unknown.process.returncode and slow.process.wait(10) == -signal.SIGKILL


def test_peers_hold_no_gradients_between_steps() -> None:
    model = torch.nn.Linear(4, 4)
    case = Case(TOY["toy"].shape, 3, 2)
    step, _ = peer_step(model, lambda ids: model(ids.float()).square().mean(), case)
    before = model.weight.detach().clone()
    step()
    assert not torch.equal(model.weight, before)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.slow
def test_kernels_are_compared_with_float64_and_with_their_floor() -> None:
    shown = run("benchmarks/gpu_kernels.py", "--toy", "--rounds", 2)
    assert "WRONG" not in shown
    assert "| attention | flash | no GPU |" in shown
    assert "| cross-entropy | whole, Megatron-Core's fused | - | " in shown
    for kernel in KERNELS:
        assert shown.count(f"| {kernel} | ") >= 2


@pytest.mark.parametrize(
    "name", ["gpu_train.py", pytest.param("gpu_kernels.py", marks=pytest.mark.slow)]
)
def test_without_a_gpu_one_sentence_says_what_to_do(name: str) -> None:
    assert "run on a GPU, or with --toy on a CPU" in run(f"benchmarks/{name}", code=1)


@pytest.mark.parametrize("name", ["transformers", "plain PyTorch"])
def test_the_compiled_peers_are_one_graph_with_causal_attention_and_no_mask(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    step, _ = BUILDERS[name](replace(TOY["toy"], compiled=True, micro_batches=1))
    assert step() == pytest.approx(6.24, abs=0.1)
    (graph,) = graphs
    attention = F.scaled_dot_product_attention
    calls = [node for node in graph.graph.nodes if node.target is attention]
    assert len(calls) == 2  # layers
    for call in calls:
        assert len(call.args) == 3 and call.kwargs["is_causal"] is True
        assert call.kwargs.get("attn_mask") is None


def test_annotations_are_no_kernels_and_idle_time_is_what_no_kernel_covers() -> None:
    def step() -> None:
        with torch.profiler.record_function("annotation"):
            (weight @ weight).sum().backward()
            time.sleep(0.2)
            optimizer.step()

    weight = torch.randn(64, 64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)
    step()
    profile = profiled(step, gpu=False)
    names = {name for name, _ in profile.kernels}
    assert {"aten::mm", "aten::_fused_adamw_"} <= names
    assert not names & {"annotation", "Optimizer.step#AdamW.step"}
    assert 2e5 <= profile.idle_us < profile.step_us
    assert covered([(0, 2), (5, 9), (1, 4), (6, 7)]) == 8
    rows = [("aten::mm", 3.0), ("NormTwoOps", 1.0), ("mystery", 2.0), ("add_", 4.0)]
    assert by_category(rows) == [("other", 6.0), ("matrix products", 3.0), ("optimizer", 1.0)]
    assert longest_of("other", rows, 1) == [("add_", 4.0)]
