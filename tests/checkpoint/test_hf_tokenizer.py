"""Tokenizers of Hugging Face folders: the BOS that they put before a text, and what is exported."""

import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint import hf_tokenizer
from megatron_ext.checkpoint.hf_tokenizer import folder_bos, write_tokenizer
from megatron_ext.checkpoint.huggingface import export_hf, import_hf
from megatron_ext.evaluation.subject import find_subject
from tests.checkpoint.test_huggingface import RULES, alone, make  # noqa: F401

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

BOS = 7


def write_tokenizer_json(folder: Path, template: str | None, **settings: object) -> Path:
    """A byte-level BPE in a folder, as Llama 3's: only the template tells whether a BOS is put."""
    folder.mkdir(exist_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: 10 + i for i, letter in enumerate(letters)} | {"<s>": BOS, "</s>": 8}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", 8)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    ("template", "settings", "bos"),
    [
        ("<s> $A", {}, BOS),
        ("<s> $A </s>", {}, BOS),
        ("$A </s>", {}, None),
        (None, {}, None),
        (None, {"tokenizer_class": "LlamaTokenizer"}, 1),  # config.json's, as Llama's class adds it
        (None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, None),
    ],
)
def test_the_bos_is_the_templates_or_the_classes(
    template: str | None, settings: dict, bos: int | None, tmp_path: Path
) -> None:
    write_tokenizer_json(tmp_path, template, **settings)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1}))
    assert folder_bos(tmp_path) == bos


def test_a_run_made_of_a_folder_has_its_bos(tmp_path: Path) -> None:
    make("Llama", tmp_path / "in", RULES["none"], vocab_size=300)
    write_tokenizer_json(tmp_path / "in", "<s> $A")
    assert find_subject(tmp_path / "in").bos == BOS
    import_hf(tmp_path / "in", tmp_path / "run", lengths=[8])
    assert find_subject(tmp_path / "run").bos == BOS
    assert find_subject(tmp_path / "run/checkpoints/step_00000000").bos == BOS


def test_it_is_exported_with_the_bos_that_came_with_it(tmp_path: Path) -> None:
    make("Llama", tmp_path / "in", RULES["none"], vocab_size=300)
    write_tokenizer_json(
        tmp_path / "in", "<s> $A </s>"
    )  # its end is not put: no run trains with it
    import_hf(tmp_path / "in", tmp_path / "run", lengths=[8])
    export_hf(tmp_path / "run", tmp_path / "out", lengths=[8])
    assert find_subject(tmp_path / "out").bos == BOS
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("ab").input_ids == [BOS, *exported("ab", add_special_tokens=False).input_ids]


def test_a_tokenizer_that_adds_a_bos_is_exported_without(tmp_path: Path) -> None:
    source = write_tokenizer_json(tmp_path / "in", "<s> $A")
    (tmp_path / "out").mkdir()
    assert write_tokenizer(source, tmp_path / "out")["proved"]
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("ab").input_ids == exported("ab", add_special_tokens=False).input_ids
    assert exported.decode(exported("ab").input_ids) == "ab"


def test_a_tokenizer_that_transformers_reads_otherwise_is_not_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tokenizer_json(tmp_path / "in", None)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(hf_tokenizer, "_same_ids", lambda ours, folder, bos: False)
    facts = write_tokenizer(source, tmp_path / "out")
    assert facts["file"] is None and facts["proved"] is False
    assert not list((tmp_path / "out").iterdir())
