"""What a checkpoint holds, as whole tensors."""

from pathlib import Path

import torch

from megatron_ext.checkpoint.chunks import Chunk
from megatron_ext.checkpoint.storage import read_chunks, read_index


def tensors(checkpoint: Path, random_too: bool = False) -> dict[str, torch.Tensor]:
    """By key; the random numbers belong to ranks, and only come with `random_too`."""
    chunks = []
    for key, whole in read_index(checkpoint).state_dict_metadata.items():
        if random_too or not key.startswith("rng."):
            tensor = torch.empty(whole.size, dtype=whole.properties.dtype)
            chunks.append(Chunk(key, tuple(whole.size), (0,) * len(whole.size), tensor))
    read_chunks(checkpoint, chunks)
    return {chunk.key: chunk.tensor for chunk in chunks}


def differing(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> list[str]:
    """Keys of tensors that are not the same to the bit; NaN is the same as NaN."""
    return sorted(
        key
        for key in ours.keys() | reference.keys()
        if key not in ours
        or key not in reference
        or not torch.equal(ours[key].view(torch.uint8), reference[key].view(torch.uint8))
    )
