"""Which kernels a config comes to where shapes decide it; the planner asks too. Needs no torch.

tokens = loss_chunk(config)         # of one chunk of the cross-entropy, None for all at once
"""

from megatron_ext.config import Config

# Enough rows to fill a GPU's matrix units; 66 MB of bf16 logits at a vocabulary of 32,000.
CHUNK_TOKENS = 1024

# Logits from which `auto` takes chunks: they would hold half a GB at the loss, and making them
# twice costs the 2B model 1% of a step's FLOPs. Below, memory is no question.
MANY_LOGITS = 1 << 26


def loss_chunk(config: Config) -> int | None:
    """Tokens of a chunk of the cross-entropy, or None when a rank's micro-batch is one."""
    training, parallel, wanted = config.training, config.parallel, config.kernels.cross_entropy
    tokens = training.micro_batch_size * training.sequence_length // parallel.context
    logits = tokens * config.model.vocab_size // parallel.tensor
    chunked = wanted == "chunked" or (wanted == "auto" and logits >= MANY_LOGITS)
    return CHUNK_TOKENS if chunked else None
