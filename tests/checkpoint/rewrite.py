"""Read a run's newest checkpoint in the layout of CONFIG and write it again, with no step between.

torchrun --nproc-per-node 4 tests/checkpoint/rewrite.py CONFIG TARGET [a.b=c ...]
"""

import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_ext.checkpoint import sharded
from megatron_ext.checkpoint.chunks import bare
from megatron_ext.config import load_config
from megatron_ext.data.corpora import fingerprint_of
from megatron_ext.model.llama import build_model
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.world import world


def main() -> None:
    config = load_config(Path(sys.argv[1]), sys.argv[3:])
    record = {"config": config.model_dump(mode="json"), "data": fingerprint_of(config)}
    with world(config):
        model = build_model(config)
        optimizer = build_optimizer(model, config)
        step = sharded.restore(config, model, optimizer, record)
        written = sharded.save(Path(sys.argv[2]), step, model, optimizer, record)

        # The same file through Megatron-Core's own loader.
        for module in bare(model):
            ours = {name: x.detach().clone() for name, x in module.named_parameters()}
            for parameter in module.parameters():
                parameter.data.zero_()
            state = module.sharded_state_dict()
            state = {key: x for key, x in state.items() if not isinstance(x, ShardedObject)}
            loaded = dist_checkpointing.load(
                state, str(written), validate_access_integrity=len(model) == 1
            )
            module.load_state_dict(loaded, strict=False)
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, ours[name]), name


if __name__ == "__main__":
    main()
