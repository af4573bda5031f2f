"""`megatron-ext checkpoint`: what a run has saved, whether it is whole, and what may go.

    megatron-ext checkpoint list runs/llama_2b
    megatron-ext checkpoint verify runs/llama_2b/checkpoints/step_00001000
    megatron-ext checkpoint prune runs/llama_2b --keep-last 1 --dry-run

Reads JSON and checksums files: nothing of a checkpoint is carried out, and torch is not needed.
"""

from __future__ import annotations

import json as json_module
import math
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_ext.checkpoint import manifest
from megatron_ext.config import load_config
from megatron_ext.errors import UserError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "uint8": 1}


class Action(str, Enum):
    list = "list"
    verify = "verify"
    inspect = "inspect"
    prune = "prune"


def checkpoint(
    action: Annotated[Action, typer.Argument(help="What to do.", show_default=False)],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or one checkpoint.")],
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, help="prune: newest ones that stay.  [run's checkpoint.keep_last]"),
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="prune: multiples of it stay for good.  [run's checkpoint.keep_every]"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="prune: only say what would be deleted.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List, verify, inspect or prune the checkpoints of a run.

    list: steps, sizes, layouts.  verify: every file against its checksum, exit code 1 when one is
    damaged.  inspect: what the newest one, or the one named, holds.  prune: delete all but the
    newest and the permanent ones; one that verifies always stays.

    Example: megatron-ext checkpoint verify runs/demo/above

    Example: megatron-ext checkpoint prune runs/demo/above --keep-last 1 --dry-run
    """
    folders = _folders(run)
    if action is Action.list:
        _show([_summary(folder) for folder in folders], json)
    elif action is Action.verify:
        _verify(folders, json)
    elif action is Action.inspect:
        _inspect(folders[0], json)
    else:
        _prune(run, keep_last, keep_every, dry_run, json)


def _folders(run: Path) -> list[Path]:
    """The checkpoint named, or those of a run, newest first."""
    folders = [run] if (run / manifest.MANIFEST).is_file() else manifest.find_folders(run)
    if not folders:
        raise UserError(f"{run} is neither a checkpoint nor a run folder that holds one")
    return folders


def _summary(folder: Path) -> dict[str, Any]:
    """What its JSON and its files' sizes say of a checkpoint; nothing is read of the tensors."""
    try:
        files = json_module.loads((folder / manifest.MANIFEST).read_bytes())["files"]
        wrong = [
            name
            for name, facts in files.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != facts["bytes"]
        ]
        facts = _facts(folder)
        return {
            "checkpoint": str(folder),
            "step": facts["step"],
            "tokens": facts["consumed_tokens"],
            "samples": facts["consumed_samples"],
            "layout": facts["layout"],
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "saved": datetime.fromtimestamp((folder / manifest.MANIFEST).stat().st_mtime).isoformat(
                timespec="seconds"
            ),
            "problem": f"{wrong[0]} is missing or has another size" if wrong else None,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {"checkpoint": str(folder), "problem": f"unreadable: {error!r}"}


def _facts(folder: Path) -> dict[str, Any]:
    return json_module.loads((folder / "run.json").read_bytes())


def _show(found: list[dict[str, Any]], json: bool) -> None:
    if json:
        print(json_module.dumps({"checkpoints": found}, indent=1))
        return
    print(f"{'step':>10}  {'tokens':>17}  {'GB':>9}  {'layout':<18}  saved")
    for entry in found:
        if "step" not in entry:
            print(f"{Path(entry['checkpoint']).name}: {entry['problem']}")
            continue
        problem = f"  DAMAGED: {entry['problem']}" if entry["problem"] else ""
        print(
            f"{entry['step']:>10,}  {entry['tokens']:>17,}  {entry['bytes'] / 1e9:>9.3g}  "
            f"{_layout(entry['layout']):<18}  {entry['saved']}{problem}"
        )


def _layout(layout: dict[str, int]) -> str:
    short = {"tensor": "TP", "pipeline": "PP", "context": "CP", "data": "DP"}
    sizes = [f"{short[name]}{layout[name]}" for name in short if layout.get(name, 1) > 1]
    return " ".join(sizes) or "1 rank"


def _verify(folders: list[Path], json: bool) -> None:
    found = {str(folder): manifest.verify(folder) for folder in folders}
    if json:
        print(json_module.dumps({"problems": found}, indent=1))
    else:
        for folder, problems in found.items():
            print(f"{folder}: {'DAMAGED' if problems else 'every file is as it was written'}")
            for problem in problems:
                print(f"  {problem}")
    if any(found.values()):
        raise typer.Exit(1)


def _inspect(folder: Path, json: bool) -> None:
    try:
        facts = _facts(folder)
        index = json_module.loads((folder / "tensors.json").read_bytes())
        tensors = {
            key: {
                "dtype": whole["dtype"],
                "shape": whole["shape"],
                "parts": len(whole["chunks"]),
                "bytes": math.prod(whole["shape"]) * _BYTES.get(whole["dtype"], 8),
            }
            for key, whole in sorted(index.items())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read, see `checkpoint verify`: {error!r}") from None
    if json:
        print(json_module.dumps({"run": facts, "tensors": tensors}, indent=1))
        return
    print(f"{folder}: after step {facts['step']:,}, {facts['consumed_tokens']:,} tokens")
    for name in ("layout", "config_hash", "data_hash", "optimizer_steps"):
        print(f"{name + ':':<17}{facts[name]}")
    for key, tensor in tensors.items():
        if not key.startswith("rng."):
            shape = " x ".join(str(size) for size in tensor["shape"])
            print(f"{tensor['bytes'] / 1e6:>10,.3f} MB  {tensor['dtype']:<9}{shape:<22}{key}")
    total = sum(tensor["bytes"] for tensor in tensors.values())
    print(f"{total / 1e6:>10,.3f} MB in {len(tensors)} tensors")


def _prune(
    run: Path, keep_last: int | None, keep_every: int | None, dry_run: bool, json: bool
) -> None:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml: prune takes the folder of a run")
    settings = load_config(run / "config.yaml").checkpoint
    kept = manifest.find_checkpoints(run)
    doomed = manifest.superfluous(
        run,
        keep_last or settings.keep_last,
        keep_every or settings.keep_every,
        manifest.step_of(kept[0]) if kept else 0,
    )
    kept = [folder for folder in kept if folder not in doomed]
    # A run's own newest one is known to be whole; here that has to be looked at.
    spared = None
    if doomed and not any(not manifest.verify(folder) for folder in kept):
        spared = next((folder for folder in doomed if not manifest.verify(folder)), None)
        doomed = [folder for folder in doomed if folder != spared]
    if not dry_run:
        manifest.delete(doomed)
    if json:
        answer = {"deleted": [str(folder) for folder in doomed], "dry_run": dry_run}
        print(json_module.dumps(answer | {"spared": str(spared) if spared else None}, indent=1))
        return
    for folder in doomed:
        print(f"{'would delete' if dry_run else 'deleted'} {folder}")
    if spared:
        print(f"kept {spared}: no newer one verifies")
    if not doomed:
        print("nothing to delete")
