"""Checkpoints made without training, in the very files that training writes."""

from pathlib import Path

import torch

from megatron_ext.checkpoint import manifest, storage
from megatron_ext.checkpoint.chunks import Chunk


def make_checkpoint(run_dir: Path, step: int, ranks: int = 2) -> Path:
    """Two tensors, each divided over the ranks' files, sealed."""
    folder = manifest.checkpoint_dir(run_dir, step)
    folder.mkdir(parents=True)
    written = []
    for rank in range(ranks):
        part = torch.arange(48.0).view(8, 6) + 100 * rank + step
        chunks = [
            Chunk("a.weight", (8 * ranks, 6), (8 * rank, 0), part),
            Chunk("b.weight", (8 * ranks, 6), (8 * rank, 0), part.bfloat16()),
        ]
        written.append(storage.write_chunks(folder, rank, chunks))
    storage.write_index(folder, written)
    manifest.write_json(folder / "run.json", {"step": step})
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """A manifest that fits what is there, as a forger would write it too."""
    names = [file.name for file in folder.iterdir() if file.name != manifest.MANIFEST]
    manifest.write_manifest(folder, manifest.file_facts(folder, names))
