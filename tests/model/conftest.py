"""A tiny model in this very process."""

from contextlib import contextmanager

import pytest

from tests.conftest import LAUNCHER


def settings(**model: object) -> dict:
    return {
        "model": {
            "num_layers": 3,
            "hidden_size": 64,
            "ffn_hidden_size": 176,
            "num_heads": 4,
            "vocab_size": 160,
            **model,
        },
        "rope": {"base": 500.0},
        "training": {
            "run_dir": "runs/none",
            "sequence_length": 48,
            "global_batch_size": 2,
            "micro_batch_size": 2,
            "steps": 1,
        },
        "optimizer": {"lr": 1e-3},
        "precision": {"dtype": "fp32"},
    }


@contextmanager
def single_process(config):
    """A world of one process in this very process, closed again."""
    from megatron_ext.world import world

    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        with world(config) as here:
            yield here


@pytest.fixture
def here():
    from megatron_ext.config import Config

    with single_process(Config.model_validate(settings())) as this:
        yield this
