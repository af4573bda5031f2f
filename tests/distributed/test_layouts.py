"""Every layout is the same training: real processes against one process, in fp32."""

from pathlib import Path

import pytest

from tests.conftest import metrics, pretrain

LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "data": (2, []),
    "distributed optimizer": (2, ["parallel.distributed_optimizer=true"]),
    "all together": (
        8,
        [
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.pipeline=2",
            "parallel.distributed_optimizer=true",
        ],
    ),
}

# Model variants whose weights are shared or divided in ways of their own.
VARIANTS = {
    "tied embeddings over pipeline stages": (
        ["model.tied_embeddings=true", "model.qkv_bias=true"],
        2,
        ["parallel.pipeline=2"],
    ),
    "grouped-query attention over tensor ranks": (
        ["model.num_kv_heads=2"],
        2,
        ["parallel.tensor=2"],
    ),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, corpus: Path):
    """Metrics of the same run on one process, for given extra settings; each run once."""
    known: dict[tuple[str, ...], list[dict]] = {}

    def run(config_file: Path, *settings: str) -> list[dict]:
        if settings not in known:
            run_dir = tmp_path_factory.mktemp("one")
            pretrain(config_file, f"training.run_dir={run_dir}", *settings)
            known[settings] = metrics(run_dir)
        return known[settings]

    return run


def assert_same_training(ours: list[dict], reference: list[dict]) -> None:
    assert len(ours) == len(reference) == 21  # 20 steps and the last validation
    for a, b in zip(ours, reference, strict=True):
        for name in {"loss", "grad_norm", "validation_loss"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4), (b["step"], name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_process_does(
    layout: str, config_file: Path, one_process, tmp_path: Path
) -> None:
    processes, settings = LAYOUTS[layout]
    pretrain(config_file, *settings, processes=processes)
    assert_same_training(metrics(tmp_path / "run"), one_process(config_file))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_trains_in_parallel_as_on_one_process(
    variant: str, config_file: Path, one_process, tmp_path: Path
) -> None:
    model, processes, layout = VARIANTS[variant]
    pretrain(config_file, *model, *layout, processes=processes)
    assert_same_training(metrics(tmp_path / "run"), one_process(config_file, *model))


@pytest.mark.parametrize("recompute", [pytest.param("selective", marks=pytest.mark.slow), "full"])
def test_recomputed_activations_change_no_number(
    recompute: str, config_file: Path, one_process, tmp_path: Path
) -> None:
    pretrain(config_file, f"training.recompute={recompute}")
    for a, b in zip(metrics(tmp_path / "run"), one_process(config_file), strict=True):
        assert a.get("loss") == b.get("loss")


def test_wrong_number_of_processes_is_refused_in_one_sentence(config_file: Path) -> None:
    printed = pretrain(config_file, "parallel.tensor=2", code=2)
    assert "1 processes were started" in printed or "world size" in printed.lower()
    assert "Traceback" not in printed
