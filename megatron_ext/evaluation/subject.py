"""What is evaluated: a run, one of its checkpoints, or a Hugging Face folder. Needs no torch.

    subject = find_subject(Path("runs/mine"))          # .config, .weights, .results, .identity

Refuses (UserError) what is none of them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import UserError as DataError
from data_tools.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.checkpoint.hf_config import config_of_folder
from megatron_ext.checkpoint.hf_tokenizer import folder_bos
from megatron_ext.checkpoint.manifest import MANIFEST, find_run, step_of
from megatron_ext.config import Config, load_config
from megatron_ext.data.corpora import tokenizer_path
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Subject:
    """A model with weights, and where its results go."""

    config: Config
    weights: Path  # for scoring.open_checkpoint
    results: Path  # folder of the results' files
    identity: dict[str, Any]  # tells whether a results file is about these very weights
    bos: int | None  # the id that the model expects before every text, if any

    def tokenizer(self) -> Tokenizer:
        """Raises UserError."""
        try:
            return load_tokenizer(tokenizer_path(self.config))
        except DataError as error:  # of the data tools, which know nothing of this package
            raise UserError(str(error)) from None


def find_subject(source: Path, results: Path | None = None) -> Subject:
    """Raises UserError."""
    if (source / "config.json").is_file() and not (source / "config.yaml").is_file():
        return Subject(
            config_of_folder(source),
            source,
            results or source / "evaluation",
            {"step": 0, "folder_sha256": _folder_hash(source)},
            folder_bos(source),
        )
    run_dir, checkpoint = find_run(source)
    config = load_config(run_dir / "config.yaml")
    folder = run_dir / "evaluation"
    if checkpoint == source:
        folder = folder / checkpoint.name
    manifest = hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    identity = {"step": step_of(checkpoint), "manifest_sha256": manifest}
    bos = json.loads((checkpoint / "run.json").read_bytes()).get("bos_token_id")
    return Subject(config, checkpoint, results or folder, identity, bos)


def _folder_hash(folder: Path) -> str:
    """Of config.json, and of names, sizes and times of the weights' files: a folder of 100 GB is
    not read for this."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()
