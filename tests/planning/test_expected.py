"""What a run is told to expect of the GPUs that it finds itself on."""

from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.planning.plan import expected_on, make_plan


def test_the_drivers_name_says_which_gpu_and_a_plan_that_fails_stops_nothing(
    config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(config_file)
    small, large = "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"
    assert expected_on("cpu (2 cores)", config, 2) is None
    expected = [expected_on(name, config, 2) or {} for name in (small, large)]
    assert [found["gpu"] for found in expected] == ["a100_40gb", "a100_80gb"]
    assert expected[0]["step_time_s"] == make_plan(config, 2, "a100_40gb").step_time_s
    assert not caplog.records
    assert expected_on(large, config, 3) is None  # 3 do not divide the batch of 8
    assert "no prediction for 3 x a100_80gb" in caplog.text
