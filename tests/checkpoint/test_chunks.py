"""Rectangles of a tensor, against the elements themselves."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint.chunks import rectangles


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_rectangles_are_the_stretch_in_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel() - 1))
    end = data.draw(st.integers(start + 1, whole.numel()))
    found = list(rectangles(shape, start, end))
    elements: list[int] = []
    for offset, size in found:
        part = whole
        for dim, (at, length) in enumerate(zip(offset, size, strict=True)):
            part = part.narrow(dim, at, length)
        elements += part.flatten().tolist()
    assert elements == list(range(start, end))
    assert len(found) <= 2 * len(shape) - 1
