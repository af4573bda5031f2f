"""Every damage is noticed and none is loaded; at length: python -m tests.checkpoint.corruption"""

from pathlib import Path

from tests.checkpoint.corruption import corrupt


def test_every_damage_is_detected_and_none_is_loaded(tmp_path: Path) -> None:
    injected, detected, loaded = corrupt(tmp_path, cases=120, seed=3)
    assert detected == injected and injected.total() == 120
    assert loaded.total() == 0
