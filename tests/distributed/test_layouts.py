"""Every layout is the same training: real processes against one process, in fp32.

    pytest tests/distributed -s                    # prints the table of docs/correctness.md

Compared after 10 steps: losses, gradient norms, every parameter as the checkpoints of steps 5 and
10 hold it, the tokens that each rank's model chunks were given, and the tasks measured in training.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from tests.conftest import ROOT, environment, launch, metrics, pretrain

TOLERANCE = 1e-4
STEPS, BATCH, LENGTH = 10, 8, 64
MEASURED = ("perplexity/70", "perplexity/400")  # 70: most layouts do not divide it

slow = pytest.mark.slow

# Fewer KV heads than four tensor-parallel ranks, and layers for four stages of two chunks.
MODEL = ["model.num_layers=8", "model.num_heads=8", "model.num_kv_heads=2", "rope.bound=off"]
# The first forward passes after a step are then those of the tasks, whose ranks differ in number.
TASKS_ALONE = ["evaluation.interval=1000", "evaluation.tasks_interval=5"]
TIED = "model.tied_embeddings=true"
BIAS = "model.qkv_bias=true"
MASKED, RESET = "data.mask_documents=true", "data.reset_positions=true"

TP2, TP4, SP = "parallel.tensor=2", "parallel.tensor=4", "parallel.sequence=true"
PP2, PP4, VPP2 = "parallel.pipeline=2", "parallel.pipeline=4", "parallel.virtual_pipeline=2"
CP2, CP4 = "parallel.context=2", "parallel.context=4"
DISTRIBUTED = "parallel.distributed_optimizer=true"
# Small buckets: the output projection, among others, has one of its own.
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.bucket_size=10_000"]
GATHER = "parallel.overlap_param_gather=true"
CHUNKED = "kernels.cross_entropy=chunked"
UNEVEN = ["parallel.first_stage_layers=5", "parallel.last_stage_layers=3"]
MB2 = "training.micro_batch_size=2"
RAMPED = "training.rampup_batch_size=[2,2,20]"

# Name, processes, settings. The two fast ones meet every kind of parallelism but plain 1F1B, which
# the tests of resuming and of resharding run.
LAYOUTS = [
    pytest.param("CP2, documents masked, positions reset", 2, [MASKED, RESET, CP2]),
    pytest.param("PP2 VPP2 DP2, distributed optimizer, overlapped", 4,
                 [PP2, VPP2, DISTRIBUTED, *OVERLAP, GATHER, CHUNKED]),
    *(
        pytest.param(*row, marks=slow)
        for row in [
            ("TP2", 2, [TP2]),
            ("TP2 SP", 2, [TP2, SP]),
            ("TP4 SP, 2 KV heads", 4, [TP4, SP]),
            ("PP2", 2, [PP2]),
            ("PP2 uneven 5+3", 2, [PP2, *UNEVEN]),
            ("PP4 first stage 1, last 3", 4, [PP4, "parallel.first_stage_layers=1",
                                              "parallel.last_stage_layers=3"]),
            ("PP2 VPP2", 2, [PP2, VPP2]),
            ("PP4 VPP2, messages not overlapped", 4,
             [PP4, VPP2, "parallel.overlap_p2p_comm=false"]),
            ("PP2 VPP4", 2, [PP2, "parallel.virtual_pipeline=4"]),
            ("PP4 VPP2", 4, [PP4, VPP2]),
            ("PP2 VPP2 uneven 2+6", 2, [PP2, VPP2, "parallel.first_stage_layers=2",
                                        "parallel.last_stage_layers=6"]),
            ("DP2", 2, []),
            ("DP4, distributed optimizer", 4, [DISTRIBUTED]),
            ("PP2 VPP2 DP2, distributed optimizer", 4, [PP2, VPP2, DISTRIBUTED]),
            ("DP2, reduction overlapped", 2, OVERLAP),
            ("DP2, distributed optimizer, reduction overlapped", 2,
             [DISTRIBUTED, *OVERLAP, "parallel.overlap_param_gather=false"]),
            ("DP2, distributed optimizer, both overlapped", 2, [DISTRIBUTED, *OVERLAP, GATHER]),
            ("DP4, distributed optimizer, both overlapped, tasks alone", 4,
             [DISTRIBUTED, *OVERLAP, GATHER, CHUNKED, *TASKS_ALONE]),
            ("TP2 SP DP2, distributed optimizer, both overlapped, logits in chunks", 4,
             [TP2, SP, DISTRIBUTED, *OVERLAP, GATHER, CHUNKED]),
            ("DP2 tied, distributed optimizer, both overlapped, logits in chunks", 2,
             [TIED, DISTRIBUTED, *OVERLAP, GATHER, CHUNKED]),
            ("DP2, micro-batch 2", 2, [MB2]),
            ("DP2, batch growing from 2", 2, [RAMPED]),
            ("PP2 CP2, batch growing from 2", 4, [PP2, CP2, RAMPED]),
            ("CP2", 2, [CP2]),
            ("CP4", 4, [CP4]),
            ("CP2 DP2, distributed optimizer", 4, [CP2, DISTRIBUTED]),
            ("CP2 PP2 VPP2", 4, [CP2, PP2, VPP2]),
            ("PP2 tied, QKV bias", 2, [TIED, BIAS, PP2]),
            ("TP4 SP, 2 KV heads, QKV bias", 4, [BIAS, TP4, SP]),
            ("PP2 VPP2 tied, distributed optimizer", 4, [TIED, PP2, VPP2, DISTRIBUTED]),
            ("TP2 tied", 2, [TIED, TP2]),
            ("CP2 PP2, documents masked", 4, [MASKED, CP2, PP2]),
            ("DP2, documents masked", 2, [MASKED]),
            ("TP2 SP CP2, documents masked, positions reset", 4, [MASKED, RESET, TP2, SP, CP2]),
            ("CP2 PP2, positions reset", 4, [RESET, CP2, PP2]),
            ("CP2, full recompute", 2, [CP2, "training.recompute=full"]),
            ("CP2, selective recompute", 2, [CP2, "training.recompute=selective"]),
            ("TP2 SP DP2, distributed optimizer, both overlapped, selective recompute", 4,
             [TP2, SP, DISTRIBUTED, *OVERLAP, GATHER, "training.recompute=selective"]),
            ("PP2 VPP2, full recompute", 2, [PP2, VPP2, "training.recompute=full"]),
            ("TP2 SP PP2 DP2, distributed optimizer", 8, [TP2, SP, PP2, DISTRIBUTED]),
            ("TP2 SP PP2 VPP2 DP2, distributed optimizer", 8, [TP2, SP, PP2, VPP2, DISTRIBUTED]),
            ("TP2 SP PP2 CP2", 8, [TP2, SP, PP2, CP2]),
            ("TP2 SP PP2 VPP2 CP2, tied, distributed optimizer", 8,
             [TIED, TP2, SP, PP2, VPP2, CP2, DISTRIBUTED]),
            ("TP2 CP2 DP2, documents masked, micro-batch 2, distributed optimizer", 8,
             [MASKED, TP2, CP2, MB2, DISTRIBUTED]),
            ("CP8", 8, ["parallel.context=8"]),
            ("PP4 VPP2 DP2, distributed optimizer", 8, [PP4, VPP2, DISTRIBUTED]),
        ]
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is compared."""

    records: list[dict]
    parameters: dict[str, torch.Tensor]  # "STEP KEY"
    samples: torch.Tensor  # [steps x batch, sequence], in the order of training
    predictions: list[str]  # of the retrieval task, measured in training


