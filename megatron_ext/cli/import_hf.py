"""`megatron-ext import-hf`: a Hugging Face folder as a checkpoint to start from."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from megatron_ext.cli.export_hf import show
from megatron_ext.cli.options import ProofLengths, whole_numbers


def import_hf(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Llama, Mistral, Qwen2 or Baichuan 7B.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Run folder to make.")],
    tensor: Annotated[
        int, typer.Option(min=1, help="parallel.tensor of the config; divides the vocabulary.")
    ] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="parallel.pipeline of the config.")] = 1,
    proof_lengths: ProofLengths = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the proof as JSON.")] = False,
) -> None:
    """Write a Hugging Face model as a checkpoint and a config that fine-tunes from it.

    The checkpoint serves every layout. Only safetensors, or PyTorch files of tensors alone, are
    read, and no code of the folder is run. Needs no GPU; the model has to fit into memory.

    Example: megatron-ext import-hf Llama-2-7b-hf runs/llama2 --tensor 2 --pipeline 2, then
    pretrain.py runs/llama2/config.yaml data.corpora.books.path=PREFIX
    """
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    from megatron_ext.checkpoint.huggingface import import_hf

    lengths = whole_numbers("--proof-lengths", proof_lengths)
    show(import_hf(folder, output, tensor, pipeline, lengths), output, as_json)
