"""The token files of a run: whether they can serve it, and what identifies them. Needs no torch.

    check_corpora(config)                          # raises UserError
    fingerprint_of(config)                         # what the sample order is made from

Refuses missing, truncated or foreign files, a receipt's vocabulary beyond the model's, a validation
share that leaves a corpus without documents on either side (Megatron-Core 0.16.1 then counts epochs
of nothing for ever, gpt_dataset.py:634).
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import UserError as DataToolsError
from data_tools.files import checksum
from data_tools.indexed import read_index
from data_tools.receipt import pairs_of, read_receipt
from megatron_ext.config import Config
from megatron_ext.config.schema import Corpus
from megatron_ext.errors import UserError


def check_corpora(config: Config) -> None:
    """Raise UserError when there is no corpus, or one that cannot serve this run."""
    if not config.data.corpora:
        raise UserError(
            "data.corpora is empty: name a token file, such as data.corpora.books.path=PREFIX"
        )
    for error in corpus_errors(config):
        raise UserError(error)


def corpus_errors(config: Config) -> list[str]:
    """A sentence for each corpus that cannot serve this run."""
    errors = []
    for name, corpus in config.data.corpora.items():
        try:
            _check_files(name, corpus)
            _check_vocabulary(name, corpus, config.model.vocab_size)
            _check_split(name, corpus, config.data.validation_fraction)
        except (UserError, DataToolsError) as error:
            errors.append(str(error))
    if config.data.told_apart_by and not errors:
        try:
            eod_id(config)
        except UserError as error:
            errors.append(str(error))
    return errors


def fingerprint_of(config: Config) -> dict[str, Any]:
    """What the sample order is made from; equal fingerprints mean the same tokens in the same
    order. Kept in the run folder and in every checkpoint."""
    corpora, rampup = {}, config.training.rampup_batch_size
    for name, corpus in config.data.corpora.items():
        corpora[name] = {
            "path": str(corpus.path),
            "weight": corpus.weight,
            **_file_facts(corpus.path),
            "tokenizer": _tokenizer(corpus.path).get("hash"),
        }
    return {
        "corpora": corpora,
        "order": list(corpora),  # the blend interleaves them in this order
        "shuffle": 2,  # sample_index.py's; 1 was Megatron-Core's
        "validation_fraction": config.data.validation_fraction,
        "sequence_length": config.training.sequence_length,
        "global_batch_size": config.training.global_batch_size,
        **({"rampup_batch_size": list(rampup)} if rampup else {}),
        "samples": config.training.batch_sizes.before(config.training.steps),
        "seed": config.training.seed,
        "mask_documents": config.data.mask_documents,
        **({"reset_positions": True} if config.data.reset_positions else {}),
    }


def cache_parent(config: Config) -> Path:
    """The folder of sample indices: data.cache_dir, else `cache` beside the first corpus."""
    first = next(iter(config.data.corpora.values()))
    return config.data.cache_dir or first.path.parent / "cache"


def epochs(config: Config) -> dict[str, float]:
    """How often the run reads each corpus' training documents, by their tokens."""
    total = sum(corpus.weight for corpus in config.data.corpora.values())
    tokens = config.training.tokens_after(config.training.steps)
    return {
        name: tokens * corpus.weight / total / _training_tokens(corpus, config)
        for name, corpus in config.data.corpora.items()
    }


def eod_id(config: Config) -> int:
    """The id that ends each document, the same in all corpora. Raises UserError when the receipts
    name none or several."""
    ids = {_tokenizer(corpus.path).get("eod_id") for corpus in config.data.corpora.values()}
    found = ids.pop() if len(ids) == 1 else None
    if found is None:
        raise UserError(
            f"{config.data.told_apart_by} needs one end-of-document id, which the receipts beside "
            "the token files do not name: tokenize them with data-tools tokenize --append-eod"
        )
    return found


