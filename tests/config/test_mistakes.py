"""A user's mistakes: one sentence with place, value, rule and fix, exit code 2, nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from tests.config.conftest import VALID
from tests.conftest import ROOT


def replaced(old: str, new: str) -> str:
    assert old in VALID
    return VALID.replace(old, new)


# What is written in the file, overrides, and what the sentence must hold.
MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "typo": (
        replaced("num_layers", "num_layer"),
        [],
        ["run.yaml:2", "model.num_layer", "did you mean model.num_layers?"],
    ),
    "typo of a section": (
        replaced("rope:", "ropes:"), [], ["run.yaml:7", "ropes is no setting", "rope"],
    ),
    "setting of another section": (
        VALID + "  seed: 3\n", [], ["run.yaml:16", "did you mean training.seed?"],
    ),
    "wrong type": (
        replaced("num_layers: 4", "num_layers: four"),
        [],
        ["run.yaml:2", "model.num_layers=four must be a whole number above 0"],
    ),
    "fraction where a count is wanted": (
        replaced("steps: 100", "steps: 100.5"),
        [],
        ["training.steps=100.5 must be a whole number above 0"],
    ),
    "quoted number": (
        replaced("base: 1e4", "base: '1e4'"), [], ["run.yaml:8", "write it without quotes"],
    ),
    "true is not 1": (
        replaced("num_layers: 4", "num_layers: true"), [], ["model.num_layers=true must be"],
    ),
    "yes is not true": (VALID, ["parallel.sequence=yes"], ["must be true or false"]),
    "indivisible heads": (
        VALID, ["parallel.tensor=3"],
        ["parallel.tensor=3 does not divide model.num_heads=4: choose 1, 2 or 4"],
    ),
    "indivisible batch": (
        VALID, ["training.micro_batch_size=3"], ["global_batch_size=8", "choose 9"],
    ),
    "negative learning rate": (
        replaced("lr: 1e-3", "lr: -1e-3"),
        [],
        ["run.yaml:15", "optimizer.lr=-1e-3 must be a number above 0"],
    ),
    "unknown base file": ("base: no_such.yaml\n" + VALID, [], ["run.yaml:1", "no_such.yaml"]),
    "rope's base at the top": ("base: 1e4\n" + VALID, [], ["run.yaml:1", "under `rope:`"]),
    "cycle": ("base: run.yaml\n" + VALID, [], ["inherits from itself"]),
    "unreadable YAML": (replaced("  base: 1e4", "  base: [1e4"), [], ["not readable as YAML"]),
    "tab": (VALID + "\tbeta1: 0.5\n", [], ["run.yaml:16", "not readable as YAML"]),
    "duplicate key": (VALID + "  lr: 2e-3\n", [], ["run.yaml:16", "after line 15: keep one"]),
    "a list": ("- model\n- rope\n", [], ["holds a list at its top level"]),
    "empty": ("", [], ["run.yaml is empty"]),
    "missing setting": (
        replaced("  vocab_size: 2048\n", ""),
        [],
        ["run.yaml:1", "model.vocab_size is missing", "vocab_size: 32000"],
    ),
    "missing section": (
        replaced("rope:\n  base: 1e4\n", ""), [], ["rope.base is missing", "500000"],
    ),
    "base below the bound": (
        VALID, ["rope.base=100"],
        ["rope.base=100 does not support training.sequence_length=256", "m=46", "1412.4"],
    ),
    "base above the bound, but demanded to be below": (
        VALID, ["rope.bound=expect_violation"], ["rope.base=10000 supports", "lower the base"],
    ),
    "not finite": (VALID, ["rope.base=.inf"], ["rope.base=.inf must be a number above 1"]),
    "unknown rule": (
        VALID, ["rope.scaling={type: yarnn}"], ["rope.scaling.type=yarnn", "did you mean yarn?"],
    ),
    "parameter of no rule": (
        VALID, ["rope.scaling={type: linear, factor: 2, beta_fast: 3}"],
        ["rope.scaling.beta_fast is no setting", "of type linear has type, factor"],
    ),
    "rule without a parameter": (
        VALID, ["rope.scaling.type=linear"], ["rope.scaling.factor is missing"],
    ),
    "parameter out of its rule's range": (
        VALID, ["rope.scaling={type: linear, factor: 0.5}"], ["factor=0.5 must be at least 1"],
    ),
    "unknown choice": (
        VALID, ["schedule.type=cosin"], ["cosine, linear, constant, wsd", "did you mean cosine?"],
    ),
    "section that is no mapping": (VALID, ["model=7"], ["model=7 must be a mapping of settings"]),
    "item of a list": (VALID, ["evaluation.lengths=[8, x]"], ["lengths.1=x must be a whole num"]),
    "list expected": (VALID, ["evaluation.lengths=8"], ["must be a list, each a whole number"]),
    "override without =": (VALID, ["rope"], ["override 'rope' is not of the form"]),
    "override without a value": (VALID, ["rope.base="], ["override 'rope.base=' has no value"]),
    "override of base": (VALID, ["base=5e5"], ["write rope.base=5e5"]),
    "corpus without a path": (VALID, ["data.corpora.a.weight=2"], ["data.corpora.a.path is mis"]),
    "missing corpus": (VALID, ["data.corpora.a.path=x"], ["x.bin"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def poisoned_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose torch cannot be imported: whoever tries ends with a traceback."""
    folder = tmp_path_factory.mktemp("poison")
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    return folder


