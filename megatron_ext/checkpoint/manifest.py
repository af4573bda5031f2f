"""What a whole checkpoint is: a folder whose manifest.json, written last, names every file with its
size and checksum. Needs no torch.

    for checkpoint in find_checkpoints(run_dir): ...       # newest first, those with a manifest
    problems = verify(checkpoint)                          # [] when every file is as it was written

A folder without a manifest is a save that did not finish, and is no checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """runs/NAME/checkpoints/step_00001000: the state after 1,000 steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps done when this checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named like a checkpoint (step_00001000)")
    return int(match[1])


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, newest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in found if (p / MANIFEST).is_file()), reverse=True)


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and xxh3-128 checksum of each named file."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "xxh3_128": _checksum(folder / name)}
        for name in names
    }


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Seal a folder: from here on it is a checkpoint."""
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def verify(checkpoint: Path) -> list[str]:
    """Every difference between the folder and its manifest, one sentence each."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{checkpoint / MANIFEST} cannot be read: {error}"]
    problems = []
    for name, facts in files.items():
        file = checkpoint / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != facts["bytes"]:
            size = file.stat().st_size
            problems.append(f"{file} has {size} bytes instead of {facts['bytes']}")
        elif _checksum(file) != facts["xxh3_128"]:
            problems.append(f"{file} has the right size but not the content that was written")
    return problems


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones."""
    problems: list[str] = []
    for checkpoint in find_checkpoints(run_dir):
        found = verify(checkpoint)
        if not found:
            return checkpoint, problems
        problems += found
    return None, problems


def prune(run_dir: Path, keep_last: int, keep_every: int | None, done: int) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every`
    steps; leftovers of unfinished saves go too. Those after step `done` are not looked at: a run
    that went back behind a damaged one must not keep that and delete its own. Returns what was
    deleted."""
    checkpoints = [folder for folder in find_checkpoints(run_dir) if step_of(folder) <= done]
    doomed = [
        checkpoint
        for checkpoint in checkpoints[keep_last:]
        if not (keep_every and step_of(checkpoint) % keep_every == 0)
    ]
    doomed += (run_dir / "checkpoints").glob("*.unfinished")
    for folder in doomed:
        # Without its manifest it is no checkpoint, so a kill in between leaves no half one.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return doomed


def write_json(file: Path, content: Any) -> None:
    """Write JSON whole or not at all: a temporary name, synced, then renamed."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
