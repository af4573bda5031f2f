"""The last moment of a save: what is on the disk when the folder gets its name."""

import os
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint import storage
from megatron_ext.checkpoint.chunks import Chunk
from megatron_ext.checkpoint.manifest import verify
from megatron_ext.checkpoint.saving import Save, _seal


def test_folder_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, final = tmp_path / "step_00000005.unfinished", tmp_path / "step_00000005"
    folder.mkdir()
    chunk = Chunk("a.weight", (4,), (0,), torch.arange(4.0))
    written = storage.write_chunks(folder, 0, [chunk])
    synced = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), final.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    _seal(Save(5, final, folder, [chunk], {"step": 5}), [written])
    assert synced[-2:] == [(folder, False), (tmp_path, True)]
    assert verify(final) == []
