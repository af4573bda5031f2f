"""The order of a sequence over context-parallel ranks; training is in tests/distributed."""

import pytest
import torch

from megatron_ext.model.context import in_order
from megatron_ext.rope.embedding import context_parallel_slice
from tests.copies import CopiesOfPython


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_the_ranks_sent_is_put_in_order_without_waiting_for_the_gpu(ranks: int) -> None:
    whole = torch.arange(2 * ranks * 3 * 5).view(-1, 5)
    sent = torch.cat([context_parallel_slice(whole, rank, ranks) for rank in range(ranks)])
    with CopiesOfPython() as copies:
        ordered = in_order(sent, ranks)
    assert torch.equal(ordered, whole)
    assert not copies.made
