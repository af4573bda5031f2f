"""Every config of the repository loads, and says what the papers say."""

from pathlib import Path

import pytest

from megatron_ext.config import load_config, rope_verdict, validate
from megatron_ext.config.files import read_layer
from megatron_ext.errors import ConfigError
from megatron_ext.planning.parameters import count_parameters
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
# A file that only others inherit from may leave out what they differ in.
PARTS = {"demo/common.yaml": "rope.base=1e4"}
SHIPPED = sorted(
    str(p.relative_to(CONFIGS))
    for p in CONFIGS.rglob("*.yaml")
    if p.parent.name not in ("data", "sweeps")
)
SWEEP = ("1e2", "5e2", "1e3", "1e4", "1e5", "2e5", "5e5", "1e6", "5e6")


@pytest.mark.parametrize("name", SHIPPED)
def test_it_loads(name: str) -> None:
    load_config(CONFIGS / name, [PARTS[name]] if name in PARTS else [])


def test_the_parts_are_parts() -> None:
    for name in PARTS:
        with pytest.raises(ConfigError, match="is missing"):
            load_config(CONFIGS / name)


def test_the_2b_is_the_papers() -> None:
    config = load_config(CONFIGS / "models/llama_2b.yaml")
    assert count_parameters(config.model).total == 2_133_985_280
    assert config.training.steps == 238_419
    assert config.training.tokens_per_step == 4_194_304
    assert config.model.head_dim == 128
    assert config.parallel.world_size == 128
    assert validate(config) == []


def test_redpajama_is_mixed_as_llamas_data() -> None:
    corpora = load_config(CONFIGS / "runs/redpajama_2b.yaml").data.corpora
    assert [corpus.weight for corpus in corpora.values()] == [67, 15, 4.5, 4.5, 4.5, 2.5, 2]
    assert len({corpus.path for corpus in corpora.values()}) == 7


def test_the_tiny_one_is_tiny_and_runs_anywhere() -> None:
    config = load_config(CONFIGS / "models/tiny.yaml")
    assert count_parameters(config.model).total == 5_310_720
    assert (config.precision.dtype, config.parallel.world_size) == ("fp32", 1)


@pytest.mark.parametrize("base", SWEEP)
def test_an_arm_of_the_sweep_names_its_base_and_nothing_else(base: str) -> None:
    file = CONFIGS / f"runs/rope_base/base_{base}.yaml"
    assert file.read_text() == f"base: common.yaml\nrope:\n  base: {base}\n"
    config = load_config(file)
    plain = load_config(CONFIGS / "models/llama_2b.yaml")
    assert config.rope.base == float(base)
    for section in ("model", "data", "optimizer", "schedule", "parallel"):
        assert getattr(config, section) == getattr(plain, section)
    # PAPERS: at 4k and head dim 128 the bound lies between 1e4 and 1e5.
    assert rope_verdict(config).feasible == (float(base) >= 1e5)


def test_the_sweep_is_complete() -> None:
    files = {p.stem for p in (CONFIGS / "runs/rope_base").glob("base_*.yaml")}
    assert files == {f"base_{base}" for base in SWEEP}


def test_the_papers_fine_tunes_differ_in_the_base_alone() -> None:
    low, high = (
        load_config(CONFIGS / f"runs/paper/base_{base}_32k.yaml") for base in ("1e4", "1e6")
    )
    assert (low.rope.base, high.rope.base) == (1e4, 1e6)
    for config in (low, high):
        training = config.training
        assert (training.steps, training.global_batch_size) == (1000, 128)
        assert (training.sequence_length, training.init_from) == (32768, Path("runs/base_100_4k"))
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-5, 0)
        assert config.schedule.type == "constant"
    scratch = load_config(CONFIGS / "runs/paper/base_100_4k.yaml")
    assert scratch.rope.base == 100 and scratch.training.run_dir == low.training.init_from
    assert low.model == high.model == scratch.model
    low_values, high_values = (
        read_layer(CONFIGS / f"runs/paper/base_{base}_32k.yaml").values for base in ("1e4", "1e6")
    )
    assert {k: v for k, v in low_values.items() if k != "rope"} == {
        k: v for k, v in high_values.items() if k != "rope"
    }


def test_base_1e6_misses_32k_by_little() -> None:
    verdict = rope_verdict(load_config(CONFIGS / "runs/paper/base_1e6_32k.yaml"))
    assert verdict.first_failing_distance == 27115
    assert round(verdict.failing_share * 32768) == 4


def test_the_demo_has_one_arm_on_each_side_of_the_bound() -> None:
    below, above = (load_config(CONFIGS / f"demo/{name}.yaml") for name in ("below", "above"))
    assert not rope_verdict(below).feasible
    assert rope_verdict(above).feasible
    assert below.model == above.model and below.data == above.data
