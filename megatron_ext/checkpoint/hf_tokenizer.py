"""A run's tokenizer as the files that transformers loads, proved on text; and a folder's BOS.

    facts = write_tokenizer(Path("tokenizer.model"), folder)
    facts["proved"], facts["bos_token_id"], facts["eos_token_id"]
    folder_bos(Path("Llama-3-8B"))                  # 128000

A tokenizer.json is copied, without what adds ids to a text or cuts it, if it does. A sentencepiece
model is copied and, when it is a BPE, also written as tokenizer.json in Llama's form: transformers'
own conversion of a .model loses the space that sentencepiece puts before a text, and pieces of
several spaces. What transformers then makes of some text is compared id by id; a tokenizer.json
that differs is not left there. No BOS is added, as none was in training; except by weights that
came from a folder whose tokenizer adds one and were not trained since. Refuses files that are no
tokenizer (UserError). Needs no torch.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from data_tools.errors import UserError as DataToolsError
from data_tools.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_ext.checkpoint.hf_config import read_hf_config
from megatron_ext.errors import UserError

_SAMPLES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two spaces first,   three within,\tand a tab\n\n\n    def f(x):\n        return 1.5e-3\n",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\uff0c\u4e16\u754c \u0416\u0438\u0437\u043d\u044c",
    "\U0001f600\u200d\U0001f525 e\u0301 \u00a0x </s> <s>",
    "\nA newline first. There and back again.\n",
    "",
)
# Parts of a tokenizer.json that add ids to a text's own or cut them: training uses none of them.
_AROUND = ("post_processor", "truncation", "padding")
_ADD_BOS = ("LlamaTokenizer", "LlamaTokenizerFast")


def write_tokenizer(source: Path, folder: Path, bos: int | None = None) -> dict[str, Any]:
    """Put the tokenizer into `folder`, with `bos` before every text if one is given; returns the
    file's name (None where it is not left there), the two ids, and whether transformers gives the
    same ids as training had (`proved`). Raises UserError."""
    try:
        ours = load_tokenizer(source)
    except DataToolsError as error:
        raise UserError(f"{error}; name the run's tokenizer by data.tokenizer") from None
    file = Path(ours.path)
    shutil.copyfile(file, folder / file.name)
    by_id: dict[int | None, str] = {n: name for name, n in ours.control_tokens().items()}
    tokens = {"bos_token": by_id.get(ours.bos_id), "eos_token": by_id.get(ours.eod_id)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # A text that spells a control token means its letters, as in training.
        "split_special_tokens": True,
        **{key: token for key, token in tokens.items() if token is not None},
    }
    if isinstance(ours, SentencePieceTokenizer):
        _write_bpe(ours, folder / "tokenizer.json")
    _write(folder / "tokenizer_config.json", settings)
    proved = _same_ids(ours, folder, bos)
    if not proved and (folder / "tokenizer.json").is_file():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content |= dict.fromkeys(_AROUND)
        if bos is not None:
            content["post_processor"] = _put_before(by_id[bos], bos)
        _write(folder / "tokenizer.json", content)
        proved = _same_ids(ours, folder, bos)
    if not proved:  # a tokenizer that is nearly right is worse than none
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    return {
        "file": file.name if (folder / file.name).is_file() else None,
        "sha256": ours.hash.removeprefix("sha256:"),
        "proved": proved,
        "bos_token_id": ours.bos_id,
        "eos_token_id": ours.eod_id,
    }


def folder_bos(folder: Path) -> int | None:
    """The id that a Hugging Face folder's tokenizer puts before a text, if any: the post-processor
    of its tokenizer.json says so; where that puts none, tokenizer_config.json or the tokenizer's
    class, as Llama's and Mistral's older folders leave it to them. Raises UserError."""
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = load_tokenizer(folder / "tokenizer.json")
        except DataToolsError as error:
            raise UserError(str(error)) from None
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        text = tokenizer.processor.encode("a")
        if text.ids and text.special_tokens_mask[0]:
            return int(text.ids[0])
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    adds = settings.get("add_bos_token", settings.get("tokenizer_class") in _ADD_BOS)
    return read_hf_config(folder).get("bos_token_id") if adds else None


def _same_ids(ours: Tokenizer, folder: Path, bos: int | None) -> bool:
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    before = [] if bos is None else [bos]
    return all(before + ours.encode(text).tolist() == theirs(text).input_ids for text in _SAMPLES)


def _put_before(token: str, number: int) -> dict[str, Any]:
    """The part of a tokenizer.json that puts a token before a text."""
    from tokenizers.processors import TemplateProcessing

    template = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )
    return json.loads(template.__getstate__())


def _write_bpe(ours: SentencePieceTokenizer, file: Path) -> None:
    """The BPE of a sentencepiece model: a piece's rank is its id, and it may come of every pair of
    pieces that spell it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = ours.processor
    vocabulary = {model.id_to_piece(i): i for i in range(ours.vocab_size)}
    special = set(ours.control_tokens())
    merges = []
    for piece, rank in vocabulary.items():
        if piece in special or model.is_byte(rank):
            continue
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    bpe = models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=model.id_to_piece(model.unk_id()),
        fuse_unk=True,
        byte_fallback=any(model.is_byte(i) for i in range(ours.vocab_size)),
    )
    tokenizer = Tokenizer(bpe)
    space = "\u2581"
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(file))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
