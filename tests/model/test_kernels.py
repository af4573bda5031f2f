"""Which kernels are chosen, with every package simulated there and away, and why."""

from collections.abc import Collection

import pytest

from megatron_ext.config import Config, load_config
from megatron_ext.errors import UserError
from megatron_ext.model.kernels import PACKAGES, TABLE, Found, choose, look, plain
from tests.conftest import ROOT

HOPPER, AMPERE, VOLTA = (9, 0), (8, 0), (7, 0)
NO_TE = [name for name in PACKAGES if name != "transformer_engine"]
OVERLAP = ["parallel.tensor_overlap=true", "parallel.sequence=true", "parallel.tensor=2"]


def config(*settings: str) -> Config:
    return load_config(ROOT / "configs/models/llama_2b.yaml", settings)


def machine(
    capability: tuple[int, int] | None, missing: Collection[str] = (), compiler: bool = True
) -> Found:
    return Found(capability, dict.fromkeys(missing, "not installed"), compiler)


def names(kernels) -> dict[str, str]:
    return {part: getattr(kernels, part).name for part in TABLE}


PLAIN = {
    "backend": "torch", "attention": "sdpa", "optimizer": "torch", "fusions": "none",
    "grad_accumulation": "none",
}  # fmt: skip
ADDMM = {"grad_accumulation": "torch"}
TE = {"backend": "transformer_engine", "attention": "transformer_engine"}


@pytest.mark.parametrize(
    ("found", "differs"),
    [
        (machine(None), {}),  # packages without a GPU change nothing
        (machine(None, PACKAGES), {}),
        (
            machine(HOPPER),
            TE | {"optimizer": "transformer_engine", "fusions": "compiled",
                  "grad_accumulation": "apex"},
        ),
        (machine(AMPERE, PACKAGES), ADDMM),
        (machine(AMPERE, [p for p in PACKAGES if p != "triton"]), ADDMM | {"fusions": "compiled"}),
        (machine(AMPERE, ["transformer_engine"]),
         {"optimizer": "apex", "fusions": "compiled", "grad_accumulation": "apex"}),
        (machine(AMPERE, ["apex", "fused_weight_gradient_mlp_cuda"]),
         TE | ADDMM | {"optimizer": "transformer_engine", "fusions": "compiled"}),
        (machine(AMPERE, PACKAGES, compiler=False), ADDMM),
        (machine(HOPPER, NO_TE, compiler=False), TE | ADDMM | {"optimizer": "transformer_engine"}),
    ],
)  # fmt: skip
def test_auto_takes_the_fastest_that_is_there(found: Found, differs: dict[str, str]) -> None:
    assert names(choose(config(), found)) == PLAIN | differs


def test_fp32_is_left_to_pytorch() -> None:
    """Transformer Engine multiplies fp32 in TF32, and of its attentions only the unfused has it."""
    chosen = choose(config("precision.dtype=fp32"), machine(HOPPER))
    others = {"optimizer": "transformer_engine", "fusions": "compiled"}
    assert names(chosen) == PLAIN | ADDMM | others
    assert names(choose(config("precision.dtype=fp32"), machine(None))) == PLAIN | ADDMM
    assert "backend torch (Transformer Engine multiplies fp32 in TF32)" in str(chosen)


@pytest.mark.parametrize("part", ["backend", "attention"])
def test_of_fp32_on_transformer_engine_the_way_out_is_another_precision(part: str) -> None:
    with pytest.raises(UserError, match=r": set precision\.dtype=bf16, or set kernels"):
        choose(
            config("precision.dtype=fp32", f"kernels.{part}=transformer_engine"), machine(HOPPER)
        )


def test_the_line_of_the_log_says_why() -> None:
    line = str(choose(config(), machine(AMPERE, ["transformer_engine", "triton"])))
    assert line.startswith(
        "backend torch, attention sdpa, optimizer apex (transformer_engine is not installed); "
    )
    assert "fusions none (triton is not installed)" in line
    assert "cross_entropy whole" in line
    alone = str(choose(config(), machine(None)))
    assert alone.startswith("backend torch, attention sdpa, optimizer torch, fusions none")
    assert alone.count("no GPU") == 2
    assert "grad_accumulation none (no GPU and a CPU adds no products of 16 bits to a s" in alone
    asked = str(choose(config("kernels.attention=flash"), machine(AMPERE)))
    assert "attention flash (kernels.attention=flash)" in asked


