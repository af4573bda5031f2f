"""Teacher-forced scoring of a Megatron checkpoint: how probable each given token was.

    with open_checkpoint(config, checkpoint, tensor=1, pipeline=1) as scorer:
        scores = scorer.score(tokens)               # tokens: whole numbers [batch, seq]
        scores.log_probs, scores.is_argmax          # [batch, seq - 1]: of tokens 1 .. seq - 1

Any layout reads any checkpoint, whatever layout wrote it: alone by default, or under torchrun with
a tensor- and pipeline-parallel size; ranks beyond those are data parallel and share the work by
`part` and `parts`. A model in training is scored in its own layout: `Scorer(chunks, here)`. Works
beyond the trained context. The logits of all positions never exist at once: the output weight is
applied to a stretch of the sequence at a time. Refuses (UserError) a layout that does not divide
the model or the processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_ext.checkpoint import hf_weights, sharded
from megatron_ext.config import Config
from megatron_ext.config.layout import in_layout
from megatron_ext.model.context import gather_sequence, my_part
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
        yield Scorer([model], here)


class Scorer:
    """A model that scores; every rank calls `score` alike within a data-parallel rank.

    `chunks`: the bare model chunks of this pipeline stage, in evaluation mode. Sequence-, context-
    and virtual-pipeline-parallel models want lengths that their ranks divide: sequences are padded
    behind their end, where no token sees it.
    """

    def __init__(self, chunks: Sequence[GPTModel], here: World) -> None:
        self.chunks = list(chunks)
        self.is_main = here.is_main
        self.device = here.device
        self.part = parallel_state.get_data_parallel_rank()
        self.parts = parallel_state.get_data_parallel_world_size()
        self.last = chunks[-1] if chunks[-1].post_process else None  # with the output weight
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        context = parallel_state.get_context_parallel_world_size()
        self.scattered = chunks[0].config.sequence_parallel
        self.divisor = (tensor if self.scattered else 1) * (2 * context if context > 1 else 1)
        # An interleaved schedule takes as many micro-batches at a time as there are stages.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.micro_batches = stages if len(chunks) > 1 else 1

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
        batch, length = inputs.shape
        inputs = F.pad(inputs, (0, -length % self.divisor, 0, -batch % self.micro_batches))
        rows = inputs.chunk(self.micro_batches)
        given = [iter(rows) for _ in self.chunks]  # every chunk takes them, each at its own time

        def forward_step(rows: Iterator[Tensor], model: GPTModel) -> tuple[Tensor, None]:
            # Without its own last step the model hands out what the output layer would read.
            last, model.post_process = model.post_process, False
            try:
                mine = my_part(next(rows), dim=1)
                return model(mine, position_ids=None, attention_mask=None), None
            finally:
                model.post_process = last

        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=given if len(given) > 1 else given[0],
            model=self.chunks if len(given) > 1 else self.chunks[0],
            num_microbatches=self.micro_batches,
            seq_length=inputs.shape[1],
            micro_batch_size=len(rows[0]),
            forward_only=True,
        )
        if self.last is None:
            return None
        hidden = torch.cat(outputs, dim=1)
        if self.scattered:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            hidden = gather_sequence(hidden, group)
        return hidden[:length, :batch]

    def _score_hidden(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float64 [2, batch, seq]: log-probabilities of the targets, and the argmax."""
        assert self.last is not None
        length, batch = hidden.shape[:2]
        tied = self.last.share_embeddings_and_output_weights
        weight = (
            self.last.shared_embedding_or_output_weight() if tied else self.last.output_layer.weight
        )
        stretch = max(1, _LOGITS_AT_ONCE // (batch * len(weight)))
        parts = []
        for start in range(0, length, stretch):
            logits = F.linear(hidden[start : start + stretch], weight)
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