@pytest.fixture(scope="module")
def eod_corpus(corpus: Path) -> Path:
    """The corpus with an id after each document."""
    folder = corpus.parent
    command = ["tokenize", folder / "docs.jsonl", "--tokenizer", folder / "tokenizer.model"]
    run_to_its_end([sys.executable, "-m", "data_tools", *command, "--append-eod",
                    "--output", folder / "with_eod"])  # fmt: skip
    return folder / "with_eod"


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, eod_corpus: Path):
    """A run of the model in a layout; those on one process are kept."""
    kept: dict[tuple[str, ...], Run] = {}
    folder = tmp_path_factory.mktemp("layouts")
    file = folder / "run.yaml"
    file.write_text(
        f"""\
model: {{num_layers: 8, hidden_size: 64, ffn_hidden_size: 96, num_heads: 8, vocab_size: 512}}
rope: {{base: 1e4, bound: "off"}}
data:
  {{num_workers: 0, corpora: {{stdlib: {{path: {eod_corpus}}}}}, validation_fraction: 0.1}}
training:
  sequence_length: {LENGTH}
  global_batch_size: {BATCH}
  micro_batch_size: 1
  steps: {STEPS}
optimizer: {{lr: 1e-3}}
precision: {{dtype: fp32}}
evaluation:
  {{batches: 2, tasks: [perplexity, passkey], lengths: [70, 400], depths: 2, samples: 1,
    max_tokens: 1200}}
checkpoint: {{interval: {STEPS // 2}}}
logging: {{interval: 1}}
"""
    )

    def run(processes: int, settings: list[str]) -> Run:
        key = tuple(settings)
        if processes == 1 and key in kept:
            return kept[key]
        run_dir = folder / f"run_{len(list(folder.iterdir()))}"
        arguments = [file, f"training.run_dir={run_dir}", *MODEL, *settings]
        script = ROOT / "tests/distributed/recorded.py"
        run_to_its_end(launch(run_dir / "tokens", *arguments, processes=processes, script=script))
        micro_batch = 2 if MB2 in settings else 1
        made = Run(
            metrics(run_dir),
            {
                f"{step} {key}": weight
                for step in (STEPS // 2, STEPS)  # in the middle of the run, and validated
                for key, weight in parameters_of(run_dir / f"checkpoints/step_{step:08d}").items()
            },
            samples_of(run_dir / "tokens", micro_batch),
            predictions_of(run_dir / f"evaluation/in_training/step_{STEPS:08d}/passkey.json"),
        )
        if processes == 1:
            kept[key] = made
        return made

    return run


@pytest.fixture(scope="module")
def table():
    """Rows of the table, printed at the end."""
    rows: list[tuple[str, int, float, float, float]] = []
    yield rows
    print("\n| layout | processes | loss | gradient norm | parameters |\n" + "| --- " * 5 + "|")
    for name, processes, *differences in rows:
        print(f"| {name} | {processes} |", " | ".join(f"{x:.0e}" for x in differences), "|")


@pytest.mark.parametrize(
    ("name", "processes", "settings"),
    LAYOUTS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layout_trains_as_one_process_does(
    name: str, processes: int, settings: list[str], train, table: list
) -> None:
    model = [s for s in settings if s.startswith(("model.", "data.", "evaluation.", RAMPED))]
    reference, ours = train(1, model), train(processes, settings)
    assert torch.equal(ours.samples, reference.samples)  # the same tokens at the same place

    assert ours.predictions == reference.predictions

    worst = dict.fromkeys(("loss", "grad_norm", "validation_loss", *MEASURED), 0.0)
    assert (
        len(ours.records) == len(reference.records) >= STEPS + 3
    )  # the last validation, two tasks
    for a, b in zip(ours.records, reference.records, strict=True):
        for key in worst.keys() & b.keys():
            worst[key] = max(worst[key], abs(a[key] / b[key] - 1))
    assert ours.parameters.keys() == reference.parameters.keys()
    apart = max(
        ((ours.parameters[key] - x).norm() / x.norm()).item()
        for key, x in reference.parameters.items()
    )
    grad_norm = worst.pop("grad_norm")
    table.append((name, processes, max(worst.values()), grad_norm, apart))
    assert max(*worst.values(), grad_norm, apart) < TOLERANCE, (worst, grad_norm, apart)


def parameters_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the whole model, float32, as PyTorch's own reader finds it."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size") and not key.startswith(("optimizer.", "rng."))
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def predictions_of(results: Path) -> list[str]:
    """What the model said to each prompt."""
    lengths = json.loads(results.read_text())["lengths"]
    return [record["prediction"] for entry in lengths for record in entry["records"]]


def samples_of(folder: Path, micro_batch: int) -> torch.Tensor:
    """What the model saw, sample after sample; every stage, chunk and tensor-parallel rank must
    have seen the same."""
    ranks = [torch.load(file) for file in folder.glob("*.pt")]
    data = 1 + max(rank["place"]["data"] for rank in ranks)
    number = data * len(ranks[0]["chunks"][0])
    whole = torch.full((number, LENGTH), -1)
    for rank in ranks:
        place = rank["place"]
        samples = torch.arange(number).view(-1, data, micro_batch)[:, place["data"]].flatten()
        # Chunk i of the sequence and its mirror image belong to context-parallel rank i.
        chunks = torch.arange(LENGTH).chunk(2 * place["contexts"])
        columns = torch.cat((chunks[place["context"]], chunks[-1 - place["context"]]))
        columns = columns if place["contexts"] > 1 else torch.arange(LENGTH)
        for tokens in rank["chunks"].values():
            before = whole[samples[:, None], columns]
            assert torch.all((before == -1) | (before == tokens))
            whole[samples[:, None], columns] = tokens
    assert torch.all(whole >= 0)
    return whole


def run_to_its_end(command: list) -> None:
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("recompute", [pytest.param("selective", marks=slow), "full"])
def test_recomputed_activations_change_no_number(recompute: str, train) -> None:
    again = train(1, [f"training.recompute={recompute}"])
    for a, b in zip(again.records, train(1, []).records, strict=True):
        assert a.get("loss") == b.get("loss")


def test_wrong_number_of_processes_is_refused_in_one_sentence(config_file: Path) -> None:
    printed = pretrain(config_file, "parallel.tensor=2", code=2)
    assert "1 processes were started" in printed or "world size" in printed.lower()
    assert "Traceback" not in printed
