"""What a resumed run must share with its checkpoint: the model, its RoPE, the number format, and
the data in its order. Needs no torch.

    check_continues(checkpoint_record, this_run)    # raises UserError naming every difference

Layout, learning rate, intervals and the like may change. The sample order is made from the files,
their weights and order, the seed, the batch size and the number of steps: a change of any of them
would give samples twice or never, and is refused unless it is allowed.
"""

from collections.abc import Iterator
from typing import Any

from megatron_ext.config.settings import find
from megatron_ext.errors import UserError

_FIXED = ("model.", "rope.", "precision.dtype", "data.")
_FREE = ("rope.bound",)  # how loudly the bound is told
_PLACES = ("path",)  # token files may have moved
_ABSENT = "nothing"


def check_continues(
    saved: dict[str, Any], now: dict[str, Any], allow_data: bool = False
) -> list[str]:
    """Compare two records {"config": ..., "data": ...} of a run, setting by setting.

    Returns the differences in the data when they are allowed; raises UserError for all others.
    """
    before, after = dict(_fixed(saved)), dict(_fixed(now))
    # A setting that came after the checkpoint was written had its default.
    before = {n: _default(n) for n in after if not n.startswith("data.")} | before
    differences = {
        name: f"{name}: {before.get(name, _ABSENT)} -> {after.get(name, _ABSENT)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    }
    of_data = [text for name, text in differences.items() if name.startswith("data.")]
    if not differences or (allow_data and len(of_data) == len(differences)):
        return of_data
    way_out = "set it back, or begin anew with another training.run_dir"
    if len(of_data) == len(differences):
        way_out += ", or accept another order of samples with checkpoint.on_data_change=allow"
    lines = "".join(f"\n  {text}" for text in differences.values())
    raise UserError(
        f"this run does not continue its checkpoint (checkpoint -> this run):{lines}\n{way_out}"
    )


def _default(name: str) -> Any:
    setting = find(tuple(name.split(".")))
    return _ABSENT if setting is None else setting.schema.get("default", _ABSENT)


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
