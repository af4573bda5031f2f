"""Which token files are refused, and what identifies those that are used."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import xxhash
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.indexed import write_index
from data_tools.merge import merge
from megatron_ext.config import load_config
from megatron_ext.data import corpora
from megatron_ext.errors import UserError
from tests.conftest import environment, launch, metrics, pretrain


def test_missing_file_and_small_vocabulary_are_refused(config_file: Path) -> None:
    printed = pretrain(config_file, "data.corpora.stdlib.path=nowhere/x", code=2)
    assert "nowhere/x.bin does not exist" in printed and "Traceback" not in printed
    with pytest.raises(UserError, match="raise it to at least 512"):
        corpora.check_corpora(load_config(config_file, ["model.vocab_size=500"]))


def test_no_corpus_is_refused(config_file: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(UserError, match=r"data\.corpora is empty"):
        corpora.check_corpora(config.model_copy(update={"data": type(config.data)()}))


@pytest.mark.parametrize("tokens", [10_000, 10**9])
def test_shards_are_refused_by_what_joins_them(
    config_file: Path, corpus: Path, tmp_path: Path, tokens: int
) -> None:
    merge([str(corpus)], tmp_path / "all", shard_tokens=tokens)
    config = load_config(config_file, [f"data.corpora.stdlib.path={tmp_path}/all"])
    with pytest.raises(UserError, match=r"shard.*: data-tools merge \S+/all --output"):
        corpora.check_corpora(config)


def lengths_of(prefix: Path) -> np.ndarray:
    """By Megatron-Core's reader, which closes its map, views or not, when it is let go."""
    reader = IndexedDataset(str(prefix))
    return reader.sequence_lengths.copy()


def copy_of(corpus: Path, folder: Path) -> Path:
    for suffix in (".bin", ".idx"):
        (folder / f"copy{suffix}").write_bytes(Path(f"{corpus}{suffix}").read_bytes())
    return folder / "copy"


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", [0, 7, 1000])
def test_truncated_files_are_refused(
    suffix: str, size: int, config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    prefix = copy_of(corpus, tmp_path)
    with Path(f"{prefix}{suffix}").open("r+b") as stream:
        stream.truncate(size)
    config = load_config(config_file, [f"data.corpora.stdlib.path={prefix}"])
    with pytest.raises(UserError, match=r"tokenize the corpus again"):
        corpora.check_corpora(config)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_share_without_documents_is_refused_and_does_not_hang(
    fraction: float, config_file: Path
) -> None:
    printed = pretrain(config_file, f"data.validation_fraction={fraction}", code=2)
    assert "leaves no text" in printed and "Traceback" not in printed


@pytest.mark.slow  # tests/distributed/test_layouts.py has another that is not
def test_masked_documents_train_the_same_in_any_layout(config_file: Path, tmp_path: Path) -> None:
    settings = ["data.mask_documents=true", "training.steps=5"]
    one, many = tmp_path / "one", tmp_path / "many"
    pretrain(config_file, *settings, f"training.run_dir={one}")
    pretrain(config_file, *settings, "parallel.pipeline=2", f"training.run_dir={many}", processes=2)
    for ours, reference in zip(metrics(many), metrics(one), strict=True):
        if "loss" in reference:
            assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)


def test_fingerprint_holds_the_checksums_of_the_receipt(config_file: Path, corpus: Path) -> None:
    facts = corpora.fingerprint_of(load_config(config_file))["corpora"]["stdlib"]
    for name in ("bin", "idx"):
        whole = xxhash.xxh3_128_hexdigest(Path(f"{corpus}.{name}").read_bytes())
        assert facts[name] == f"xxh128:{whole}"
        assert facts[f"{name}_bytes"] == Path(f"{corpus}.{name}").stat().st_size


def test_receipt_of_other_files_is_not_believed(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    prefix = copy_of(corpus, tmp_path)
    receipt = Path(f"{corpus}.receipt.json").read_text()
    Path(f"{prefix}.receipt.json").write_text(receipt)
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"more")  # the receipt speaks of a smaller file
    config = load_config(config_file, [f"data.corpora.stdlib.path={prefix}"])
    facts = corpora.fingerprint_of(config)["corpora"]["stdlib"]
    whole = xxhash.xxh3_128_hexdigest(Path(f"{prefix}.idx").read_bytes())
    assert facts["idx"] == f"xxh128:{whole}"
    assert "bin" not in facts


def test_two_jobs_may_build_the_same_index_at_once(config_file: Path, tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    jobs = [
        subprocess.Popen(
            launch(config_file, cache, f"training.run_dir={tmp_path / name}", "training.steps=2"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("a", "b")
    ]
    for job in jobs:
        printed, _ = job.communicate(timeout=300)
        assert job.returncode == 0, printed
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and nothing private is left
    assert metrics(tmp_path / "a")[0]["loss"] == metrics(tmp_path / "b")[0]["loss"]


def test_epochs_are_read_tokens_over_training_tokens(config_file: Path, corpus: Path) -> None:
    lengths = lengths_of(corpus)
    training = lengths[: round(0.99 * len(lengths))].sum()
    assert corpora.epochs(load_config(config_file)) == {
        "stdlib": pytest.approx(20 * 8 * 64 / training)
    }


def test_token_files_written_anew_get_an_index_of_their_own(
    config_file: Path, corpus: Path, tmp_path: Path
) -> None:
    """Megatron-Core's cache goes by the path alone and would map the old index onto new tokens."""
    prefix = copy_of(corpus, tmp_path)
    settings = [f"data.corpora.stdlib.path={prefix}", "training.steps=2"]
    pretrain(config_file, *settings)
    first = {p.name for p in (tmp_path / "cache").iterdir()}
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    lengths = lengths_of(prefix)
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, np.uint16, lengths[::-1].copy())
    tokens[::-1].tofile(f"{prefix}.bin")
    pretrain(config_file, *settings, f"training.run_dir={tmp_path / 'second'}")
    second = {p.name for p in (tmp_path / "cache").iterdir()}
    assert len(first) == 1 and len(second) == 2 and first < second
    assert not [name for name in second if name.startswith(".")]
