"""Settings of a run: typed, documented, validated before anything heavy is imported.

    from megatron_ext.config import load_config
    config = load_config("configs/models/llama_2b.yaml", ["rope.base=5e5"])

`schema.py` says what there is, `files.py` reads and writes it, `rules.py` joins the fields.
"""

from megatron_ext.config.files import load_config, named_run_dir, save_config
from megatron_ext.config.rules import (
    rope_frequencies_of,
    rope_verdict,
    short_number,
    smallest_base,
    validate,
)
from megatron_ext.config.schema import (
    Checkpoint,
    Config,
    Corpus,
    Data,
    Evaluation,
    Faults,
    Kernels,
    Logging,
    Model,
    Optimizer,
    Parallel,
    Precision,
    Rope,
    Schedule,
    Training,
)

__all__ = [
    "Checkpoint",
    "Config",
    "Corpus",
    "Data",
    "Evaluation",
    "Faults",
    "Kernels",
    "Logging",
    "Model",
    "Optimizer",
    "Parallel",
    "Precision",
    "Rope",
    "Schedule",
    "Training",
    "load_config",
    "named_run_dir",
    "rope_frequencies_of",
    "rope_verdict",
    "save_config",
    "short_number",
    "smallest_base",
    "validate",
]
