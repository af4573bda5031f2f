"""The last step of every command that writes a pair: into place, receipt last, or not at all.

    with work_folder(prefix, wanted, overwrite) as folder:     # PREFIX.work/, locked
        ...                                                    # may be killed anywhere
        write_json(folder / "publish.json", receipt)  # now it only has to be moved
        publish_all(folder, prefix)

Refuses two commands on one PREFIX, and work in progress on something else.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools import indexed
from data_tools.errors import UserError
from data_tools.files import checksum, read_json, write_json
from data_tools.lock import exclusive
from data_tools.pair import publish
from data_tools.receipt import read_receipt, receipt_path, write_receipt


def finished(prefix: Path, wanted: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The receipt, if PREFIX is already made from the same things; None if it has to be made.

    Raises `UserError` when PREFIX was made from something else and may not be overwritten.
    """
    known = read_receipt(prefix)
    if known is None:
        publishing = prefix.with_name(f"{prefix.name}.work") / "publish.json"
        if indexed.paths(prefix)[0].exists() and not overwrite and not publishing.exists():
            raise UserError(
                f"{prefix}.bin exists and no receipt says what it is: write --overwrite to replace "
                "it, or choose another name"
            )
        if wanted["options"].get("shard_tokens") and not overwrite and not publishing.exists():
            _refuse_foreign_shards(prefix)
        return None
    if _same(known, wanted) and _whole(prefix, known):
        _remove_leftover(prefix.with_name(f"{prefix.name}.work"), known["wanted"])
        return {**known, "reused": True}
    if not overwrite:
        raise UserError(
            f"{prefix} exists and was made from other inputs, options or another tokenizer, or "
            "is damaged: write --overwrite to replace it, or choose another name"
        )
    return None


def _refuse_foreign_shards(prefix: Path) -> None:
    """Shards are named PREFIX-00000 and so on, as files that are none of ours may be."""
    names = f"{glob.escape(prefix.name)}-{'[0-9]' * 5}.*"
    for path in sorted(prefix.parent.glob(names)):
        if path.suffix in (".bin", ".idx"):
            raise UserError(
                f"{path} exists and --shard-tokens may write a file of this name: choose another "
                "--output, or write --overwrite to replace it"
            )


def _remove_leftover(folder: Path, plan: dict[str, Any]) -> None:
    """A run killed after its last step leaves its work folder behind; others' work stays."""
    with contextlib.suppress(OSError), open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (folder / "plan.json").exists() or read_json(folder / "plan.json") == plan:
            shutil.rmtree(folder)


def _whole(prefix: Path, receipt: dict[str, Any]) -> bool:
    files = [pair[ending] for pair in receipt["outputs"]["pairs"] for ending in ("bin", "idx")]
    found = ((prefix.with_name(file["path"]), file["size"]) for file in files)
    return all(path.is_file() and path.stat().st_size == size for path, size in found)


def _same(receipt: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether finished files come from the same things."""
    made = receipt["wanted"]
    if {**made, "inputs": 0} != {**wanted, "inputs": 0} or len(made["inputs"]) != len(
        wanted["inputs"]
    ):
        return False
    sums = {entry["path"]: entry["checksum"] for entry in receipt["inputs"] if "start" not in entry}
    for old, new in zip(made["inputs"], wanted["inputs"], strict=True):
        if old == new and new["path"] != "-":
            continue
        # A file that was written again with the same content is the same file.
        if (old["path"], old["size"]) != (new["path"], new["size"]) or new["path"] == "-":
            return False
        # Pairs are named by their prefix, which is no file: theirs counts as changed.
        known = sums.get(new["path"])
        if known is None or not os.path.isfile(new["path"]) or checksum(new["path"]) != known:
            return False
    return True


@contextlib.contextmanager
def work_folder(prefix: Path, wanted: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """PREFIX.work/, locked, holding this plan's work and no other's."""
    folder = prefix.with_name(f"{prefix.name}.work")
    with exclusive(folder / "lock", str(prefix)):
        plan = folder / "plan.json"
        known = _read_plan(plan)
        unrepeatable = any(entry["path"] == "-" for entry in wanted["inputs"])
        if known is not None and known != wanted and not overwrite:
            raise UserError(
                f"{folder} holds unfinished work on other inputs, options or another tokenizer: "
                "write --overwrite to discard it, or choose another name"
            )
        if known != wanted or unrepeatable:
            for child in folder.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)
                elif child.name != "lock":
                    child.unlink()
            write_json(plan, wanted)
        (folder / "parts").mkdir(exist_ok=True)
        yield folder


def _read_plan(plan: Path) -> dict[str, Any] | None:
    try:
        return read_json(plan)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{plan} is damaged ({error}): remove {plan.parent} and begin again"
        ) from error


def publish_all(folder: Path, prefix: Path) -> dict[str, Any]:
    """Files into place, the receipt last, the work folder away. Harmless to repeat."""
    receipt = read_json(folder / "publish.json")
    pairs_folder = receipt.pop("pairs_folder")
    _remove_replaced(prefix, receipt)
    receipt_path(prefix).unlink(missing_ok=True)  # of what is being replaced
    publish(folder / pairs_folder, prefix, receipt["outputs"]["pairs"])
    listed = Path(f"{prefix}.rejected.jsonl")
    rejects = folder / "rejected.jsonl"
    if rejects.exists():
        if rejects.stat().st_size:
            os.replace(rejects, listed)
        else:
            rejects.unlink()
            listed.unlink(missing_ok=True)
    if len(receipt["outputs"]["pairs"]) > 1 or receipt["options"]["shard_tokens"]:
        for number, pair in enumerate(receipt["outputs"]["pairs"]):
            write_receipt(prefix.with_name(pair["prefix"]), _shard_receipt(receipt, number, pair))
    receipt = write_receipt(prefix, receipt)
    shutil.rmtree(folder, ignore_errors=True)
    return {**receipt, "reused": False}


def _remove_replaced(prefix: Path, receipt: dict[str, Any]) -> None:
    """Remove the pairs that the old receipt lists and the new one does not: they look valid.

    Shards that were just merged stay: they are inputs, not leftovers.
    """
    old = read_receipt(prefix) or {"outputs": {"pairs": []}}
    keep = {prefix.with_name(pair["prefix"]) for pair in receipt["outputs"]["pairs"]}
    inputs = {os.path.realpath(name) for name in receipt.get("merged", ())}
    for pair in old["outputs"]["pairs"]:
        name = prefix.with_name(pair["prefix"])
        if name not in keep and os.path.realpath(name) not in inputs:
            for path in (receipt_path(name), *indexed.paths(name)):
                path.unlink(missing_ok=True)


def _shard_receipt(receipt: dict[str, Any], number: int, pair: dict[str, Any]) -> dict[str, Any]:
    """A shard can be loaded, verified and merged alone. What is counted for all shards together
    is null in `counts`; `shard` has it, for `merge` to carry on when it sees all of them.
    """
    return {
        **receipt,
        "counts": {
            **dict.fromkeys(receipt["counts"]),
            "documents": pair["documents"],
            "tokens": pair["tokens"],
        },
        "shard": {
            "number": number,
            "of": len(receipt["outputs"]["pairs"]),
            "counts": receipt["counts"],
        },
        "lengths": [],
        "outputs": {**receipt["outputs"], "pairs": [pair]},
    }
