"""One small trained run, evaluated in many ways."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import LAUNCHER, pretrain


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run of 20 steps with grouped queries, trained in one process."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(
        f"""\
model:
  {{num_layers: 4, hidden_size: 64, ffn_hidden_size: 176, num_heads: 4, num_kv_heads: 2,
   vocab_size: 512, init_std: 0.1}}
rope: {{base: 1e4}}
data:
  {{num_workers: 0, validation_fraction: 0.1, corpora: {{stdlib: {{path: {corpus}}}}}}}
training:
  run_dir: {folder / "run"}
  sequence_length: 64
  global_batch_size: 8
  micro_batch_size: 8
  steps: 20
optimizer: {{lr: 3e-3}}
precision: {{dtype: fp32}}
evaluation: {{stride: 16, max_tokens: 1500, batches: 1}}
"""
    )
    pretrain(folder / "small.yaml")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@contextmanager
def opened(run: Path) -> Iterator:
    """The scorer of a run or a Hugging Face folder, alone in this process."""
    from megatron_ext.evaluation.scoring import open_checkpoint
    from megatron_ext.evaluation.subject import find_subject

    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        subject = find_subject(run)
        with open_checkpoint(subject.config, subject.weights) as scorer:
            yield scorer


def hugging_face(scorer, run: Path):
    """transformers' Llama with the scorer's weights."""
    from megatron_ext.config import load_config
    from tests.model.test_llama import oracle

    weights = {name: x.detach().clone() for name, x in scorer.chunks[0].named_parameters()}
    return oracle(load_config(run / "config.yaml"), weights).eval()
