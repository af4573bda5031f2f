"""Teacher-forced scoring of a Megatron checkpoint: how probable each given token was.

    with open_checkpoint(config, checkpoint, tensor=1, pipeline=1) as scorer:
        scores = scorer.score(tokens)               # tokens: whole numbers [batch, seq]
        scores.log_probs, scores.is_argmax          # [batch, seq - 1]: of tokens 1 .. seq - 1

Any layout reads any checkpoint, whatever layout wrote it: alone by default, or under torchrun with
a tensor- and pipeline-parallel size; ranks beyond those are data parallel and share the work by
`part` and `parts`. Works beyond the trained context. The logits of all positions never exist at
once: the output layer is applied to a stretch of the sequence at a time. Refuses (UserError) a
layout that does not divide the model or the processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.checkpoint import hf_weights, sharded
from megatron_ext.config import Config
from megatron_ext.config.layout import in_layout
from megatron_ext.model.llama import build_gpt, transformer_config
from megatron_ext.world import World, world

_LOGITS_AT_ONCE = 1 << 26  # float32 elements, 256 MiB


@dataclass(frozen=True)
class Scores:
    """Of tokens 1 .. seq - 1, or the last of these, each given all tokens before it: arrays
    [batch, seq - 1]."""

    log_probs: NDArray[np.float32]  # natural logarithm
    argmax: NDArray[np.int64]  # the most probable token in its place; of equals, the least id
    is_argmax: NDArray[np.bool_]  # whether it was that


@contextmanager
def open_checkpoint(
    config: Config, checkpoint: Path, tensor: int = 1, pipeline: int = 1
) -> Iterator["Scorer"]:
    """Join the processes, build the model of `config` in this layout, load the weights.

    `checkpoint` is a checkpoint's folder, a run's, or a Hugging Face folder. Raises UserError.
    """
    config = in_layout(config, tensor, pipeline)
    with world(config) as here:
        model = build_gpt(config, transformer_config(config)).eval()
        if (checkpoint / "config.json").is_file():
            hf_weights.load_folder(checkpoint, config.model, model)
        else:
            sharded.load_weights(checkpoint, [model])
        yield Scorer(model, here)


class Scorer:
    """A model that scores; every rank calls `score` alike within a data-parallel rank."""

    def __init__(self, model: GPTModel, here: World) -> None:
        self.model = model
        self.is_main = here.is_main
        self.device = here.device
        self.part = parallel_state.get_data_parallel_rank()
        self.parts = parallel_state.get_data_parallel_world_size()
        self.last_stage = parallel_state.is_pipeline_last_stage()

    @torch.no_grad()
    def score(self, tokens: NDArray[Any], last: int | None = None) -> Scores:
        """Scores of whole numbers [batch, seq], seq > 1; the same on every rank of the model.
        `last`: only of so many tokens at the end, which spares the output layer the others."""
        given = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(self.device)
        last = given.shape[1] - 1 if last is None else last
        inputs, targets = given[:, :-1].contiguous(), given[:, -last:].contiguous()
        # In float64, which holds any id and any float32 as it is.
        answer = torch.empty(2, *targets.shape, device=self.device, dtype=torch.float64)
        hidden = self._hidden(inputs)
        if hidden is not None:
            answer = self._score_hidden(hidden[-last:], targets)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.broadcast(
                answer,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        log_probs, best = answer.cpu().numpy()
        argmax = best.astype(np.int64)
        return Scores(log_probs.astype(np.float32), argmax, argmax == targets.cpu().numpy())

    def total(self, parts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum of an array over the data-parallel ranks, on each of them."""
        whole = torch.from_numpy(parts.copy()).to(self.device)
        dist.all_reduce(whole, group=parallel_state.get_data_parallel_group())
        return whole.cpu().numpy()

    def _hidden(self, inputs: Tensor) -> Tensor | None:
        """Final hidden states [seq, batch, hidden] on the last pipeline stage, elsewhere None."""

        def forward_step(_: Any, model: GPTModel) -> tuple[Tensor, None]:
            # Without its own last step the model hands out what the output layer would read.
            model.post_process = False
            try:
                return model(inputs, position_ids=None, attention_mask=None), None
            finally:
                model.post_process = self.last_stage

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=inputs.shape[1],
            micro_batch_size=inputs.shape[0],
            forward_only=True,
        )
        return outputs[0] if outputs else None

    def _score_hidden(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float64 [2, batch, seq]: log-probabilities of the targets, and the argmax."""
        length, batch = hidden.shape[:2]
        weight = None
        if self.model.share_embeddings_and_output_weights:
            weight = self.model.shared_embedding_or_output_weight()
        vocabulary = (self.model.output_layer.weight if weight is None else weight).shape[0]
        stretch = max(1, _LOGITS_AT_ONCE // (batch * vocabulary))
        parts = []
        for start in range(0, length, stretch):
            logits, _ = self.model.output_layer(hidden[start : start + stretch], weight=weight)
            wanted = targets[:, start : start + stretch].t().contiguous()
            best = vocab_parallel_argmax(logits)
            # Works in place on these logits, so it comes last.
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits.float(), wanted)
            parts.append(torch.stack((-losses.double(), best.double())))
        return torch.cat(parts, dim=1).transpose(1, 2).contiguous()


def vocab_parallel_argmax(logits: Tensor) -> Tensor:
    """Id of the greatest of logits [.., vocab / tensor] over all ranks; of equals, the least."""
    values, ids = logits.max(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return ids
    ids = ids + group.rank() * logits.shape[-1]
    # float64 holds the values of any dtype and ids up to 2^53 alike: one collective.
    mine = torch.stack((values.double(), ids.double()))
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    values, ids = torch.stack(gathered, dim=1)  # [ranks, ..] each
    best = values.argmax(dim=0, keepdim=True)  # the first, thus the lowest ids
    return ids.gather(0, best)[0].long()
