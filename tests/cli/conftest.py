"""Machines without torch."""

import pytest


@pytest.fixture(scope="session")
def poison(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH of a torch that cannot be imported."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    return str(folder)
