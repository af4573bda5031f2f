"""Which token files are refused, and what identifies those that are used."""

from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.data import corpora
from megatron_ext.errors import UserError
from tests.conftest import pretrain


def test_missing_file_and_small_vocabulary_are_refused(config_file: Path) -> None:
    printed = pretrain(config_file, "data.corpora.library.path=nowhere/x", code=2)
    assert "nowhere/x.bin does not exist" in printed and "Traceback" not in printed
    with pytest.raises(UserError, match="raise it to at least 512"):
        corpora.check_corpora(load_config(config_file, ["model.vocab_size=500"]))


def test_no_corpus_is_refused(config_file: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(UserError, match=r"data\.corpora is empty"):
        corpora.check_corpora(config.model_copy(update={"data": type(config.data)()}))


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
    config = load_config(config_file, [f"data.corpora.library.path={prefix}"])
    with pytest.raises(UserError, match=r"tokenize the corpus again"):
        corpora.check_corpora(config)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_share_without_documents_is_refused_and_does_not_hang(
    fraction: float, config_file: Path
) -> None:
    printed = pretrain(config_file, f"data.validation_fraction={fraction}", code=2)
    assert "leaves no text" in printed and "Traceback" not in printed
