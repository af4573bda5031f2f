"""A run's config in another layout than the one it was trained in, to read its weights.

    config = in_layout(config, tensor=2, pipeline=1)

Refuses (ConfigError) a layout that does not divide the model. Needs no torch.
"""

from megatron_ext.config.rules import check_pipeline, check_tensor
from megatron_ext.config.schema import Config


def in_layout(config: Config, tensor: int, pipeline: int) -> Config:
    """The same model on `tensor` x `pipeline` ranks. Raises ConfigError."""
    layout = {
        "world_size": tensor * pipeline,
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": 1,
        "overlap_p2p_comm": None,
        "first_stage_layers": None,
        "last_stage_layers": None,
        "context": 1,
        # Saves memory only in training, and wants lengths that the ranks divide.
        "sequence": False,
        "tensor_overlap": False,
    }
    config = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=layout),
            # Weights are bf16 with fp8 too, and texts are of any length.
            "precision": config.precision.model_copy(update={"fp8": "none"}),
        }
    )
    check_tensor(config)
    check_pipeline(config)
    return config