def tokenizer_path(config: Config) -> Path:
    """data.tokenizer, or what the first receipt beside the corpora names. Raises UserError."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    for corpus in config.data.corpora.values():
        receipt = read_receipt(corpus.path)
        if receipt is not None:
            return Path(receipt["tokenizer"]["path"])
    raise UserError(
        "the run does not say which tokenizer made its corpora: set data.tokenizer in its config"
    )


def _check_files(name: str, corpus: Corpus) -> None:
    shards = pairs_of(corpus.path)
    if shards != [corpus.path]:
        raise UserError(
            f"data.corpora.{name}.path={corpus.path} is {len(shards)} shard(s) and a corpus is one "
            f"pair: data-tools merge {corpus.path} --output {corpus.path}-merged, and name that"
        )
    for suffix in (".bin", ".idx"):
        file = Path(f"{corpus.path}{suffix}")
        if not file.is_file():
            raise UserError(
                f"data.corpora.{name}.path={corpus.path}: {file} does not exist; "
                f"write it with data-tools tokenize ... --output {corpus.path}"
            )
    try:
        index = read_index(corpus.path)
    except DataToolsError as error:
        raise UserError(f"data.corpora.{name}: {error}; tokenize the corpus again") from None
    has = Path(f"{corpus.path}.bin").stat().st_size
    wanted = 0
    if len(index.lengths):
        wanted = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    if has != wanted:
        raise UserError(
            f"data.corpora.{name}: {corpus.path}.bin has {has:,} bytes where {corpus.path}.idx "
            f"tells of {wanted:,}: copy both again, or tokenize the corpus again"
        )


def _check_vocabulary(name: str, corpus: Corpus, known: int) -> None:
    vocab_size = _tokenizer(corpus.path).get("vocab_size", 0)
    if vocab_size > known:
        raise UserError(
            f"data.corpora.{name} was tokenized with {vocab_size} ids, more than "
            f"model.vocab_size={known}: raise it to at least {vocab_size}"
        )


def _training_tokens(corpus: Corpus, config: Config) -> int:
    lengths = read_index(corpus.path).lengths
    return int(lengths[: _first_held_out(lengths, config.data.validation_fraction)].sum(dtype="i8"))


def _first_held_out(lengths: np.ndarray, fraction: float) -> int:
    """Number of the first validation document, rounded as Megatron-Core does."""
    return round((1 - fraction) * len(lengths))


def _check_split(name: str, corpus: Corpus, fraction: float) -> None:
    lengths = read_index(corpus.path).lengths
    first_held_out = _first_held_out(lengths, fraction)
    for share, documents in (
        ("training", lengths[:first_held_out]),
        ("validation", lengths[first_held_out:]),
    ):
        if not documents.any():
            raise UserError(
                f"data.validation_fraction={fraction:g} leaves no text of data.corpora.{name} "
                f"({len(lengths):,} documents) for {share}: add documents, or choose a share that "
                "gives each side at least one"
            )


def _file_facts(prefix: Path) -> dict[str, Any]:
    """Sizes and checksums of a pair, as its receipt has them; without one that fits, the .idx is
    read and the .bin known by its size alone."""
    bin_file, idx_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    facts = {"bin_bytes": bin_file.stat().st_size, "idx_bytes": idx_file.stat().st_size}
    for pair in (read_receipt(prefix) or {}).get("outputs", {}).get("pairs", []):
        sizes = {"bin_bytes": pair["bin"]["size"], "idx_bytes": pair["idx"]["size"]}
        if sizes == facts:
            return facts | {"bin": pair["bin"]["checksum"], "idx": pair["idx"]["checksum"]}
    return facts | {"idx": checksum(idx_file)}


def _tokenizer(prefix: Path) -> dict[str, Any]:
    """What the receipt says of the tokenizer; empty for token files that came without one."""
    return (read_receipt(prefix) or {}).get("tokenizer", {})
