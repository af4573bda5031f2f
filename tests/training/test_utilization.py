"""Whose peak a run's use is a share of."""

import pytest

from megatron_ext.training.utilization import data_sheet


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L4", None),
    ],
)
def test_a_card_and_its_slower_forms_are_told_apart(device: str, tflops: float | None) -> None:
    assert data_sheet(device).tflops == tflops
