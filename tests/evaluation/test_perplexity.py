"""Perplexity against a plain loop over transformers' Llama, in every layout; its results file."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.evaluation.perplexity import make_plan, measure, windows
from megatron_ext.evaluation.subject import find_subject
from tests.conftest import ROOT, TORCHRUN, environment
from tests.evaluation.conftest import hugging_face, opened

LENGTHS = (32, 64, 160)


def evaluate(*arguments: object, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    launcher: list[str] = []
    if processes > 1:
        launcher = [*TORCHRUN, "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "megatron_ext.cli", "evaluate"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    return done


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=4), st.integers(2, 120), st.integers(1, 60)
)
def test_every_token_but_the_first_is_scored_once(
    documents: list[int], length: int, stride: int
) -> None:
    stride = min(stride, length // 2)
    seen: Counter[tuple[int, int]] = Counter()
    for window in windows(documents, length, stride):
        assert window.end - window.begin <= length
        assert window.begin == 0 or window.begin < window.scored
        seen.update((window.document, t) for t in range(max(1, window.scored), window.end))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(documents) - len(documents)


def test_perplexity_is_that_of_a_loop_over_transformers(run: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    plan = make_plan(find_subject(run), LENGTHS)
    with opened(run) as scorer:
        results = measure(plan, scorer)
        model = hugging_face(scorer, run)
    for entry in results["lengths"]:
        window, stride = entry["length"], min(16, entry["length"] // 2)
        documents = []
        for document in plan.documents:
            ids = torch.from_numpy(np.asarray(document, dtype=np.int64))
            losses, previous = [], 1
            for begin in range(0, len(ids), stride):
                end = min(begin + window, len(ids))
                with torch.no_grad():
                    logits = model(ids[None, begin:end]).logits[0]
                for t in range(previous, end):
                    row = logits[t - 1 - begin].double()
                    losses.append((row.logsumexp(0) - row[ids[t]]).item())
                previous = end
                if end == len(ids):
                    break
            documents.append(losses)
        every = [loss for losses in documents for loss in losses]
        assert entry["tokens_scored"] == len(every)
        assert entry["documents"] == len(documents)
        assert entry["token_weighted_perplexity"] == pytest.approx(np.exp(np.mean(every)), rel=1e-5)
        assert entry["mean_document_perplexity"] == pytest.approx(
            np.mean([np.exp(np.mean(losses)) for losses in documents]), rel=1e-5
        )
        bins = entry["loss_by_position"]
        first = [loss for losses in documents for loss in losses[: window - 1]]
        assert sum(b["tokens"] for b in bins) == len(first)
        assert sum(b["tokens"] * b["loss"] for b in bins) == pytest.approx(sum(first), rel=1e-5)
    assert json.loads((run / "evaluation/perplexity.json").read_text()) == results


def test_a_folder_scores_as_the_run_that_it_was_exported_from(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from megatron_ext.checkpoint.huggingface import export_hf

    (run / "own.txt").write_text("def answer():\n    return 42\n" * 60)
    with opened(run) as scorer:
        ours = measure(make_plan(find_subject(run), [32, 64], text=[run / "own.txt"]), scorer)
    export_hf(run, tmp_path / "hf", lengths=[32])
    plan = make_plan(find_subject(tmp_path / "hf"), [32, 64], 16, 1500, [run / "own.txt"])
    with opened(tmp_path / "hf") as scorer:
        theirs = measure(plan, scorer)
    assert theirs["text"] == ours["text"]
    for a, b in zip(theirs["lengths"], ours["lengths"], strict=True):
        assert a["token_weighted_perplexity"] == pytest.approx(b["token_weighted_perplexity"])
    # A model that wants a BOS gets it before every window, and the same tokens are scored.
    settings = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings))
    with_bos = make_plan(find_subject(tmp_path / "hf"), [32, 64], 16, 1500, [run / "own.txt"])
    assert with_bos.header["settings"]["bos"] == 1
    with opened(tmp_path / "hf") as scorer:
        bos = measure(with_bos, scorer)
    for a, b in zip(bos["lengths"], ours["lengths"], strict=True):
        assert a["tokens_scored"] == b["tokens_scored"]
        assert a["loss"] != pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        pytest.param(4, ("--tensor", 2, "--pipeline", 2), marks=pytest.mark.slow),
        (2, ("--tensor", 2)),
        (2, ()),
    ],
    ids=["tensor 2 x pipeline 2", "tensor 2", "data 2"],
)
def test_every_layout_gives_the_same(run: Path, alone: dict, processes: int, layout: tuple) -> None:
    answer = evaluate(run, "--lengths", "32,160", "--json", *layout, processes=processes).stdout
    results = json.loads(answer)
    for entry, expected in zip(results["lengths"], alone["lengths"], strict=True):
        for key in ("length", "tokens_scored", "documents", "windows"):
            assert entry[key] == expected[key]
        for key in ("token_weighted_perplexity", "mean_document_perplexity", "loss"):
            assert entry[key] == pytest.approx(expected[key], rel=1e-5)


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The results of one process."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("alone") / "run"))
    with opened(run) as scorer:
        return measure(make_plan(find_subject(run), [32, 160]), scorer)


class Uniform:
    """A model that knows nothing: every token costs ln(512)."""

    part, parts, is_main = 0, 1, True

    def __init__(self) -> None:
        self.calls = 0

    def score(self, tokens: np.ndarray):
        self.calls += 1
        shape = (len(tokens), tokens.shape[1] - 1)

        class Scores:
            log_probs = np.full(shape, -np.log(512), dtype=np.float64)

        return Scores

    def total(self, parts: np.ndarray) -> np.ndarray:
        return parts


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(run: Path) -> None:
    for entry in measure(make_plan(find_subject(run), LENGTHS), Uniform())["lengths"]:
        assert entry["token_weighted_perplexity"] == pytest.approx(512)
        assert entry["mean_document_perplexity"] == pytest.approx(512)
        assert all(b["loss"] == pytest.approx(np.log(512)) for b in entry["loss_by_position"])


def test_what_is_there_is_not_computed_again(run: Path) -> None:
    first = measure(make_plan(find_subject(run), [32, 160]), Uniform())
    again = make_plan(find_subject(run), [160, 32])
    assert again.missing == []
    assert again.results == first
    # A shorter length joins what is there, on the same texts.
    assert make_plan(find_subject(run), [64]).missing == [64]
    assert measure(make_plan(find_subject(run), [64]), Uniform())["text"] == first["text"]
    # Anything that changes what is measured begins anew.
    assert make_plan(find_subject(run), [32, 160], stride=8).missing == [32, 160]
    assert make_plan(find_subject(run), [32, 160], max_tokens=900).missing == [32, 160]
    assert make_plan(find_subject(run), [32, 320]).missing == [32, 320]
    manifest = next((run / "checkpoints").glob("step_*/manifest.json"))
    manifest.write_text(manifest.read_text() + "\n")
    assert make_plan(find_subject(run), [32, 160]).missing == [32, 160]


def test_interrupted_after_a_length_it_goes_on_with_the_next(run: Path) -> None:
    class Interrupted(Uniform):
        def score(self, tokens: np.ndarray):
            if tokens.shape[1] == 32:
                raise KeyboardInterrupt
            return super().score(tokens)

    with pytest.raises(KeyboardInterrupt):
        measure(make_plan(find_subject(run), LENGTHS), Interrupted())
    assert make_plan(find_subject(run), LENGTHS).missing == [32]


def test_own_texts_are_read_with_the_runs_tokenizer(run: Path, corpus: Path) -> None:
    from data_tools.tokenizer import load_tokenizer

    text = "def answer():\n    return 42\n" * 40
    (run / "own.txt").write_text(text)
    plan = make_plan(find_subject(run), [32], text=[run / "own.txt"])
    ids = load_tokenizer(corpus.parent / "tokenizer.model").encode(text)
    assert plan.documents[0].tolist() == ids[:64].tolist()
    assert plan.output == run / "evaluation/perplexity-own.json"


def test_short_documents_are_said_to_be_short(run: Path) -> None:
    (run / "own.txt").write_text("a few words only")
    plan = make_plan(find_subject(run), [1024], text=[run / "own.txt"])
    assert "no document reaches 1024 tokens" in plan.header["text"]["notes"][0]


def test_validation_documents_are_those_that_training_left_out(run: Path, corpus: Path) -> None:
    """Megatron-Core's own split, read through the data sets that training uses."""
    from megatron_ext.config import load_config
    from megatron_ext.data.blend import build_datasets
    from megatron_ext.evaluation.texts import validation_texts

    config = load_config(run / "config.yaml", [f"data.cache_dir={run / 'cache'}"])
    with opened(run):
        _, validation = build_datasets(config)
    theirs = validation.datasets[0] if hasattr(validation, "datasets") else validation
    documents = [theirs.dataset.get(int(i)) for i in sorted(set(theirs.document_index))]
    ours = validation_texts(config).documents
    assert [d.tolist() for d in ours] == [d.tolist() for d in documents]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist: name a run folder"),
        (
            ["{run}", "--tasks", "chess"],
            "--tasks chess is unknown: choose all or some of perplexity",
        ),
        (["{run}", "--lengths", "1k"], "--lengths 1k is no list of whole numbers"),
        (["{run}", "--lengths", "1"], "--lengths 1 is too small: write 2 or more"),
        (["{run}", "--text", "missing.txt"], "--text missing.txt does not exist"),
        (["{run}", "--tensor", "3"], "parallel.tensor=3 does not divide"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(trained: Path, arguments: list[str], sentence: str) -> None:
    done = evaluate(*(a.format(run=trained) for a in arguments), code=2)
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {sentence}")
    assert not (trained / "evaluation").exists()
