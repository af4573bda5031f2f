"""Hugging Face folders in and out: bit for bit the same weights, and the logits of transformers."""

import json
from pathlib import Path

import pytest

from tests.conftest import LAUNCHER

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from megatron_ext.checkpoint.huggingface import export_hf, import_hf  # noqa: E402
from megatron_ext.errors import UserError  # noqa: E402

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "vocab_size": 200,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,  # so that attention is not flat and a wrong rotation shows
    "tie_word_embeddings": False,
}
RULES = {
    "none": {"rope_type": "default", "rope_theta": 700.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
        "original_max_position_embeddings": 24,
    },
}  # fmt: skip
ARCHITECTURES = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "head_dim": 32}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen 2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "baichuan 2": ("Baichuan", {}),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def make(kind: str, folder: Path, rule: dict, dtype=torch.float32, **changes: object):
    """A folder of random weights, norms and biases away from their initial values; the model."""
    keys = {**SHAPE, **changes, "rope_parameters": dict(rule)}
    torch.manual_seed(1)
    name = "Llama" if kind == "Baichuan" else kind
    config = getattr(transformers, f"{name}Config")(**keys)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    for key, weight in model.named_parameters():
        if "norm" in key:
            weight.data.uniform_(0.5, 1.5)
        if key.endswith("bias"):
            weight.data.normal_(0, 0.5)
    if kind != "Baichuan":
        model.save_pretrained(folder, max_shard_size="60KB")
        return model
    write_baichuan(model, keys, folder)
    head = model.lm_head.weight.data
    head /= head.norm(dim=1, keepdim=True)  # what NormHead uses
    return model


def write_baichuan(model, keys: dict, folder: Path) -> None:
    """The names of Baichuan 2: one matrix W_pack of all rows of q, then k, then v."""
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for i in range(keys["num_hidden_layers"]):
        prefix = f"model.layers.{i}.self_attn."
        parts = [weights.pop(f"{prefix}{x}_proj.weight") for x in "qkv"]
        weights[f"{prefix}W_pack.weight"] = torch.cat(parts)
    folder.mkdir(parents=True)
    torch.save(weights, folder / "pytorch_model.bin")
    names = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
    (folder / "config.json").write_text(json.dumps({**keys, **names}))


def weights_of(folder: Path) -> dict:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.load_file(file)
    return found


# Every architecture and every rule in the fast suite, their whole product in the slow one.
PAIRS = [
    pytest.param(a, r, id=f"{a}-{r}", marks=[] if i % 3 == j else pytest.mark.slow)
    for i, a in enumerate(ARCHITECTURES)
    for j, r in enumerate(RULES)
]


@pytest.mark.parametrize(("architecture", "rule"), PAIRS)
def test_there_and_back_again(architecture: str, rule: str, tmp_path: Path) -> None:
    kind, changes = ARCHITECTURES[architecture]
    theirs = make(kind, tmp_path / "in", RULES[rule], **changes)
    into = import_hf(tmp_path / "in", tmp_path / "run", tensor=2, pipeline=2)
    back = export_hf(tmp_path / "run", tmp_path / "out")

    assert into["proved"] is (None if kind == "Baichuan" else True)
    assert back["proved"] is True
    assert [entry["length"] for entry in back["lengths"]] == [24, 48, 96]
    exported = weights_of(tmp_path / "out")
    expected = {k: v for k, v in theirs.state_dict().items() if k in exported}
    names = {k for k in theirs.state_dict() if k != "lm_head.weight" or kind != "Qwen2"}
    assert exported.keys() == names
    for name, weight in expected.items():
        close = {"atol": 1e-7, "rtol": 1e-6} if kind == "Baichuan" and "lm_head" in name else {}
        torch.testing.assert_close(exported[name], weight, **(close or {"atol": 0, "rtol": 0}))
    # The folder written last against the model made first, both by transformers.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(0, 200, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = loaded(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=0)
    for way, proof in {"in": into, "out": back}.items():  # shown by pytest -s
        differences = [f"{entry['max_abs_difference']:.1e}" for entry in proof["lengths"]]
        print(f"{architecture:<11} {rule:<7} {way:<3}", *differences or ["not compared"])


