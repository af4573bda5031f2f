"""Verdicts of retrieval against transformers' greedy generation; its results file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.tokenizer import load_tokenizer
from megatron_ext.evaluation import perplexity
from megatron_ext.evaluation.prompts import Kit
from megatron_ext.evaluation.retrieval import (
    TASKS,
    Plan,
    _long_enough,
    make_plan,
    make_samples,
    measure,
)
from megatron_ext.evaluation.subject import find_subject
from tests.conftest import ROOT
from tests.evaluation.conftest import opened
from tests.evaluation.test_perplexity import Uniform, evaluate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads((ROOT / "megatron_ext/evaluation/results.schema.json").read_text())
ASKED = {"passkey": 300, "lines": 700}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, corpus: Path):
    """A Hugging Face folder whose model knows the answers to every fourth prompt by heart, and the
    model."""
    folder = tmp_path_factory.mktemp("learned")
    shutil.copy(corpus.parent / "tokenizer.model", folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=512, max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    known = [
        sample
        for task, length in ASKED.items()
        for _, sample in list(make_samples(plan_of(folder, task), length))[::4]
    ]
    for _ in range(60):
        right = 0
        for sample in known:
            ids = torch.tensor([sample.prompt + sample.answer])
            logits = model(ids[:, :-1], logits_to_keep=len(sample.answer)).logits[0]
            wanted = torch.tensor(sample.answer)
            right += bool((logits.argmax(-1) == wanted).all())
            torch.nn.functional.cross_entropy(logits, wanted).backward()
        if right == len(known):
            break
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder, model


def plan_of(folder: Path, task: str, **changes):
    asked = {"lengths": [ASKED.get(task, 300)], "depths": 2, "samples": 4, **changes}
    return make_plan(find_subject(folder), task, **asked)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_verdicts_are_those_of_greedy_generation(learned) -> None:
    folder, model = learned
    plans = {task: plan_of(folder, task) for task in ASKED}
    with opened(folder) as scorer:
        results = {task: measure(plan, scorer) for task, plan in plans.items()}
    verdicts = []
    for task, plan in plans.items():
        jsonschema.validate(results[task], SCHEMA)
        assert json.loads(plan.output.read_text()) == results[task]
        [entry] = results[task]["lengths"]
        samples = [sample for _, sample in make_samples(plan, ASKED[task])]
        for record, sample in zip(entry["records"], samples, strict=True):
            said = greedy(model, sample.prompt, len(sample.answer))
            assert record["correct"] == (said == sample.answer)
            same = [a == b for a, b in zip(said, sample.answer, strict=True)]
            until = len(said) if all(same) else same.index(False) + 1
            assert record["prediction"] == plan.kit.tokenizer.decode(said[:until]).strip()
            verdicts.append(record["correct"])
        assert entry["accuracy"] == np.mean([record["correct"] for record in entry["records"]])
        assert sum(cell["correct"] for cell in entry["depths"]) == entry["accuracy"] * 8
    assert 3 <= sum(verdicts) < len(verdicts)  # those known by heart, and not all


class Oracle:
    """Says what is in its book."""

    part, parts, is_main = 0, 1, True

    def __init__(self, said: dict[tuple[int, ...], list[int]]) -> None:
        self.said = said
        self.calls = 0

    def score(self, tokens: np.ndarray, last: int):
        self.calls += len(tokens)

        class Scores:
            argmax = np.array([self.said[tuple(row[:-last])] for row in tokens.tolist()])

        return Scores

    def total(self, parts: np.ndarray) -> np.ndarray:
        return parts


def test_a_wrong_token_anywhere_is_not_retrieved_and_ends_the_prediction(learned) -> None:
    plan = plan_of(learned[0], "passkey", seed=5)
    samples = [sample for _, sample in make_samples(plan, 300)]
    said = {tuple(s.prompt): list(s.answer) for s in samples}
    wrong = plan.kit.tokenizer.encode("x")[-1]
    for place, sample in enumerate(samples[:2]):
        said[tuple(sample.prompt)][-1 - place] = int(wrong)
    [entry] = measure(plan, Oracle(said))["lengths"]
    assert [record["correct"] for record in entry["records"]] == [False] * 2 + [True] * 6
    assert entry["records"][0]["prediction"] == entry["records"][0]["answer"][:-1] + "x"
    assert entry["records"][2]["prediction"] == entry["records"][2]["answer"]
    assert entry["depths"][0] == {"depth": 0.0, "samples": 4, "correct": 2}


def test_prompts_depend_on_the_tokenizer_and_the_seed_alone(learned, trained: Path) -> None:
    """Another model, other lengths and more samples leave a prompt what it was."""

    def prompts(plan, length: int = 320) -> list[list[int]]:
        return [sample.prompt for _, sample in make_samples(plan, length)]

    here = prompts(plan_of(learned[0], "passkey"))
    assert prompts(plan_of(trained, "passkey", lengths=[320, 400])) == here
    more = prompts(plan_of(trained, "passkey", samples=6))
    assert [*more[:4], *more[6:10]] == here
    assert prompts(plan_of(trained, "passkey", seed=2)) != here


def test_what_is_there_is_not_asked_again_and_an_interruption_loses_one_length(run: Path) -> None:
    class Interrupted(Oracle):
        def score(self, tokens: np.ndarray, last: int):
            if self.calls >= 8:
                raise KeyboardInterrupt
            return super().score(tokens, last)

    def plan():
        return plan_of(run, "passkey", lengths=[300, 310])

    said = {tuple(s.prompt): s.answer for n in (300, 310) for _, s in make_samples(plan(), n)}
    with pytest.raises(KeyboardInterrupt):
        measure(plan(), Interrupted(said))
    assert plan().missing == [310]
    oracle = Oracle(said)
    whole = measure(plan(), oracle)
    assert oracle.calls == 8
    assert [entry["length"] for entry in whole["lengths"]] == [300, 310]
    assert plan().missing == [] and plan().results == whole
    assert plan_of(run, "passkey", lengths=[300], seed=9).missing == [300]


def test_every_task_fits_the_schema_and_hides_facts_in_validation_documents(run: Path) -> None:
    for task in TASKS:
        plan = plan_of(run, task, lengths=[2400], samples=1)
        said = {tuple(s.prompt): s.answer for _, s in make_samples(plan, 2400)}
        results = measure(plan, Oracle(said))
        jsonschema.validate(results, SCHEMA)
        assert results["lengths"][0]["accuracy"] == 1.0
    jsonschema.validate(
        perplexity.measure(perplexity.make_plan(find_subject(run), [32, 64]), Uniform()), SCHEMA
    )
    broken = {**results, "lengths": [{**results["lengths"][0], "accuracy": 2}]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_command_asks_in_every_layout_and_of_a_folder(learned, tmp_path: Path) -> None:
    """Two tensor-parallel processes, and one that takes what they wrote."""
    folder = Path(shutil.copytree(learned[0], tmp_path / "folder"))
    options = ["--tasks", "passkey,ruler_niah_single_1", "--lengths", "64,600", "--depths", 2]
    options += ["--samples", 4]
    alone = evaluate(folder, *options, "--output", tmp_path / "alone", "--json")
    split = evaluate(folder, *options, "--tensor", 2, processes=2)
    assert "passkey: too short for its text and left out: 64 tokens" in alone.stderr
    assert "% retrieved at each depth" in split.stdout
    for result in json.loads(alone.stdout):
        again = json.loads((folder / f"evaluation/{result['task']}.json").read_text())
        assert again["lengths"] == result["lengths"]
    tokenizer = load_tokenizer(folder)
    assert result["settings"]["tokenizer"] == tokenizer.hash


def test_a_folder_without_text_is_asked_for_some(learned) -> None:
    from megatron_ext.errors import UserError

    with pytest.raises(UserError, match="name some by --text FILE"):
        plan_of(learned[0], "needle")
    with pytest.raises(UserError, match="name some by --text FILE"):
        perplexity.make_plan(find_subject(learned[0]), [64])


def test_every_sample_of_a_length_that_is_not_left_out_fits(corpus: Path) -> None:
    kit = Kit(load_tokenizer(corpus.parent / "tokenizer.model"))
    header = {"settings": {"depths": [0.0, 100.0], "samples": 6, "seed": 0}}
    plan = Plan(None, TASKS["passkey"], kit, Path(), header, {}, [])  # type: ignore[arg-type]
    fit = _long_enough(plan, range(100, 400))
    assert 100 not in fit and 399 in fit
    for length in fit:
        assert len(list(make_samples(plan, length))) == 12
