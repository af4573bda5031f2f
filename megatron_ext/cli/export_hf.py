"""`megatron-ext export-hf`: a checkpoint as a folder that transformers loads, proved by logits."""

import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_ext.cli.options import ProofLengths, whole_numbers


def export_hf(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or one of its checkpoints.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    vocab_size: Annotated[
        int | None, typer.Option(help="Rows of the embedding to keep.  [all]")
    ] = None,
    proof_lengths: ProofLengths = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the proof as JSON.")] = False,
) -> None:
    """Write the newest checkpoint of a run as a Hugging Face folder, then prove it.

    Any layout's checkpoint is read, layer by layer. The proof loads the folder with transformers
    and compares its logits with Megatron-Core's in float32, one model after the other; a folder
    that differs is not left there. Needs no GPU.

    Example: megatron-ext export-hf runs/demo/above above-hf
    """
    warnings.filterwarnings("ignore", module=r"megatron|torch\.distributed")
    from megatron_ext.checkpoint.huggingface import export_hf

    result = export_hf(source, output, whole_numbers("--proof-lengths", proof_lengths), vocab_size)
    show(result, output, as_json)
    tokenizer = result["tokenizer"]
    if not as_json and "proved" not in tokenizer:
        print("note: the run names no tokenizer, so none was written: set data.tokenizer")
    elif not as_json and tokenizer["file"] is None:
        print("note: transformers reads the run's tokenizer.json otherwise, so none was written")
    elif not as_json and not tokenizer["proved"]:
        print(
            f"note: {tokenizer['file']} was copied; transformers reads it otherwise, so use "
            "data_tools.tokenizer with it"
        )


def show(result: dict[str, Any], output: Path, as_json: bool) -> None:
    """The proof, for a person or a program."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    if result["lengths"]:
        print("logits of Megatron-Core and transformers, float32")
        print(f"{'tokens':>8}  {'greatest difference':>19}  {'greatest logit':>14}  same argmax")
    for entry in result["lengths"]:
        print(
            f"{entry['length']:>8}  {entry['max_abs_difference']:>19.2e}  "
            f"{entry['max_abs_logit']:>14.2f}  {entry['same_argmax']:>11.1%}"
        )
    for note in result.get("notes", []):
        print(f"note: {note}")
    print(f"written to {output}")
