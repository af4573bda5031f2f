"""Llama-like Hugging Face folder <-> checkpoint, proved by logits.

    folder = export_hf(Path("runs/mine"), Path("mine-hf"))
    run_dir = import_hf(Path("Llama-2-7b-hf"), Path("runs/llama2"), tensor=2, pipeline=2)

Export streams: one layer is in memory at a time. The proof after it needs the whole model twice,
one after the other, in float32. A folder or run that could not be proved is not left there.
Everything is written under a temporary name and renamed. Refuses (UserError) what `hf_config`
cannot say in the other's words, damaged checkpoints, and an output that is there already.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.hf_config import (
    HfConfig,
    architecture,
    check_installed,
    config_to_hf,
    imported_config,
    read_hf_config,
)
from megatron_ext.checkpoint.hf_tokenizer import folder_bos, write_tokenizer
from megatron_ext.config import Config, load_config
from megatron_ext.config.layout import in_layout
from megatron_ext.data.corpora import tokenizer_path
from megatron_ext.errors import UserError


def export_hf(
    source: Path, output: Path, lengths: Sequence[int] = (), vocab_size: int | None = None
) -> dict[str, Any]:
    """Write a checkpoint (of a run: the newest) as a folder that transformers loads.

    `lengths`: tokens of the sequences that the proof compares; default half, once and twice the
    trained context, up to 8,192. `vocab_size`: rows of the embedding to keep; default all.
    Returns the proof, which lies in the folder as proof.json. Raises UserError, and RuntimeError
    when the logits differ.
    """
    check_installed("transformers", "safetensors")
    run_dir, checkpoint = manifest.find_run(source)
    config = load_config(run_dir / "config.yaml")
    rows = _rows_to_keep(config, vocab_size)
    config_to_hf(config, rows, "float32")  # refuses before torch is imported
    for problem in manifest.verify(checkpoint):
        raise UserError(f"{checkpoint} is damaged: {problem}")
    with _whole_or_nothing(output) as folder:
        from megatron_ext.checkpoint import hf_weights, proof

        weights = hf_weights.CheckpointWeights(checkpoint)
        dtype = str(weights.dtype()).removeprefix("torch.")
        record = json.loads((checkpoint / "run.json").read_bytes())
        tokenizer = _export_tokenizer(config, folder, record.get("bos_token_id"))
        ids = {key: tokenizer.get(key) for key in ("bos_token_id", "eos_token_id")}
        hf = {**config_to_hf(config, rows, dtype), **ids}
        manifest.write_json(folder / "config.json", hf)
        manifest.write_json(folder / "generation_config.json", {**ids, "do_sample": False})
        _write_weights(config, weights, rows, folder)
        lengths = lengths or proof.default_lengths(config.training.sequence_length)
        result = proof.prove(config, checkpoint, folder, lengths, rows)
        result = {
            **result,
            "checkpoint": {"path": str(checkpoint), "step": manifest.step_of(checkpoint)},
            "vocab_size": rows,
            "tokenizer": tokenizer,
        }
        _demand_proof(result)
        manifest.write_json(folder / "proof.json", result)
    return result


def import_hf(
    folder: Path, output: Path, tensor: int = 1, pipeline: int = 1, lengths: Sequence[int] = ()
) -> dict[str, Any]:
    """Write a Hugging Face folder as a run folder with a checkpoint of step 0 and a config.yaml.

    The checkpoint is the same for every layout; `tensor` and `pipeline` go into the config, and a
    vocabulary that `tensor` does not divide is filled up. Returns the proof, which lies there as
    proof.json (`proved` is null for architectures that transformers does not know itself). Raises
    UserError, and RuntimeError when the logits differ.
    """
    check_installed("transformers", "safetensors")
    hf = read_hf_config(folder)
    text, notes = imported_config(folder, output, hf, tensor, pipeline)
    with _whole_or_nothing(output) as run_dir:
        (run_dir / "config.yaml").write_text(text)
        config = load_config(run_dir / "config.yaml")  # refuses before torch is imported
        from megatron_ext.checkpoint import proof

        dtype = _write_checkpoint(config, folder, hf, run_dir)
        if architecture(hf) == "baichuan":
            result: dict[str, Any] = {"proved": None, "lengths": []}
            notes.append("not compared with transformers: Baichuan's own code is never run")
        else:
            lengths = lengths or proof.default_lengths(config.training.sequence_length)
            checkpoint = manifest.checkpoint_dir(run_dir, 0)
            result = proof.prove(config, checkpoint, folder, lengths, hf["vocab_size"])
            _demand_proof(result)
        result = {**result, "source": str(folder), "stored_dtype": dtype, "notes": notes}
        manifest.write_json(run_dir / "proof.json", result)
    return result


def _write_checkpoint(config: Config, folder: Path, hf: HfConfig, run_dir: Path) -> str:
    """Build the model on this process, fill it, save it as step 0; returns the stored dtype."""
    import torch

    from megatron_ext.checkpoint import hf_weights, sharded
    from megatron_ext.model.llama import build_gpt, transformer_config
    from megatron_ext.world import world

    weights = hf_weights.FolderWeights(folder)
    source = weights.read(hf_weights.EMBEDDING[1]).dtype
    # float16 has more digits than bfloat16: only float32 holds it whole.
    stored = "bf16" if source == torch.bfloat16 else "fp32"
    alone = in_layout(config, tensor=1, pipeline=1)
    alone = alone.model_copy(
        update={"precision": alone.precision.model_copy(update={"dtype": stored})}
    )
    with world(alone):
        model = build_gpt(alone, transformer_config(alone))
        hf_weights.load_folder(folder, alone.model, model)
        record = {
            "config": config.model_dump(mode="json"),
            "data": {},
            "bos_token_id": folder_bos(folder),  # these weights expect it; see evaluation.subject
        }
        sharded.save(run_dir, 0, [model], None, record)
    return {"bf16": "bfloat16", "fp32": "float32"}[stored]


def _write_weights(config: Config, weights: Any, rows: int, folder: Path) -> None:
    """A file for the embedding, one for each layer, one for the last norm and the output layer."""
    from safetensors.torch import save_file

    from megatron_ext.checkpoint import hf_weights

    model = config.model
    files, total = model.num_layers + 2, 0
    weight_map: dict[str, str] = {}
    for number in range(files):
        if number == 0:
            ours, theirs = hf_weights.EMBEDDING
            part = {theirs: weights.read(ours)[:rows]}
        elif number <= model.num_layers:
            part = dict(hf_weights.layer_to_hf(model, number - 1, weights.read))
        else:
            part = {hf_weights.FINAL_NORM[1]: weights.read(hf_weights.FINAL_NORM[0])}
            if not model.tied_embeddings:
                part[hf_weights.OUTPUT[1]] = weights.read(hf_weights.OUTPUT[0])[:rows]
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        # Own memory each: halves of one matrix would be written as one.
        tensors = {key: tensor.contiguous().clone() for key, tensor in part.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o666 & ~_umask())  # safetensors writes for its owner alone
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    manifest.write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _export_tokenizer(config: Config, folder: Path, bos: int | None) -> dict[str, Any]:
    try:
        source = tokenizer_path(config)
    except UserError:  # a run on token files that came without receipts
        return {"file": None}
    return write_tokenizer(source, folder, bos)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _rows_to_keep(config: Config, vocab_size: int | None) -> int:
    rows = config.model.vocab_size
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise UserError(f"--vocab-size {vocab_size} is not within the model's {rows} rows")
    return vocab_size or rows


def _demand_proof(result: dict[str, Any]) -> None:
    for entry in result["lengths"]:
        if not entry["max_abs_difference"] <= entry["allowed"]:
            raise RuntimeError(
                f"not proved, so nothing was left: at {entry['length']} tokens logits differ by "
                f"{entry['max_abs_difference']:.3g} from transformers', {entry['allowed']:.3g} "
                f"would be rounding (greatest logit {entry['max_abs_logit']:.3g})"
            )


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, and is removed when that fails."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already: name a folder that does not exist")
    temporary = output.with_name(output.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            manifest.sync(file)
        if output.exists():
            output.rmdir()
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
