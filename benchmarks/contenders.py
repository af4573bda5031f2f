"""One training step of the same Llama: ours, transformers' and plain PyTorch's, for benchmarks.

    step, parameters = BUILDERS["ours"](Case(SIZES["60M"], length=512, micro_batch=4))
    loss = step()                                     # in a process of its own: worker.py

The same parameters and tokens, AdamW (PyTorch's fused one for the peers, as transformers' Trainer
has it), gradient norm clipped at 1, no recomputation. In bf16 the peers compute under autocast with
float32 weights, as the Trainer does, and ours as precision.dtype=bf16 does; both update float32
weights. A contender called "matmul" tells the rate of the best of the model's own products.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CONTENDERS = ("transformers", "plain PyTorch", "ours")
_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "vocab_size")
SIZES: dict[str, dict[str, int]] = {
    name: dict(zip(_SHAPE, shape, strict=True))
    for name, shape in {
        "5M": (4, 256, 704, 4, 4096),
        "60M": (8, 512, 1408, 8, 32000),
        "1B": (16, 2048, 5504, 16, 32000),
        "2B": (32, 2048, 5504, 16, 125_696),
        "2B, 8 layers": (8, 2048, 5504, 16, 125_696),
        "7B, 4 layers": (4, 4096, 11008, 32, 32000),
    }.items()
}
BASE, LR, CLIP = 1e4, 3e-4, 1.0
_open = contextlib.ExitStack()  # our process group, until the process ends


@dataclass(frozen=True)
class Case:
    """A step: micro_batches x micro_batch sequences of `length` tokens."""

    shape: dict[str, int]
    length: int
    micro_batch: int
    micro_batches: int = 1
    device: str = "cpu"
    dtype: str = "fp32"  # or bf16
    compiled: bool = False  # the peers, by torch.compile

    @property
    def tokens(self) -> int:
        return self.length * self.micro_batch * self.micro_batches

    @property
    def parameters(self) -> int:
        """Of the whole model, without its norms."""
        return self._weights() + self.shape["vocab_size"] * self.shape["hidden_size"]

    def flops_per_token(self, attention_share: float = 0.5) -> float:
        """6 N + 12 L h s times the share of the scores that is computed: N the weights of matrix
        products."""
        h, layers = self.shape["hidden_size"], self.shape["num_layers"]
        return 6 * self._weights() + 12 * attention_share * layers * h * self.length

    def _weights(self) -> int:
        h, f = self.shape["hidden_size"], self.shape["ffn_hidden_size"]
        layers = self.shape["num_layers"] * (4 * h * h + 3 * h * f)
        return layers + self.shape["vocab_size"] * h


def token_ids(case: Case) -> Iterator[Any]:
    """Token ids [micro_batch, length + 1], the same for all contenders."""
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        size = (case.micro_batch, case.length + 1)
        yield torch.randint(case.shape["vocab_size"], size, generator=generator)


def build_ours(case: Case) -> tuple[Callable[[], float], int]:
    from megatron_ext.config import Config
    from megatron_ext.model.llama import build_chunks, reduced, transformer_config
    from megatron_ext.training.optimizer import build_optimizer
    from megatron_ext.training.step import train_step
    from megatron_ext.world import world

    config = Config.model_validate(
        {
            "model": case.shape,
            "rope": {"base": BASE, "bound": "off"},
            "training": {
                "sequence_length": case.length,
                "global_batch_size": case.micro_batch * case.micro_batches,
                "micro_batch_size": case.micro_batch,
                "steps": 10**6,
            },
            "optimizer": {"lr": LR, "clip_grad": CLIP},
            "schedule": {"type": "constant"},
            "precision": {"dtype": case.dtype},
        }
    )
    _open.enter_context(world(config))
    transformer = transformer_config(config)
    chunks = build_chunks(config, transformer)
    draw(chunks[0])
    model = reduced(config, transformer, chunks)
    optimizer = build_optimizer(model, config)
    given = (as_batch(ids) for ids in token_ids(case))
    numbers = iter(range(10**6))

    def step() -> float:
        return train_step(next(numbers), given, model, optimizer, config).loss

    return step, sum(weight.numel() for weight in model[0].parameters())


def as_batch(ids: Any) -> dict[str, Any]:
    """As the loader gives it."""
    import torch

    batch = {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": torch.ones(ids.shape[0], ids.shape[1] - 1),
    }
    pinned = torch.cuda.is_available()
    return {name: x.pin_memory() for name, x in batch.items()} if pinned else batch


def draw(model: Any) -> None:
    """Weights for a test of speed, drawn where they lie."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, 0.02)


