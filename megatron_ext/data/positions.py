"""Position ids and attention masks: documents of one sample kept apart.

    documents, positions = per_document(tokens, eod)        # [batch, sequence] each
    mask = attention_mask(documents)                        # [batch, 1, sequence, sequence]

Samples are cut from a stream of documents, so one sample may hold several. Contiguous positions
0, 1, 2, .. need nothing from here.
"""

import torch


def per_document(tokens: torch.Tensor, eod: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number each sample's documents and the positions within them, both from 0.

    tokens [batch, sequence] int64, each document ended by `eod`, which belongs to it. Returns two
    int64 tensors of the same shape.
    """
    ends = (tokens == eod).long()
    documents = ends.cumsum(-1) - ends
    steps = torch.arange(tokens.shape[-1], device=tokens.device).expand_as(tokens)
    begins = torch.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    return documents, steps - (steps * begins).cummax(-1).values


def attention_mask(documents: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """What a token may not look at, as Megatron-Core has it: bool [batch, 1, rows, sequence], true
    where the key is later than the query or in another document.

    documents [batch, sequence]; rows: the places of the queries, None for all of them.
    """
    places = torch.arange(documents.shape[-1], device=documents.device)
    rows = places if rows is None else rows
    later = places > rows[:, None]
    other = documents[:, rows, None] != documents[:, None, :]
    return (later | other)[:, None]
