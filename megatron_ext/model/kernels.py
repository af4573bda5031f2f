"""Which kernels a config comes to where shapes decide it; the planner asks too. Needs no torch.

tokens = loss_chunk(config)         # of one chunk of the cross-entropy, None for all at once
"""

from megatron_ext.config import Config

# Enough rows to fill a GPU's matrix units; 257 MB of bf16 logits at a vocabulary of 125,696.
CHUNK_TOKENS = 1024

# Logits from which `auto` takes chunks: they would hold 6 GB at the loss. Making them twice costs
# the 2B model with its large vocabulary 4% of a step's FLOPs: not worth it where memory is free.
MANY_LOGITS = 1 << 30


def loss_chunk(config: Config) -> int | None:
    """Tokens of a chunk of the cross-entropy, or None when a rank's micro-batch is one."""
    training, parallel, wanted = config.training, config.parallel, config.kernels.cross_entropy
    tokens = training.micro_batch_size * training.sequence_length // parallel.context
    logits = tokens * config.model.vocab_size // parallel.tensor
    chunked = wanted == "chunked" or (wanted == "auto" and logits >= MANY_LOGITS)
    return CHUNK_TOKENS if chunked else None