def build_transformers(case: Case) -> tuple[Callable[[], float], int]:
    import torch
    import torch.nn.functional as F
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Under torch.compile "sdpa" makes a mask of positions, in case several documents were packed
    # (masking_utils.py, find_packed_sequence_indices), and a mask shuts the flash kernels out. For
    # a name that it has no rule for it makes none, and attention is causal.
    transformers.AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    shape = case.shape
    with torch.device(case.device):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                num_hidden_layers=shape["num_layers"],
                hidden_size=shape["hidden_size"],
                intermediate_size=shape["ffn_hidden_size"],
                num_attention_heads=shape["num_heads"],
                vocab_size=shape["vocab_size"],
                max_position_embeddings=case.length,
                rope_parameters={"rope_type": "default", "rope_theta": BASE},
                attn_implementation="sdpa_without_mask",
                use_cache=False,
            )
        )

    def loss_of(ids: Any) -> Any:
        logits = model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return peer_step(model, loss_of, case)


def build_plain(case: Case) -> tuple[Callable[[], float], int]:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    shape, length = case.shape, case.length
    h, heads = shape["hidden_size"], shape["num_heads"]
    d = h // heads

    frequencies = BASE ** -(torch.arange(0, d, 2).double() / d)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = (x.float().to(case.device) for x in (angles.cos(), angles.sin()))

    def rotate(x: Tensor) -> Tensor:  # [batch, heads, length, d]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(h, 1e-6), nn.RMSNorm(h, 1e-6)
            self.qkv, self.out = nn.Linear(h, 3 * h, False), nn.Linear(h, h, False)
            self.up = nn.Linear(h, 2 * shape["ffn_hidden_size"], False)
            self.down = nn.Linear(shape["ffn_hidden_size"], h, False)

        def forward(self, x: Tensor) -> Tensor:
            qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            a = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(a.transpose(1, 2).flatten(2))
            gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * up)

    with torch.device(case.device):
        model = nn.Sequential(
            nn.Embedding(shape["vocab_size"], h),
            *(Block() for _ in range(shape["num_layers"])),
            nn.RMSNorm(h, 1e-6),
            nn.Linear(h, shape["vocab_size"], False),
        )
    draw(model)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1]).flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten())

    return peer_step(model, loss_of, case)


def peer_step(
    model: Any, loss_of: Callable[[Any], Any], case: Case
) -> tuple[Callable[[], float], int]:
    """The usual loop around a model: losses, backward, clip, step, zero. Between steps no gradients
    take memory from the others on the GPU."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    if case.compiled:
        loss_of = torch.compile(loss_of)
    given = token_ids(case)

    def step() -> float:
        total = torch.zeros((), device=case.device)
        for _ in range(case.micro_batches):
            ids = next(given).to(case.device, non_blocking=True)
            with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16"):
                loss = loss_of(ids) / case.micro_batches
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step, sum(weight.numel() for weight in model.parameters())


def build_matmul(case: Case) -> tuple[Callable[[], float], int]:
    """FLOP/s of the best of the model's own products."""
    import torch

    h, f, v = (case.shape[name] for name in ("hidden_size", "ffn_hidden_size", "vocab_size"))
    tokens = case.length * case.micro_batch
    dtype = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    gpu = case.device == "cuda"

    def random(*size: int) -> Any:
        return torch.randn(*size, device=case.device).to(dtype)

    products = [(h, 3 * h), (h, h), (h, 2 * f), (f, h), (h, v)]
    pairs = [(random(tokens, inner), random(inner, n)) for inner, n in products]
    work_flops = 2e13 if gpu else 2e10

    def step() -> float:
        best = 0.0
        for a, b in pairs:
            out = a @ b
            repeats = max(1, math.ceil(work_flops / (2 * a.numel() * b.shape[1])))
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(repeats):
                torch.matmul(a, b, out=out)
            if gpu:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / repeats
            best = max(best, 2 * a.numel() * b.shape[1] / seconds)
        return best

    return step, 0


BUILDERS = {
    "ours": build_ours,
    "transformers": build_transformers,
    "plain PyTorch": build_plain,
    "matmul": build_matmul,
}