def check(poison: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The real entry point, on a machine whose torch does not work."""
    return subprocess.run(
        [sys.executable, str(ROOT / "pretrain.py"), *map(str, arguments), "--check"],
        env={**os.environ, "PYTHONPATH": f"{poison}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# Those that also go through the entry point; what it adds is the same for all of them.
AT_THE_ENTRANCE = [
    "typo", "wrong type", "quoted number", "indivisible heads", "indivisible batch",
    "negative learning rate", "unknown base file", "cycle", "unreadable YAML", "duplicate key",
    "a list", "empty", "missing setting", "base below the bound", "unknown rule",
    "override without =", "missing corpus",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MISTAKES if name != "missing corpus"])
def test_a_mistake_is_one_sentence_with_place_rule_and_fix(name: str, tmp_path: Path) -> None:
    text, overrides, expected = MISTAKES[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", AT_THE_ENTRANCE)
def test_a_mistake_ends_pretrain_with_exit_code_2_and_no_traceback(
    name: str, tmp_path: Path, poisoned_torch: Path
) -> None:
    text, overrides, expected = MISTAKES[name]
    file = tmp_path / "run.yaml"
    file.write_text(text)
    done = check(poisoned_torch, file, *overrides)
    shown = done.stdout + done.stderr
    assert done.returncode == 2, shown
    assert "Traceback" not in shown
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    if name != "missing corpus":  # which stands at the end of a whole report
        assert done.stdout == "" and done.stderr.splitlines() == errors
    for part in expected:
        assert part in errors[0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "valud.yaml", "does not exist; is it"),
        (lambda folder: folder, "is a folder: name a config file"),
        (lambda folder: folder / "binary.yaml", "is not UTF-8 text (byte 0xff at 3)"),
    ],
)
def test_a_file_that_is_none(make, expected: str, tmp_path: Path, poisoned_torch: Path) -> None:
    (tmp_path / "valid.yaml").write_text(VALID)
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    done = check(poisoned_torch, make(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and expected in done.stderr


def test_the_unbroken_file_passes_without_torch(tmp_path: Path, poisoned_torch: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(VALID)
    done = check(poisoned_torch, file)
    assert (done.returncode, done.stderr) == (0, "")


def test_torch_is_poisoned(poisoned_torch: Path) -> None:
    """The checks above can fail."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "PYTHONPATH": str(poisoned_torch)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "torch was imported" in done.stderr


def test_a_mistake_in_an_inherited_file_is_placed_there(tmp_path: Path) -> None:
    (tmp_path / "lower.yaml").write_text(VALID.replace("lr: 1e-3", "lr: 0"))
    (tmp_path / "upper.yaml").write_text("base: lower.yaml\nrope: {base: 2e4}\n")
    with pytest.raises(ConfigError, match=r"lower.yaml:15: optimizer.lr=0 must be"):
        load_config(tmp_path / "upper.yaml")


def test_of_several_mistakes_the_misspelt_name_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(VALID.replace("lr:", "learning_rate:").replace("base: 1e4", "base: -1"))
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate is no setting.*first of 3"):
        load_config(file)
