"""What a whole checkpoint is: a folder whose manifest.json, written last, names every file with its
size and checksum. Needs no torch.

    for checkpoint in find_checkpoints(run_dir): ...       # newest first, those with a manifest
    problems = verify(checkpoint)                          # [] when every file is as it was written
    prune(run_dir, keep_last=2, keep_every=1000, done=4000)

A folder without a manifest is a save that did not finish, and is no checkpoint. Checksums find
damage, not forgery: whoever writes a file can write a manifest for it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from data_tools.files import checksum, write_file
from megatron_ext.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
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


def find_folders(run_dir: Path) -> list[Path]:
    """Folders of a run that are named like a checkpoint, newest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted(found, reverse=True)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, newest first: folders with a manifest."""
    return [folder for folder in find_folders(run_dir) if (folder / MANIFEST).is_file()]


def find_run(source: Path) -> tuple[Path, Path]:
    """Run folder and checkpoint of either; of a run the newest. Raises UserError."""
    if (source / MANIFEST).is_file():
        run_dir, checkpoint = source.resolve().parents[1], source
    else:
        found = find_checkpoints(source)
        if not found:
            what = "holds no finished checkpoint" if source.is_dir() else "does not exist"
            raise UserError(f"{source} {what}: name a run folder after its first checkpoint")
        run_dir, checkpoint = source, found[0]
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} has no config.yaml: name the folder of a run")
    return run_dir, checkpoint


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and xxh3-128 checksum of each named file."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "xxh3_128": _checksum(folder / name)}
        for name in names
    }


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Seal a folder: from here on it is a checkpoint."""
    # Of itself it has a checksum too: a flipped bit in a file's name would hide that file.
    write_json(folder / MANIFEST, {"format": FORMAT, "checksum": hash_of(files), "files": files})


def verify(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Every difference between the folder and its manifest, a sentence for each file; of several
    processes each can look at its part of the files."""
    manifest = checkpoint / MANIFEST
    try:
        content = json.loads(manifest.read_bytes())
        if content["format"] != FORMAT:
            return [f"{manifest} has format {content['format']}, this version reads {FORMAT}"]
        if content["checksum"] != hash_of(content["files"]):
            return [f"{manifest} has been changed: its own checksum does not fit"]
        files = {name: (of["bytes"], of["xxh3_128"]) for name, of in content["files"].items()}
    except FileNotFoundError:
        return [f"{manifest} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{manifest} cannot be read: {error!r}"]
    problems = []
    for name in sorted(files)[part::parts]:
        file, (size, checksum) = checkpoint / name, files[name]
        if Path(name).name != name:
            problems.append(f"{manifest} names {name!r}, which is no file beside it")
        elif not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{file} has {file.stat().st_size} bytes instead of {size}")
        elif _checksum(file) != checksum:
            problems.append(f"{file} has the right size but not the content that was written")
    return problems


def superfluous(run_dir: Path, keep_last: int, keep_every: int | None, done: int) -> list[Path]:
    """All but the newest `keep_last` checkpoints and those at multiples of `keep_every` steps,
    newest first. Those after step `done` are not looked at: a run that went back behind a damaged
    one must not keep that and delete its own."""
    checkpoints = [folder for folder in find_checkpoints(run_dir) if step_of(folder) <= done]
    return [
        checkpoint
        for checkpoint in checkpoints[keep_last:]
        if not (keep_every and step_of(checkpoint) % keep_every == 0)
    ]


def prune(run_dir: Path, keep_last: int, keep_every: int | None, done: int) -> list[str]:
    """Delete superfluous checkpoints once that of step `done` is read back as it was written, so
    that one which verifies always stays. Returns what is wrong with it: nothing is deleted then."""
    doomed = superfluous(run_dir, keep_last, keep_every, done)
    problems = verify(checkpoint_dir(run_dir, done)) if doomed else []
    if not problems:
        delete(doomed)
    return problems


def delete(checkpoints: Iterable[Path]) -> None:
    """Delete them; one that is half deleted is not named like a checkpoint, and the next save
    deletes the rest."""
    for folder in checkpoints:
        doomed = folder.with_name(f"{folder.name}.old.unfinished")
        folder.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def hash_of(content: Any) -> str:
    """xxh3-128 of what JSON can hold, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN stays NaN, as Python reads it. Raises FileNotFoundError
    where its folder is gone: a run that was moved away does not come back."""
    file.parent.stat()
    write_file(file, json.dumps(content, indent=1) + "\n")


def _checksum(file: Path) -> str:
    return checksum(file).removeprefix("xxh128:")
