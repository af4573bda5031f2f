"""The last moments of a save: who does what, and what is on the disk when the folder gets its name.

The file that a rank writes is there already, as `Saver.save` would have it written.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext import cpu
from megatron_ext.checkpoint import storage
from megatron_ext.checkpoint.chunks import Chunk
from megatron_ext.checkpoint.manifest import verify
from megatron_ext.checkpoint.saving import Save, Saver, _copied, _seal
from megatron_ext.checkpoint.sharded import newest_valid_everywhere
from megatron_ext.config import load_config
from tests.checkpoint.folders import make_checkpoint
from tests.conftest import ROOT


@dataclass(frozen=True)
class Synced:
    path: Path
    thread: str
    named: bool
    """Whether the checkpoint had its name by then."""


@pytest.fixture
def save(tmp_path: Path) -> Save:
    final = tmp_path / "checkpoints" / "step_00000005"
    folder = final.with_name("step_00000005.unfinished")
    folder.mkdir(parents=True)
    chunk = Chunk("a.weight", (4,), (0,), torch.arange(4.0))
    return Save(5, final, folder, [chunk], {"step": 5})


@pytest.fixture
def synced(save: Save, monkeypatch: pytest.MonkeyPatch) -> list[Synced]:
    """Everything that is forced to the disk from now on."""
    found: list[Synced] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append(Synced(path, threading.current_thread().name, save.final.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    return found


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of this one process."""
    cpu.prepare()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_folder_is_on_the_disk_before_it_gets_its_name(save: Save, synced: list[Synced]) -> None:
    _seal(save, [storage.write_chunks(save.folder, 0, save.chunks)])
    last = [(one.path, one.named) for one in synced[-2:]]
    assert last == [(save.folder, False), (save.final.parent, True)]
    assert verify(save.final) == []


def test_training_waits_for_no_disk(
    save: Save, synced: list[Synced], alone: None, tmp_path: Path
) -> None:
    config = load_config(ROOT / "configs/demo/above.yaml", [f"training.run_dir={tmp_path}"])
    saver = Saver(config, {}, 0)
    saver._writing = save, saver._worker.submit(save.write)
    while saver.saved_step == 0:
        saver.poll()
    saver.close(5)
    assert verify(save.final) == []
    assert len(synced) > 5 and {one.thread for one in synced} == {"checkpoint_0"}


def test_each_save_is_copied_into_the_memory_of_the_one_before() -> None:
    live = [Chunk("a", (6,), (0,), torch.arange(6.0)), Chunk("b", (), (), torch.tensor(3))]
    first = _copied(live, ())
    places = [chunk.tensor.data_ptr() for chunk in first]
    live[0].tensor.mul_(2)
    again = _copied(live, [chunk.tensor for chunk in first])
    assert [chunk.tensor.data_ptr() for chunk in again] == places
    assert again[0].tensor.tolist() == [0, 2, 4, 6, 8, 10] and again[1].tensor == 3
    # Another state gets memory of its own.
    grown = [Chunk("a", (7,), (0,), torch.arange(7.0)), *live]
    copied = _copied(grown, [chunk.tensor for chunk in again])
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(copied, grown, strict=True))


def test_newest_of_at_most_so_many_steps_is_taken(tmp_path: Path, alone: None) -> None:
    """A run that rolls back must not take what an earlier start had saved behind it."""
    folders = {step: make_checkpoint(tmp_path, step) for step in (5, 10, 20)}
    assert newest_valid_everywhere(tmp_path) == folders[20]
    assert newest_valid_everywhere(tmp_path, at_most=19) == folders[10]
    assert newest_valid_everywhere(tmp_path, at_most=10) == folders[10]
    (folders[10] / "__1_0.distcp").write_bytes(b"damaged")
    assert newest_valid_everywhere(tmp_path, at_most=12) == folders[5]
    assert newest_valid_everywhere(tmp_path, at_most=4) is None
