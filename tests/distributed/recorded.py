"""`pretrain.py` that also writes down which tokens each rank's model was given in training.

Command line: FOLDER, then pretrain.py's own. Each rank leaves FOLDER/RANK.pt: its place among the
data- and context-parallel ranks, and for each of its model chunks the tokens of all micro-batches
in order, [micro-batches x micro_batch_size, sequence / context].
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import pretrain

given: dict[int, list[torch.Tensor]] = {}
place: dict[str, int] = {}


def write_down(module: torch.nn.Module, arguments: Any) -> None:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    if isinstance(module, GPTModel) and module.training:
        given.setdefault(module.vp_stage or 0, []).append(arguments[0].clone())
        place["data"] = parallel_state.get_data_parallel_rank()
        place["context"] = parallel_state.get_context_parallel_rank()
        place["contexts"] = parallel_state.get_context_parallel_world_size()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    register_module_forward_pre_hook(write_down)
    code = pretrain.main(sys.argv[2:])
    chunks = {number: torch.cat(tokens) for number, tokens in given.items()}
    torch.save({"place": place, "chunks": chunks}, folder / f"{os.environ.get('RANK', 0)}.pt")
    sys.exit(code)
