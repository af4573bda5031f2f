"""A Hugging Face config.json and ours: the same model in the other's words. Needs no torch.

    config_to_hf(config, vocab_size=32000, dtype="bfloat16")     # what config.json holds
    sections, notes = config_from_hf(read_hf_config(folder))       # model, rope and training
    config = config_of_folder(folder)                            # the same with defaults around it

Known are Llama, Mistral, Qwen2 and Baichuan with rotary positions. Refuses (UserError) what our
model is not: other architectures and activations, sliding windows, ALiBi, biases besides those of
q, k and v; and, on the way out, a RoPE rule that transformers has no name for.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from megatron_ext.config import Config
from megatron_ext.config.files import to_config
from megatron_ext.config.yaml_text import dump, read_mapping
from megatron_ext.errors import UserError
from megatron_ext.rope.frequencies import rope_from_hf, rope_to_hf

# Fine-tuning as in the paper (arXiv 2405.14591, Table 4), for the config that an import writes.
_FINE_TUNING: dict[str, dict[str, Any]] = {
    "training": {"global_batch_size": 128, "micro_batch_size": 1, "steps": 1000},
    "optimizer": {"lr": 2e-5, "weight_decay": 0.0},
    "schedule": {"type": "constant"},
}


HfConfig = dict[str, Any]
"""What a config.json holds."""

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # the first conversions of Llama 1
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "BaiChuanForCausalLM": "baichuan",  # Baichuan 1, 7B
    "BaichuanForCausalLM": "baichuan",  # Baichuan 2, whose output layer is a NormHead
}
# What these configurations mean where they name no base; transformers and Baichuan's code agree.
_DEFAULT_BASE = 10000.0


def config_to_hf(config: Config, vocab_size: int, dtype: str) -> HfConfig:
    """A config.json for our model: Llama's, or Qwen2's where q, k and v have biases.

    `vocab_size`: rows that the embedding has there. `dtype`: transformers' name of it. Raises
    UserError when transformers cannot express the RoPE rule.
    """
    model, rope = config.model, config.rope
    try:
        rope_keys = rope_to_hf(
            rope.base,
            model.head_dim,
            rope.scaling,
            context_length=config.training.sequence_length,
            rotary_fraction=rope.rotary_fraction,
        )
    except ValueError as error:
        raise UserError(f"this model cannot be exported: {error}") from None
    kind = "qwen2" if model.qkv_bias else "llama"
    own = {} if model.qkv_bias else {"attention_bias": False, "mlp_bias": False}
    return {
        "architectures": ["Qwen2ForCausalLM" if model.qkv_bias else "LlamaForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings,
        **own,
        **rope_keys,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name in transformers 4
        "use_cache": True,
    }


def config_from_hf(hf: HfConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Our sections `model`, `rope` and `training` (the context length alone) for a config.json, and
    remarks for the user. Raises UserError for what our model is not."""
    kind = architecture(hf)
    _refuse_foreign(hf, kind)
    notes = []
    if not (hf.get("rope_theta") or (hf.get("rope_parameters") or {}).get("rope_theta")):
        hf = {**hf, "rope_theta": _DEFAULT_BASE}
        notes.append(f"config.json names no rope_theta: {_DEFAULT_BASE:g} is what its code takes")
    if is_norm_head(hf):
        notes.append(
            "NormHead: rows of the output layer were divided by their norms, as its code does "
            "before use; trained on, they are free of that norm"
        )
    try:
        rope = rope_from_hf(hf)
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    model = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": hf["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "vocab_size": hf["vocab_size"],
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "qkv_bias": kind == "qwen2",
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "init_std": hf.get("initializer_range", 0.02),
    }
    sections = {
        "model": model,
        "rope": {
            "base": rope.base,
            "rotary_fraction": rope.rotary_fraction,
            "scaling": _settings_of(rope.scaling),
            "bound": "warn",  # published models are seldom above their bound
        },
        "training": {"sequence_length": hf["max_position_embeddings"]},
    }
    return sections, notes


def check_installed(*packages: str) -> None:
    """Raise UserError when a package of the `hf` extra is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this needs the package {package}: pip install 'megatron-ext[hf]'")


def read_hf_config(folder: Path) -> HfConfig:
    """Its config.json. Raises UserError."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{folder} has no config.json: name the folder of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from None


def imported_config(
    folder: Path, output: Path, hf: HfConfig, tensor: int, pipeline: int
) -> tuple[str, list[str]]:
    """YAML of a run that fine-tunes the folder's model from `output`, and remarks. Raises
    UserError."""
    sections, notes = config_from_hf(hf)
    model = sections["model"]
    missing = -model["vocab_size"] % tensor
    if missing:
        model["vocab_size"] += missing
        notes.append(
            f"vocabulary filled up by {missing} rows to {model['vocab_size']}, which "
            f"--tensor {tensor} divides; export-hf --vocab-size {hf['vocab_size']} cuts them off"
        )
    tokenizer = next(
        (folder / n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).is_file()), None
    )
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    run = {
        **sections,
        "data": {"tokenizer": str(tokenizer.resolve())} if tokenizer else {},
        "training": {
            **sections["training"],
            **_FINE_TUNING["training"],
            "init_from": str(output),
            "run_dir": f"{output}-finetuned",
        },
        "optimizer": _FINE_TUNING["optimizer"],
        "schedule": _FINE_TUNING["schedule"],
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "precision": {"dtype": "fp32" if dtype == "float32" else "bf16"},
    }
    head = (
        f"# Made by megatron-ext import-hf from {folder.name}: its model and RoPE,\n"
        "# and the paper's fine-tuning (arXiv 2405.14591, Table 4). Add data.corpora, and set\n"
        "# what the arm changes, such as rope.base and training.sequence_length.\n"
    )
    return head + dump(run), notes


def config_of_folder(folder: Path) -> Config:
    """Our config of a folder's model, with the paper's fine-tuning around it. Raises UserError."""
    text, _ = imported_config(folder, folder, read_hf_config(folder), tensor=1, pipeline=1)
    return to_config(read_mapping(text, f"{folder / 'config.json'}"), f"{folder / 'config.json'}")


def architecture(hf: HfConfig) -> str:
    """llama, mistral, qwen2 or baichuan. Raises UserError for others."""
    named = hf.get("architectures") or ["no architecture"]
    if named[0] not in ARCHITECTURES:
        raise UserError(
            f"config.json names {named[0]}, which is not known here: give a folder of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[named[0]]


def is_norm_head(hf: HfConfig) -> bool:
    """Whether its output layer uses rows of length one (Baichuan 2, section 2.5)."""
    return "BaichuanForCausalLM" in (hf.get("architectures") or [])


def _refuse_foreign(hf: HfConfig, kind: str) -> None:
    if "max_position_embeddings" not in hf:
        why = "13B models of Baichuan use ALiBi" if kind == "baichuan" else "it must name one"
        raise UserError(
            f"config.json has no max_position_embeddings ({why}): only models with rotary "
            "positions can be imported"
        )
    window = hf.get("sliding_window")
    if window is not None and (kind == "mistral" or hf.get("use_sliding_window")):
        raise UserError(
            f"config.json has sliding_window={window}, and our attention sees everything before a "
            "token: import a model without a sliding window"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json has hidden_act={hf['hidden_act']}: only silu is known here")
    for name in ("attention_bias", "mlp_bias"):
        if hf.get(name):
            raise UserError(f"config.json has {name}=true: only biases of q, k and v are known")


def _settings_of(rule: Any) -> dict[str, Any]:
    """A RoPE rule as its section of a config file."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(rule).items()
        if value is not None
    }
