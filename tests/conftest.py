"""A small real corpus and the real entry points, shared by all tests."""

import json
import os
import random
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before Megatron-Core, from which it hides what only a GPU can run.
import megatron_ext  # noqa: F401

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
VOCAB_SIZE = 512
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
LAUNCHER = ["MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and tokenizers that lie beside the checkout on some machines."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


def pytest_configure(config: pytest.Config) -> None:
    """A GPU is only for the tests that are marked so: `make test-gpu`. The others are about a CPU
    on every machine."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rooms with long tests first, so that `make test`'s two workers end at about the same time."""
    long = ["training", "distributed", "chaos", "checkpoint", "evaluation", "planning"]
    order = {room: place for place, room in enumerate(long)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(long)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> "torch.device":
    """The CPU, or the GPU under `make test-gpu`: a test that takes it is one of both."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: run `make test-gpu` on a machine that has one")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of token files made by the command-line tools from the interpreter's own library."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def make_corpus(folder: Path) -> Path:
    """The same, in a folder of one's own."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    with (folder / "docs.jsonl").open("w") as out:
        for source in sources:
            text = source.read_text(encoding="utf-8", errors="replace")
            out.write(json.dumps({"text": text, "meta": {"source": source.name}}) + "\n")
    docs, tokenizer = str(folder / "docs.jsonl"), str(folder / "tokenizer.model")
    for command in (
        ["train-tokenizer", docs, "--vocab-size", str(VOCAB_SIZE), "--output", tokenizer],
        ["tokenize", docs, "--tokenizer", tokenizer, "--output", str(folder / "corpus")],
    ):
        subprocess.run([sys.executable, "-m", "data_tools", *command], check=True, cwd=ROOT)
    return folder / "corpus"


@pytest.fixture
def config_file(tmp_path: Path, corpus: Path) -> Path:
    """A run of 20 steps of a 0.2M-parameter Llama, under a second of work on one core."""
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"""\
model: {{num_layers: 4, hidden_size: 64, ffn_hidden_size: 176, num_heads: 4, vocab_size: 512}}
rope: {{base: 1e4}}
data: {{num_workers: 0, corpora: {{stdlib: {{path: {corpus}}}}}}}
training:
  run_dir: {tmp_path / "run"}
  sequence_length: 64
  global_batch_size: 8
  micro_batch_size: 1
  steps: 20
optimizer: {{lr: 1e-3}}
precision: {{dtype: fp32}}
logging: {{interval: 1}}
"""
    )
    return file


def launch(
    *arguments: object, processes: int = 1, script: Path = ROOT / "pretrain.py"
) -> list[str]:
    """The command line of `pretrain.py` under plain python or, for several processes, torchrun."""
    words = [str(script), *map(str, arguments)]
    if processes == 1:
        return [sys.executable, *words]
    return [sys.executable, *TORCHRUN, "--nproc-per-node", str(processes), *words]


def environment(gpu: bool = False) -> dict[str, str]:
    """One thread a process: several share two cores, and sums keep their order."""
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "OMP_NUM_THREADS": "1", **hidden}


def pretrain(*arguments: object, processes: int = 1, code: int = 0, gpu: bool = False) -> str:
    """Run the real entry point to its end, demand its exit code, return what it printed."""
    done = subprocess.run(
        launch(*arguments, processes=processes),
        env=environment(gpu), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def metrics(run_dir: Path) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def free_ports(count: int) -> list[int]:
    """TCP ports for processes that must be told one before any of them listens. They lie below
    those that the kernel gives to whoever asks for any, which may take one back in between."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(30000, 32700), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError("no free TCP ports")
