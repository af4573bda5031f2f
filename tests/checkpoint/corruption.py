"""Damage a checkpoint in many ways and count what is noticed.

    python -m tests.checkpoint.corruption --cases 300 --seed 1

Each case damages one file of the newer of two checkpoints: a flipped bit, a cut end, an appended
byte, a swapped block, a missing or an emptied file. It is detected when the damage is reported with
the file's name, and not loaded when the run's choice is the older checkpoint.
"""

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.sharded import newest_valid_everywhere
from tests.checkpoint.folders import make_checkpoint


def flip(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def truncate(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def append(content: bytearray, dice: random.Random) -> None:
    content += bytes([dice.randrange(256)])


def swap(content: bytearray, dice: random.Random) -> None:
    """Two different halves change places."""
    before = bytes(content)
    while bytes(content) == before:
        at = dice.randrange(1, len(content))
        content[:] = before[at:] + before[:at]


DAMAGES: dict[str, Callable[[bytearray, random.Random], None] | None] = {
    "flipped bit": flip,
    "cut short": truncate,
    "byte too many": append,
    "blocks swapped": swap,
    "emptied": lambda content, dice: content.clear(),
    "missing": None,
}


def corrupt(folder: Path, cases: int, seed: int) -> tuple[Counter, Counter, Counter]:
    """(injected, detected, loaded) by kind of damage, every other case a flipped bit."""
    dice = random.Random(seed)
    older, newer = make_checkpoint(folder, 10), make_checkpoint(folder, 20)
    injected, detected, loaded = Counter[str](), Counter[str](), Counter[str]()
    with _alone(folder):
        assert newest_valid_everywhere(folder) == newer
        for case in range(cases):
            kind = "flipped bit" if case % 2 else dice.choice(list(DAMAGES))
            file = dice.choice(sorted(newer.iterdir()))
            content = file.read_bytes()
            damage = DAMAGES[kind]
            if damage is None:
                file.unlink()
            else:
                bad = bytearray(content)
                damage(bad, dice)
                file.write_bytes(bad)
            injected[kind] += 1
            detected[kind] += any(str(file) in problem for problem in manifest.verify(newer))
            loaded[kind] += newest_valid_everywhere(folder) != older
            file.write_bytes(content)
        assert newest_valid_everywhere(folder) == newer
    return injected, detected, loaded


class _alone:
    """A process group of one, without a network."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "store"

    def __enter__(self) -> None:
        dist.init_process_group("gloo", init_method=f"file://{self.file}", rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  a warning for each case
    with tempfile.TemporaryDirectory() as name:
        injected, detected, loaded = corrupt(Path(name), options.cases, options.seed)
    print("| damage | injected | detected | loaded |\n| --- | --- | --- | --- |")
    for kind in DAMAGES:
        print(f"| {kind} | {injected[kind]} | {detected[kind]} | {loaded[kind]} |")
    print(f"| all | {injected.total()} | {detected.total()} | {loaded.total()} |")
    sys.exit(0 if detected == injected and not loaded.total() else 1)


if __name__ == "__main__":
    main()
