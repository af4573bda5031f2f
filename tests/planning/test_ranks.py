"""Ranks built by Megatron-Core in a world that is not there, beside what the planner reckons."""

from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.planning import ranks
from megatron_ext.planning.parameters import count_parameters
from megatron_ext.planning.plan import make_plan
from megatron_ext.planning.ranks import build_ranks, check_ranks, distinct_ranks
from megatron_ext.planning.sources import GIB
from tests.conftest import ROOT, pretrain

LLAMA_2B = ROOT / "configs/models/llama_2b.yaml"
SPLIT = ["parallel.tensor=2", "parallel.pipeline=4", "parallel.sequence=true"]


def test_built_ranks_hold_what_the_planner_reckons() -> None:
    config = load_config(LLAMA_2B, SPLIT)
    built = build_ranks(config, 128)
    assert [rank["rank"] for rank in built] == [0, 31, 32, 63, 64, 95, 96, 127]
    stages = make_plan(config, 128, "a100-80gb").memory_gib
    for rank in built:
        reckoned = stages[rank["stage"]]
        for name in ("weight", "gradient", "optimizer"):
            expected = reckoned[{"weight": "weights", "gradient": "gradients"}.get(name, name)]
            # Norms are not split, and buffers are padded: both less than a hundredth.
            assert rank[f"{name}_bytes"] / GIB == pytest.approx(expected, rel=0.01)
    first = {rank["stage"]: rank["of_the_model"] for rank in built}
    assert sum(first.values()) == count_parameters(config.model).total


def test_the_ranks_between_the_corners_are_like_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(LLAMA_2B, [*SPLIT, "model.num_layers=4", "model.tied_embeddings=true"])
    monkeypatch.setattr(ranks, "distinct_ranks", lambda config, size: list(range(size)))
    built = build_ranks(config, 32)
    assert len(built) == 32
    kinds: dict[int, set[tuple[int, ...]]] = {}
    for rank in built:
        held = ("layers", "parameters", "of_the_model", "weight_bytes", "gradient_bytes")
        kinds.setdefault(rank["stage"], set()).add(tuple(rank[name] for name in held))
    assert all(len(kind) == 1 for kind in kinds.values())
    for stage in range(4):
        sizes = [rank["optimizer_bytes"] for rank in built if rank["stage"] == stage]
        assert max(sizes) - min(sizes) < 0.01 * max(sizes)


def test_a_micro_batch_too_large_is_an_error_with_its_fix() -> None:
    check = check_ranks(load_config(LLAMA_2B, ["training.micro_batch_size=8"]), 128)
    wrong = [line for line in check.lines if line.good is False]
    assert [line.name for line in wrong] == ["memory"]
    assert "lower training.micro_batch_size" in wrong[0].text


def test_a_batch_script_of_another_size_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "run.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=8\n#SBATCH --gpus-per-node=a100:8\n")
    shown = pretrain(LLAMA_2B, "--check", "--slurm", script, code=2)
    assert "8 nodes x 8 tasks = 64 ranks, not 128" in shown
    assert not shown.rstrip().endswith("ok")


def test_two_thousand_ranks_need_two_of_each_stage() -> None:
    config = load_config(LLAMA_2B, [*SPLIT])
    assert distinct_ranks(config, 2048) == [0, 511, 512, 1023, 1024, 1535, 1536, 2047]


def test_interleaved_uneven_stages_on_context_ranks_are_built_as_reckoned() -> None:
    """Also where tensor-parallel ranks share KV heads: the model is whole, each stage holds the
    layers that were said, and the planner's bytes are those of the built ranks."""
    uneven = ["parallel.first_stage_layers=6", "parallel.last_stage_layers=10"]
    more = ["parallel.virtual_pipeline=2", "parallel.context=2", *uneven]
    shared = ["parallel.tensor=4", "model.num_kv_heads=2"]
    config = load_config(LLAMA_2B, [*SPLIT, *more, *shared])
    check = check_ranks(config, 128)
    layers = {rank["stage"]: rank["layers"] for rank in check.ranks}
    assert layers == {0: 6, 1: 8, 2: 8, 3: 10}
    first = {rank["stage"]: rank["of_the_model"] for rank in check.ranks}
    assert sum(first.values()) == count_parameters(config.model).total
    stages = make_plan(config, 128, "a100-80gb").memory_gib
    for rank in check.ranks:
        for name, reckoned in (("weight", "weights"), ("optimizer", "optimizer")):
            expected = stages[rank["stage"]][reckoned]
            assert rank[f"{name}_bytes"] / GIB == pytest.approx(expected, rel=0.01)
    shown = check.text()
    assert "6 + 8 + 8 + 10 layers" in shown
    assert "over 8 data- and context-parallel ranks" in shown
