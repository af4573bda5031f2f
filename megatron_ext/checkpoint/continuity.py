"""What a resumed run must share with its checkpoint: the model, its RoPE, the number format, the
kind of optimizer state, and the data in its order. Needs no torch.

    check_continues(checkpoint_record, this_run)      # raises UserError naming the first difference

Layout, learning rate, intervals and the like may change.
"""

from collections.abc import Iterator
from typing import Any

from megatron_ext.errors import UserError

_FIXED = ("model.", "rope.", "precision.dtype", "parallel.distributed_optimizer", "data.")
_FREE = ("rope.bound",)  # how loudly the bound is told
_PLACES = ("path",)  # token files may have moved


def check_continues(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare two records {"config": ..., "data": ...} of a run, setting by setting."""
    before, after = dict(_fixed(saved)), dict(_fixed(now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise UserError(
                f"the checkpoint to go on from has {name}={before.get(name)}, this run "
                f"{after.get(name)}: set it back, or begin anew with another training.run_dir"
            )


def _fixed(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    # The fingerprint stands in for the config's data section, which says where files lie.
    settings = {**record["config"], "data": record["data"]}
    for name, value in _flat(settings, ""):
        if name.startswith(_FIXED) and name not in _FREE and name.split(".")[-1] not in _PLACES:
            yield name, value


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, value
