"""The search over layouts against a second enumeration, and the plan that is printed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.config import load_config, validate
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.planning.layout import on_gpus, parallel_section, reason, search, workload
from megatron_ext.planning.memory import memory
from megatron_ext.planning.plan import flops_per_token, make_plan
from megatron_ext.planning.prediction import constants
from megatron_ext.planning.throughput import step_time
from tests.conftest import ROOT

LLAMA_2B = ROOT / "configs/models/llama_2b.yaml"


def test_the_first_choice_is_the_fastest_that_fits() -> None:
    config = load_config(LLAMA_2B, [])
    choices = search(config, 128, "a100-80gb")
    fitting = [choice for choice in choices if choice.fits]
    assert choices[: len(fitting)] == fitting
    best = min(fitting, key=lambda choice: choice.step_time_s)
    assert choices[0] == best
    # The 2B run on paper: no tensor or pipeline parallelism, the optimizer sharded.
    assert (best.config.parallel.tensor, best.config.parallel.pipeline) == (1, 1)
    assert best.name in reason(choices)
    for choice in choices:
        validate(choice.config, 128)
        alone = make_plan(choice.config, 128, "a100-80gb")
        assert alone.step_time_s == pytest.approx(choice.step_time_s)
        assert alone.peak_memory_gib == pytest.approx(choice.memory_gib)
        break


def test_selective_recompute_is_less_memory_and_more_time_and_full_the_more() -> None:
    settings = ["training.micro_batch_size=1"]
    modes = [
        load_config(LLAMA_2B, [*settings, f"training.recompute={mode}"])
        for mode in ("none", "selective", "full")
    ]
    plans = [make_plan(config, 128, "a100-80gb") for config in modes]
    held = [plan.memory_gib[0]["activations"] for plan in plans]
    # Of 41.5 H bytes a token those within the MLP are 8 x 2.6875 H (its ffn_hidden_size).
    assert held[1] / held[0] == pytest.approx(1 - 8 * 5504 / 2048 / 41.5)
    assert held[2] < held[1]
    assert plans[0].step_time_s < plans[1].step_time_s < plans[2].step_time_s


def test_every_allowed_division_is_tried() -> None:
    config = load_config(LLAMA_2B, ["model.num_layers=30"])
    tried = set()
    choices = search(config, 64, "h100")
    for choice in choices[::100]:
        validate(choice.config, 64)
    for choice in choices:
        parallel = choice.config.parallel
        tried.add(
            (
                parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline,
                parallel.last_stage_layers, choice.config.training.micro_batch_size,
            )
        )  # fmt: skip
        assert parallel.first_stage_layers == parallel.last_stage_layers
    even = {
        (p, v, None) for p in (2, 3, 5, 6, 10, 15, 30) for v in (1, 2, 3, 4) if 30 % (p * v) == 0
    }
    with_ends = {(4, 1, 7), (8, 1, 3), (16, 1, 1)}  # of 30 layers and two more
    sizes = (1, 2, 4, 8)
    assert tried == {
        (t, c, *stages, b)
        for t in sizes  # of the 16 heads, within a node
        for c in sizes
        for stages in ({(1, 1, None)} | even | with_ends)
        for b in range(1, 17)
        if 64 % (t * c * stages[0]) == 0
        and 1024 % (64 // (t * c * stages[0]) * b) == 0
        # Megatron-Core's interleaved schedule takes micro-batches by the number of stages.
        and (stages[1] == 1 or 1024 // (64 // (t * c * stages[0]) * b) % stages[0] == 0)
    }


def test_long_sequences_are_split_and_deep_pipelines_interleaved() -> None:
    long = ["training.sequence_length=131072", "parallel.context=4", "rope.bound=warn"]
    config = load_config(LLAMA_2B, [*long, "training.micro_batch_size=1"])
    best = search(config, 128, "a100-80gb")[0]
    assert best.config.parallel.context > 1
    assert f"CP{best.config.parallel.context}" in best.name
    wide = ["model.hidden_size=8192", "model.ffn_hidden_size=28672", "model.num_heads=64"]
    deep = ["model.num_kv_heads=8", "model.num_layers=80", "training.global_batch_size=2048"]
    choices = search(load_config(LLAMA_2B, [*wide, *deep]), 1024, "h100")
    assert choices[0].config.parallel.virtual_pipeline > 1
    assert "pipeline bubble" in reason(choices)


def test_a_model_too_large_for_the_gpus_is_said_so() -> None:
    config = load_config(LLAMA_2B, ["model.hidden_size=16384", "model.ffn_hidden_size=45056"])
    choices = search(config, 8, "a100-40gb")
    assert not choices[0].fits
    assert "nothing fits" in reason(choices)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="no layout of"):
        search(load_config(LLAMA_2B, []), 7 * 11, "h100")
    with pytest.raises(ConfigError, match="global_batch_size=1024 is no multiple"):
        make_plan(load_config(LLAMA_2B, []), 96, "h100")


def test_the_written_section_loads_as_the_layout(tmp_path: Path) -> None:
    config = load_config(LLAMA_2B, ["model.num_layers=30"])
    choices = search(config, 128, "a100-40gb")
    plain, interleaved, uneven = (
        next(c for c in choices if holds(c.config.parallel))
        for holds in (
            lambda p: p.pipeline == 1,
            lambda p: p.virtual_pipeline > 1 and p.context > 1,
            lambda p: p.last_stage_layers,
        )
    )
    for choice in (plain, interleaved, uneven):
        file = tmp_path / "best.yaml"
        section = parallel_section(choice, 128)
        file.write_text(f"base: {LLAMA_2B}\n{section}model:\n  num_layers: 30\n")
        loaded = load_config(file, [])
        expected = choice.config
        assert loaded.parallel == expected.parallel.model_copy(update={"world_size": 128})
        assert loaded.training.micro_batch_size == expected.training.micro_batch_size


def test_the_configs_number_formats_are_reckoned_with() -> None:
    def of(*overrides: str) -> tuple[float, float]:
        work = workload(load_config(LLAMA_2B, list(overrides)), 128, "h100")
        seconds = step_time(work, constants().time)
        return float(seconds.matmul[0]), float(memory(work, 0, constants().memory).gradients[0])

    bf16, fp8 = of(), of("precision.fp8=tensorwise")
    assert fp8[0] < 0.7 * bf16[0] and fp8[1] == bf16[1]
    assert of("precision.dtype=fp16") == bf16
    assert of("precision.grad_reduce=bf16") == (bf16[0], bf16[1] / 2)


def test_flops_are_those_that_a_run_logs() -> None:
    journal = pytest.importorskip("megatron_ext.training.utilization")
    config = load_config(LLAMA_2B, [])
    assert flops_per_token(config) == journal.flops_per_token(config)


def test_the_page_adds_up() -> None:
    plan = make_plan(load_config(LLAMA_2B, []), 128, "a100-80gb")
    assert sum(plan.step_parts_s.values()) == pytest.approx(plan.step_time_s)
    tokens = 1024 * 4096 / plan.step_time_s / 128
    assert plan.tokens_per_s_per_gpu == pytest.approx(tokens)
    assert plan.mfu_full_attention == pytest.approx(tokens * plan_flops() / 312e12)
    assert plan.days == pytest.approx(238_419 * plan.step_time_s / 86400)
    assert "6 N + 12 L h s" in plan.text()


def plan_flops() -> float:
    layer = 4 * 2048**2 + 3 * 2048 * 5504
    return 6 * (32 * layer + 125_696 * 2048) + 12 * 32 * 2048 * 4096


def test_more_gpus_keep_the_layout() -> None:
    work = workload(load_config(LLAMA_2B, ["parallel.pipeline=2"]), 128, "a100-80gb")
    weak, strong = (on_gpus(work, 256, weak=weak) for weak in (True, False))
    assert (weak.dp[0], weak.global_batch[0]) == (128, 2048)
    assert (strong.dp[0], strong.global_batch[0]) == (128, 1024)


def test_command_line(tmp_path: Path) -> None:
    run = CliRunner()
    shown = run.invoke(app, ["plan", str(LLAMA_2B), "--gpus", "128", "--search", "--json"])
    answer = json.loads(shown.stdout)
    assert answer["reason"] and answer["search"][0]["fits"]
    assert answer["step_time_s"] == pytest.approx(answer["search"][0]["step_time_s"])
    wrong = run.invoke(app, ["plan", str(LLAMA_2B), "--gpus", "128", "--gpu", "v100"])
    assert isinstance(wrong.exception, UserError)
    assert isinstance(run.invoke(app, ["plan"]).exception, UserError)


def test_figures_have_their_numbers_beside_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = CliRunner()
    done = run.invoke(app, ["plan", str(LLAMA_2B), "--gpus", "128", "--plot", str(tmp_path / "p")])
    assert done.exit_code == 0
    names = {file.name for file in (tmp_path / "p").iterdir()}
    figures = {"memory", "waterfall", "scaling", "days"}
    assert names == {f"{f}.{kind}" for f in figures for kind in ("png", "csv")} | {"index.html"}
    rows = (tmp_path / "p/scaling.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(2**k) for k in range(3, 13)]
    page = (tmp_path / "p/index.html").read_text()
    assert all(f'src="{figure}.png"' in page for figure in figures)
    assert (tmp_path / "p/memory.png").read_bytes().startswith(b"\x89PNG")
