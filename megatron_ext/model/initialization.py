"""Initial weights that do not depend on the parallel layout.

    initialize_weights(model, config)

A weight's value is a function of the seed, its checkpoint key and its row in the whole tensor; each
rank draws only the rows that it holds. The same seed gives the same model on one process and on
128, on a CPU and on a GPU (numbers are drawn by the CPU's generator).
"""

import hashlib

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megatron_ext.config import Config

_ROWS = 1024  # rows drawn from one seed; bounds the memory of a draw


@torch.no_grad()
def initialize_weights(model: GPTModel, config: Config) -> None:
    """Fill the model's parameters in place: normal with init_std; output projections of attention
    and MLP with init_std / sqrt(2 num_layers) (Radford et al. 2019); norms with ones, biases with
    zeros."""
    residual_std = config.model.init_std / (2 * config.model.num_layers) ** 0.5
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for shard in nested_values(model.sharded_state_dict(metadata=metadata)):
        # SwiGLU's gate and up matrices lie in one parameter and are two tensors of the checkpoint.
        built = shard.build() if isinstance(shard, ShardedTensorFactory) else shard
        for tensor in built.values() if isinstance(built, dict) else _as_list(built):
            if not isinstance(tensor, ShardedTensor) or tensor.data is None:
                continue
            if "norm" in tensor.key:
                tensor.data.fill_(1.0)
                continue
            if tensor.key.endswith(".bias"):
                tensor.data.zero_()
                continue
            is_residual = tensor.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = residual_std if is_residual else config.model.init_std
            _fill_normal(tensor, std, config.training.seed)


def _as_list(built: object) -> list:
    return list(built) if isinstance(built, (list, tuple)) else [built]


def _fill_normal(tensor: ShardedTensor, std: float, seed: int) -> None:
    """Draw this shard's rows of the global matrix [..., rows, columns] in blocks of _ROWS."""
    # Axes before the matrix, such as the layer number, choose the stream of random numbers.
    *outer, first_row, first_column = tensor.global_offset
    columns = tensor.global_shape[-1]
    rows, local_columns = tensor.local_shape[-2:]
    matrix = tensor.data.view(rows, local_columns)
    row = first_row
    while row < first_row + rows:
        block = row // _ROWS
        words = f"{seed} {tensor.key} {outer} {block}".encode()
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1
        )
        height = min(_ROWS, tensor.global_shape[-2] - block * _ROWS)
        drawn = torch.empty(height, columns).normal_(0.0, std, generator=generator)
        end = min((block + 1) * _ROWS, first_row + rows)
        part = drawn[row - block * _ROWS : end - block * _ROWS]
        matrix[row - first_row : end - first_row].copy_(
            part[:, first_column : first_column + local_columns]
        )
        row = end