@pytest.mark.parametrize("package", PACKAGES)
def test_a_forced_choice_that_is_missing_is_refused_with_the_way_to_get_it(package: str) -> None:
    asked = {
        "transformer_engine": "kernels.backend=transformer_engine",
        "flash_attn": "kernels.attention=flash_attn",
        "apex": "kernels.optimizer=apex",
        "fused_weight_gradient_mlp_cuda": "kernels.grad_accumulation=apex",
        "triton": "kernels.fusions=compiled",
    }[package]
    for problem in ("not installed", "installed but not importable: undefined symbol"):
        broken = {package: problem}
        if package == "apex":  # its Adam is asked for only where Transformer Engine's is not
            broken["transformer_engine"] = "not installed"
        with pytest.raises(UserError) as refused:
            choose(config(asked), Found(HOPPER, broken))
        text = str(refused.value)
        assert text.startswith(f"{asked} cannot be had ({package} is {problem}): ")
        assert PACKAGES[package] in text
        assert f"set {asked.split('=')[0]}=auto" in text
    with pytest.raises(UserError, match="no GPU"):
        choose(config(asked), machine(None))
    there = machine(HOPPER, ["transformer_engine"] if package == "apex" else [])
    part, name = asked.removeprefix("kernels.").split("=")
    assert getattr(choose(config(asked), there), part).name == name


@pytest.mark.parametrize(
    ("settings", "found", "sentence"),
    [
        (["kernels.attention=flash"], machine(VOLTA), "flash attention needs compute capability"),
        (["kernels.attention=cudnn", "precision.dtype=fp32"], machine(HOPPER), "has no fp32"),
        (["kernels.attention=flash_attn", "parallel.context=2"], machine(HOPPER), "SDPA chooses"),
        (["kernels.grad_accumulation=apex", "precision.dtype=fp32"], machine(HOPPER), "16 bits"),
        (["kernels.grad_accumulation=torch"], machine(None),
         r"a CPU adds no products of 16 bits to a sum of 32\): set precision\.dtype=fp32, or set"),
        (["kernels.attention=transformer_engine", "precision.dtype=fp32"], machine(HOPPER),
         r"transformer_engine cannot be had \(its fused attention has no fp32\)"),
        (["kernels.backend=transformer_engine", "precision.dtype=fp32"], machine(HOPPER),
         r"transformer_engine cannot be had \(Transformer Engine multiplies fp32 in TF32\)"),
        (["kernels.backend=torch", "kernels.attention=transformer_engine"], machine(HOPPER),
         r"kernels\.attention=transformer_engine cannot be had \(kernels\.backend=torch\)"),
        (["precision.fp8=tensorwise"], machine(HOPPER, ["transformer_engine"]),
         r"precision\.fp8=tensorwise needs .* pip install --no-build-isolation 'transformer-engi"),
        (["precision.fp8=tensorwise"], machine(None), "precision.fp8=tensorwise needs .*no GPU"),
        (["precision.fp8=mxfp8"], machine(HOPPER), r"capability 10\.0, not 9\.0: set precision"),
        (["precision.fp8=tensorwise"], machine(AMPERE), r"capability 8\.9, not 8\.0"),
        ([*OVERLAP, "data.mask_documents=true"], machine(HOPPER), "data.mask_documents=true needs"),
        (OVERLAP, machine(HOPPER, ["transformer_engine"]),
         "parallel.tensor_overlap=true needs kernels.backend=transformer_engine"),
        (OVERLAP, machine(AMPERE),
         r"capability 9\.0, not 8\.0: export UB_SKIPMC=1 .*, or set parallel\.tensor_over"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_one_sentence(settings, found, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        choose(config(*settings), found)
    assert "\n" not in str(refused.value)


def test_fp8_and_tensor_overlap_are_let_through_where_they_work() -> None:
    choose(config("precision.fp8=tensorwise", *OVERLAP), machine(HOPPER))
    choose(config("precision.fp8=mxfp8"), machine((10, 0)))
    choose(config(*OVERLAP), Found(AMPERE, {}, without_multicast=True))


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("0", False), (None, False)])
def test_overlap_without_multicast_is_asked_for_in_the_environment(
    value: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UB_SKIPMC", raising=False)
    if value is not None:
        monkeypatch.setenv("UB_SKIPMC", value)
    assert look.__wrapped__().without_multicast is asked


def test_masks_between_documents_keep_to_kernels_that_take_them() -> None:
    chosen = names(choose(config("data.mask_documents=true"), machine(HOPPER)))
    assert (chosen["backend"], chosen["attention"]) == ("torch", "sdpa")


def test_every_option_of_the_schema_stands_in_the_table() -> None:
    fields = type(config().kernels).model_fields
    for part, options in TABLE.items():
        assert set(fields[part].annotation.__args__) == {"auto", *(o.name for o in options)}


def test_plain_kernels_are_to_be_had_everywhere() -> None:
    wanted = plain(config(
        "kernels.attention=flash_attn", "precision.fp8=mxfp8", "kernels.fusions=compiled"
    ))  # fmt: skip
    assert names(choose(wanted, machine(None, PACKAGES, compiler=False))) == PLAIN


def test_this_machine_is_looked_at() -> None:
    import torch

    assert (look().capability is None) == (not torch.cuda.is_available())
