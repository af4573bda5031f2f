"""Which changes a resumed run may make."""

from pathlib import Path

import pytest

from megatron_ext.checkpoint.continuity import check_continues
from megatron_ext.config import load_config
from megatron_ext.data.corpora import fingerprint_of
from megatron_ext.errors import UserError


def record(config_file: Path, *settings: str) -> dict:
    config = load_config(config_file, settings)
    return {"config": config.model_dump(mode="json"), "data": fingerprint_of(config)}


@pytest.mark.parametrize(
    "change",
    [
        "rope.base=2e4",
        "rope.scaling={type: linear, factor: 2}",
        "model.num_layers=2",
        "model.num_kv_heads=2",
        "precision.dtype=bf16",
        "training.seed=1",
        "training.steps=19",
        "training.global_batch_size=16",
        "training.sequence_length=32",
        "data.corpora.stdlib.weight=2",
        "data.validation_fraction=0.2",
    ],
)
def test_change_of_model_or_data_is_refused_by_name(change: str, config_file: Path) -> None:
    with pytest.raises(UserError, match=r"set it back, or begin anew"):
        check_continues(record(config_file), record(config_file, change))


def test_order_of_the_corpora_is_part_of_the_data(config_file: Path, corpus: Path) -> None:
    """The blend deals out samples in the corpora's order: weights .3, .7 are not .7, .3 renamed."""
    a, b = (f"{name}: {{path: {corpus}, weight: {w}}}" for name, w in (("a", 0.3), ("b", 0.7)))
    drop = "data.corpora.stdlib=null"
    one = record(config_file, drop, f"data.corpora={{{a}, {b}}}")
    other = record(config_file, drop, f"data.corpora={{{b}, {a}}}")
    with pytest.raises(UserError, match=r"data\.order"):
        check_continues(one, other)


@pytest.mark.parametrize(
    "change",
    [
        "parallel.tensor=2",
        "parallel.distributed_optimizer=true",
        "training.micro_batch_size=2",
        "optimizer.lr=1e-5",
        "checkpoint.interval=3",
        "rope.bound=warn",
        "training.recompute=full",
    ],
)
def test_layout_and_learning_rate_may_change(change: str, config_file: Path) -> None:
    check_continues(record(config_file), record(config_file, change))


def test_all_differences_are_told_and_those_of_the_data_can_be_allowed(config_file: Path) -> None:
    before = record(config_file)
    data = record(config_file, "training.seed=1", "data.corpora.stdlib.weight=2")
    with pytest.raises(UserError) as refused:
        check_continues(before, data)
    for line in ("data.seed: 1234 -> 1", "data.corpora.stdlib.weight: 1.0 -> 2.0"):
        assert f"\n  {line}\n" in str(refused.value)
    assert "checkpoint.on_data_change=allow" in str(refused.value)
    allowed = check_continues(before, data, allow_data=True)
    assert allowed == ["data.corpora.stdlib.weight: 1.0 -> 2.0", "data.seed: 1234 -> 1"]
    with pytest.raises(UserError, match=r"rope\.base: 10000\.0 -> 20000\.0"):
        check_continues(before, record(config_file, "training.seed=1", "rope.base=2e4"), True)


def test_token_files_may_move(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".receipt.json"):
        (tmp_path / f"moved{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    moved = record(config_file, f"data.corpora.stdlib.path={tmp_path / 'moved'}")
    check_continues(record(config_file), moved)


def test_a_setting_that_came_later_had_its_default(config_file: Path) -> None:
    before = record(config_file)
    del before["config"]["model"]["qkv_bias"]
    check_continues(before, record(config_file))
    with pytest.raises(UserError, match=r"model\.qkv_bias: False -> True"):
        check_continues(before, record(config_file, "model.qkv_bias=true"))
