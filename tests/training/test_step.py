"""The learning rate, and when a step asks whether to stop."""

import datetime
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext.config import Config, load_config
from megatron_ext.training.step import learning_rate


def scheduled(config_file: Path, *settings: str) -> Config:
    return load_config(config_file, ["optimizer.lr=1.0", "training.steps=100", *settings])


def test_warm_up_is_a_line_to_the_peak(config_file: Path) -> None:
    config = scheduled(config_file, "schedule.warmup_steps=10")
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx(
        [(step + 1) / 10 for step in range(10)]
    )


def test_cosine_falls_from_peak_to_minimum(config_file: Path) -> None:
    config = scheduled(config_file, "schedule.warmup_steps=10", "schedule.min_lr=0.1")
    for step in range(10, 101):
        wanted = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert learning_rate(step, config) == pytest.approx(wanted)


def test_other_shapes(config_file: Path) -> None:
    constant = scheduled(config_file, "schedule.type=constant", "schedule.warmup_steps=4")
    assert {learning_rate(step, constant) for step in range(4, 100)} == {1.0}
    linear = scheduled(config_file, "schedule.type=linear")
    assert learning_rate(25, linear) == pytest.approx(0.75)
    wsd = scheduled(config_file, "schedule.type=wsd", "schedule.decay_steps=20")
    assert learning_rate(79, wsd) == 1.0
    assert learning_rate(90, wsd) == pytest.approx(0.5)
    short = scheduled(config_file, "schedule.decay_steps=50", "schedule.min_lr=0.2")
    assert {learning_rate(step, short) for step in range(50, 100)} == {0.2}


def test_a_request_to_stop_counts_for_the_step_it_comes_in(config_file: Path) -> None:
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from megatron_ext.model.llama import build_model
    from megatron_ext.training.optimizer import build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.world import limit_collectives
    from tests.model.conftest import single_process

    config = load_config(config_file, ["faults.hang_timeout_s=40"])
    asked = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            asked.append(True)
            tokens = torch.ones(1, 64, dtype=torch.long)
            yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, 64)}

    with single_process(config):
        limit_collectives(config)
        groups = [
            g for g in distributed_c10d._world.pg_map if g != dist.GroupMember.NON_GROUP_MEMBER
        ]
        timeouts = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
        model = build_model(config)
        optimizer = build_optimizer(model, config)
        result = train_step(0, batches(), model, optimizer, config, lambda: bool(asked))
    assert result.stop and not result.skipped
    assert timeouts == {datetime.timedelta(seconds=40 + 60)}  # behind the watchdog