def test_a_long_trained_context_is_compared_at_lengths_that_a_cpu_can_compute() -> None:
    from megatron_ext.checkpoint.proof import default_lengths

    assert default_lengths(4096) == [2048, 4096, 8192]
    assert default_lengths(8192) == [4096, 8192]
    assert default_lengths(131072) == [8192]


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_no_bit_of_a_half_precision_weight_is_lost(dtype, stored, tmp_path: Path) -> None:
    theirs = make("Llama", tmp_path / "in", RULES["none"], dtype)
    import_hf(tmp_path / "in", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    exported = weights_of(tmp_path / "out")
    assert {weight.dtype for weight in exported.values()} == {stored}
    for name, weight in theirs.state_dict().items():
        assert torch.equal(exported[name].to(torch.float32), weight.to(torch.float32)), name


def test_rows_that_fill_up_the_vocabulary_never_win_and_can_be_cut_off(tmp_path: Path) -> None:
    theirs = make("Llama", tmp_path / "in", RULES["none"], vocab_size=197)
    import_hf(tmp_path / "in", tmp_path / "run", tensor=4)
    export_hf(tmp_path / "run", tmp_path / "padded")
    export_hf(tmp_path / "run", tmp_path / "cut", vocab_size=197)
    tokens = torch.arange(90)[None]
    with torch.no_grad():
        padded, cut = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits
            for name in ("padded", "cut")
        )
        reference = theirs(tokens).logits
    assert padded.shape[-1] == 200
    torch.testing.assert_close(cut, reference, atol=2e-5, rtol=0)
    assert (padded.argmax(-1) == reference.argmax(-1)).all()
    growth = padded.logsumexp(-1) - reference.logsumexp(-1)
    assert (growth <= torch.log(torch.tensor(200 / 197)) + 1e-5).all()


def test_keys_of_both_generations_of_transformers_are_written(tmp_path: Path) -> None:
    make("Llama", tmp_path / "in", RULES["llama3"])
    import_hf(tmp_path / "in", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == "llama3"
    assert written["max_position_embeddings"] == 48


def test_a_folder_that_computes_otherwise_is_not_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ext.checkpoint import huggingface

    make("Llama", tmp_path / "in", RULES["none"])
    import_hf(tmp_path / "in", tmp_path / "run")
    right = huggingface.config_to_hf

    def slightly_wrong(*arguments):
        return {**right(*arguments), "rope_parameters": {"rope_type": "default", "rope_theta": 720}}

    monkeypatch.setattr(huggingface, "config_to_hf", slightly_wrong)
    with pytest.raises(RuntimeError, match="not proved, so nothing was left"):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "run"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, which is not known here"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, "sliding_window=32"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
        ({"max_position_embeddings": None}, "no max_position_embeddings"),
        ({"num_hidden_layers": 3}, "has no weight model.layers.2."),
        ({"intermediate_size": 96}, "config.json wants"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_our_model_is_not_is_refused(changes: dict, sentence: str, tmp_path: Path) -> None:
    make("Llama", tmp_path / "in", RULES["none"])
    file = tmp_path / "in/config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(UserError) as caught:
        import_hf(tmp_path / "in", tmp_path / "run")
    assert sentence in str(caught.value)
    assert not list(tmp_path.glob("run*"))


def test_a_rope_rule_without_a_name_in_transformers_is_refused(tmp_path: Path) -> None:
    make("Llama", tmp_path / "in", RULES["none"])
    import_hf(tmp_path / "in", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("rotary_fraction: 1.0", "rotary_fraction: 0.5"))
    with pytest.raises(UserError, match=r"cannot be exported: rotary_fraction=0\.5"):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    make("Baichuan", tmp_path / "in", RULES["none"])
    torch.save({"model.embed_tokens.weight": Trap()}, tmp_path / "in/pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        import_hf(tmp_path / "in", tmp_path / "run")
    assert not (tmp_path / "sprung").exists()


def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch, tmp_path: Path) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for convert in (import_hf, export_hf):
        with pytest.raises(UserError, match=r"pip install 'megatron-ext\[hf\]'"):
            convert(tmp_path / "in", tmp_path / "out")
