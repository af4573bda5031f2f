"""The search over layouts against a second enumeration, and the plan that is printed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.config import load_config, validate
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.planning.layout import on_gpus, parallel_section, reason, search, workload
from megatron_ext.planning.plan import flops_per_token, make_plan
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


def test_every_allowed_division_is_tried() -> None:
    config = load_config(LLAMA_2B, [])
    tried = {
        (c.config.parallel.tensor, c.config.parallel.pipeline, c.config.training.micro_batch_size)
        for c in search(config, 64, "h100")
    }
    expected = {
        (t, p, b)
        for t in (1, 2, 4, 8)  # of the 16 heads, within a node
        for p in (1, 2, 4, 8, 16, 32)  # of the 32 layers
        for b in range(1, 17)
        if 64 % (t * p) == 0 and 1024 % (64 // (t * p) * b) == 0
    }
    assert tried == expected


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
    choices = search(load_config(LLAMA_2B, []), 128, "a100-40gb")
    file = tmp_path / "best.yaml"
    file.write_text(f"base: {LLAMA_2B}\n" + parallel_section(choices[0], 128))
    loaded = load_config(file, [])
    expected = choices[0].config
    assert loaded.parallel == expected.parallel.model_copy(update={"world_size": 128})
    assert loaded.training.micro_batch_size == expected.training.micro_batch_size


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
