"""A small valid config file, and a place to break it."""

from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow now and then, which says nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

VALID = """\
model:
  num_layers: 4
  hidden_size: 256
  ffn_hidden_size: 704
  num_heads: 4
  vocab_size: 2048
rope:
  base: 1e4
training:
  sequence_length: 256
  global_batch_size: 8
  micro_batch_size: 1
  steps: 100
optimizer:
  lr: 1e-3
"""


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    file = tmp_path / "valid.yaml"
    file.write_text(VALID)
    return file
