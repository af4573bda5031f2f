"""Evaluation beside a plain transformers loop on the same Hugging Face folder, in one run.

    python benchmarks/evaluate.py                             # a random model of 29M parameters
    python benchmarks/evaluate.py --folder my-hf --text book.txt --length 4096 --stride 256

The same windows slide over the same tokens: ours is `evaluation.perplexity` on our Megatron-Core
model; theirs is the loop that is commonly written, one window after the other, all logits, float32
log-softmax. Each is measured in a process of its own, without loading; a token counts once for each
window that it is in. Both perplexities are printed, and have to agree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    options = parse()
    if options.measure:
        print(json.dumps({"ours": ours, "theirs": theirs}[options.measure](options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.folder is None:
            options.folder = random_model(Path(scratch) / "model", options)
        results = {who: run(options, who) for who in ("theirs", "ours")}
    print(f"windows of {options.length} tokens, stride {options.stride}, {os.cpu_count()} cores")
    print(f"{'':24}{'transformers':>14}{'ours':>14}")
    for name, digits in (("tokens_per_s", 0), ("seconds", 2), ("perplexity", 4)):
        a, b = (results[who][name] for who in ("theirs", "ours"))
        print(f"{name.replace('_per_', '/'):24}{a:>14,.{digits}f}{b:>14,.{digits}f}{b / a:>8.2f}x")


def run(options: argparse.Namespace, who: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", who]
    for name in ("folder", "text", "length", "stride", "tokens"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def ours(options: argparse.Namespace) -> dict[str, float]:
    import warnings

    warnings.filterwarnings("ignore")
    from megatron_ext.evaluation.perplexity import Plan, measure_length, windows
    from megatron_ext.evaluation.scoring import open_checkpoint
    from megatron_ext.evaluation.subject import find_subject

    subject = find_subject(options.folder)
    header = {"settings": {"stride": options.stride}}
    tokens = tokens_of(options)
    plan = Plan(subject, Path(), [tokens], header, {}, [])
    with open_checkpoint(subject.config, subject.weights) as scorer:
        started = time.perf_counter()
        entry = measure_length(plan, options.length, scorer)
        seconds = time.perf_counter() - started
    fed = sum(w.end - w.begin for w in windows([len(tokens)], options.length, options.stride))
    return facts(fed, seconds, entry["loss"])


def theirs(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder).to(device).eval()
    ids = torch.from_numpy(tokens_of(options)).to(device)
    losses, fed, previous = [], 0, 1
    started = time.perf_counter()
    for begin in range(0, len(ids), options.stride):
        end = min(begin + options.length, len(ids))
        with torch.no_grad():
            logits = model(ids[None, begin:end], use_cache=False).logits[0, :-1].float()
        all_losses = torch.nn.functional.cross_entropy(
            logits, ids[begin + 1 : end], reduction="none"
        )
        losses += all_losses[previous - begin - 1 :].double().tolist()
        fed, previous = fed + end - begin, end
        if end == len(ids):
            break
    return facts(fed, time.perf_counter() - started, float(np.mean(losses)))


def facts(fed: int, seconds: float, loss: float) -> dict[str, float]:
    return {"tokens_per_s": fed / seconds, "seconds": seconds, "perplexity": float(np.exp(loss))}


def tokens_of(options: argparse.Namespace) -> np.ndarray:
    """Of the text by the folder's tokenizer, else random ones."""
    vocab_size = json.loads((options.folder / "config.json").read_text())["vocab_size"]
    if options.text is None:
        return np.random.default_rng(0).integers(0, vocab_size, options.tokens)
    from data_tools.tokenizer import load_tokenizer

    text = options.text.read_text(encoding="utf-8")
    return load_tokenizer(options.folder).encode(text)[: options.tokens].astype(np.int64)


def random_model(folder: Path, options: argparse.Namespace) -> Path:
    """8 layers of width 512 and 8,192 tokens: 29M parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=8, hidden_size=512, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=options.length,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, initializer_range=0.05,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="Hugging Face folder; else a random model")
    parser.add_argument("--text", type=Path, help="UTF-8 text; else random tokens")
    parser.add_argument("--tokens", type=int, default=6000, help="how many of them")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--measure", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
