"""One command at a time on one output.

    with exclusive(Path("data/.lock"), "--output data"): ...

The lock is a file made for it, gone when the block ends (a killed process leaves it behind, which
hinders nobody). Refuses what another command is writing, and a place that cannot be written, both
before any work is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data_tools.errors import UserError


@contextlib.contextmanager
def exclusive(path: Path, output: str) -> Iterator[None]:
    """Hold the lock file `path`; `output` is the flag with its value, as refusals name it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = open(path, "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{output} cannot be written ({error.strerror}): choose another place"
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another data-tools is writing {output}: wait for it, or choose another place"
                ) from error
            except OSError as error:
                print(
                    f"data-tools: the file system of {path.parent} cannot lock files "
                    f"({error.strerror}): see to it that no second command writes {output}",
                    file=sys.stderr,
                )
            # Who held it before may have removed the file that is locked now, and another made one.
            if not _is_still(path, stream.fileno()):
                continue
            try:
                yield
            finally:
                if _is_still(path, stream.fileno()):
                    path.unlink()
            return


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
