"""Proof that a Hugging Face folder and a checkpoint are the same model: their logits, in float32.

    proof = prove(config, checkpoint, folder, lengths=[2048, 4096, 8192])
    proof["proved"], proof["lengths"][0]["max_abs_difference"]

Megatron-Core's model computes first and is gone when transformers' is loaded: one float32 copy of
the weights is in memory at a time. Compared are up to 256 positions of a random sequence of each
length, the first and last among them. The greatest difference may be 1e-4 of the greatest logit,
and 2^-24 of it more for each token of the length: transformers works out angles in float32, which
rounds position times frequency by up to that.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.checkpoint import sharded
from megatron_ext.config import Config
from megatron_ext.config.layout import in_layout
from megatron_ext.model.kernels import plain
from megatron_ext.model.llama import build_gpt, transformer_config
from megatron_ext.world import world

_POSITIONS = 256
_LONGEST = 8192  # attention without kernels, on a CPU, costs the square of the length
Logits = NDArray[np.float32]


def default_lengths(context: int) -> list[int]:
    """Below, at and beyond the trained context, in tokens, but none above `_LONGEST`."""
    return sorted({min(n, _LONGEST) for n in (max(2, context // 2), context, 2 * context)})


def prove(
    config: Config, checkpoint: Path, folder: Path, lengths: Sequence[int], vocab_size: int
) -> dict[str, Any]:
    """Compare the two at every length; see the module's text. `vocab_size`: rows of the folder's
    vocabulary, which random tokens are drawn from and logits compared on."""
    tokens = [_random_tokens(length, vocab_size) for length in lengths]
    ours = _ours(config, checkpoint, tokens)
    theirs = transformers_logits(folder, tokens)
    entries = []
    for length, a, b in zip(lengths, ours, theirs, strict=True):
        greatest = float(np.abs(b).max())
        entries.append(
            {
                "length": length,
                "positions": len(b),
                "max_abs_difference": float(np.abs(a[:, :vocab_size] - b).max()),
                "max_abs_logit": greatest,
                "allowed": (1e-4 + length * 2.0**-24) * greatest,
                "same_argmax": float((a[:, :vocab_size].argmax(-1) == b.argmax(-1)).mean()),
            }
        )
    import transformers

    return {
        "proved": all(e["max_abs_difference"] <= e["allowed"] for e in entries),
        "dtype": "float32",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "trained_context": config.training.sequence_length,
        "lengths": entries,
    }


def transformers_logits(folder: Path, sequences: Sequence[Tensor]) -> list[Logits]:
    """[positions, vocabulary] of each sequence [1, length], by transformers; its code alone runs,
    none of the folder's."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    answers = []
    for tokens in sequences:
        places = _positions(tokens.shape[1])
        with torch.no_grad():
            answer = model(tokens, logits_to_keep=places, use_cache=False)
        answers.append(answer.logits[0].numpy())
    return answers


def _ours(config: Config, checkpoint: Path, sequences: Sequence[Tensor]) -> list[Logits]:
    exact = config.precision.model_copy(update={"dtype": "fp32", "grad_reduce": "fp32"})
    alone = in_layout(config, tensor=1, pipeline=1).model_copy(update={"precision": exact})
    alone = plain(alone)
    with world(alone) as here:
        model = build_gpt(alone, transformer_config(alone)).eval()
        sharded.load_weights(checkpoint, [model])
        return list(_logits(model, [tokens.to(here.device) for tokens in sequences]))


@torch.no_grad()
def _logits(model: GPTModel, sequences: Sequence[Tensor]) -> Iterator[Logits]:
    tied = model.share_embeddings_and_output_weights
    weight = model.shared_embedding_or_output_weight() if tied else None
    for tokens in sequences:
        # Without its last step the model hands out what the output layer would read, so that only
        # the positions compared get logits.
        model.post_process = False
        hidden = model(tokens, position_ids=None, attention_mask=None)
        model.post_process = True
        places = _positions(tokens.shape[1]).to(hidden.device)
        logits, _ = model.output_layer(hidden[places], weight=weight)
        yield logits[:, 0].float().cpu().numpy()


def _positions(length: int) -> Tensor:
    return torch.linspace(0, length - 1, min(length, _POSITIONS)).round().long()


def _random_tokens(length: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab_size, (1, length), generator=generator)
