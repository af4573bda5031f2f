"""A checkpoint from a stranger can hold bad numbers, but it runs no code."""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.manifest import verify
from megatron_ext.checkpoint.storage import read_index
from megatron_ext.errors import UserError
from tests.checkpoint.folders import make_checkpoint, seal
from tests.checkpoint.tensors import tensors
from tests.conftest import ROOT, environment, pretrain


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def test_the_payload_is_a_real_one(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_pickles_for_other_tools_are_never_opened(tmp_path: Path, marker: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    good = tensors(folder)
    for name in (".metadata", "common.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    seal(folder)
    assert verify(folder) == []
    assert all(torch.equal(x, good[key]) for key, x in tensors(folder).items())
    assert not marker.exists()


def test_code_among_the_tensors_is_refused_and_not_run(tmp_path: Path, marker: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    torch.save(Payload(marker), folder / "__1_0.distcp")
    index = json.loads((folder / "tensors.json").read_text())
    for whole in index.values():
        for chunk in whole["chunks"]:
            chunk["file"] = "__1_0.distcp"
            chunk["at"] = [0, (folder / "__1_0.distcp").stat().st_size]
    (folder / "tensors.json").write_text(json.dumps(index))
    seal(folder)
    assert verify(folder) == []  # a checksum is no signature
    with pytest.raises(UserError, match="something else than tensors"):
        tensors(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../../etc/passwd"},
        {"file": "/etc/passwd"},
        {"file": "common.pt"},
        {"at": "everything"},
        {"offset": None},
    ],
    ids=str,
)
def test_index_that_names_anything_but_tensors_is_refused(tmp_path: Path, change: dict) -> None:
    folder = make_checkpoint(tmp_path, 5)
    index = json.loads((folder / "tensors.json").read_text())
    index["a.weight"]["chunks"][0].update(change)
    (folder / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"tensors\.json"):
        read_index(folder)


def test_type_of_numbers_must_be_one(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 5)
    text = (folder / "tensors.json").read_text().replace('"float32"', '"load"')
    (folder / "tensors.json").write_text(text)
    with pytest.raises(UserError, match="no type of numbers"):
        read_index(folder)


@pytest.mark.slow
def test_every_command_refuses_code_and_runs_none(
    config_file: Path, tmp_path: Path, marker: Path
) -> None:
    short = [config_file, "training.steps=2"]
    pretrain(*short)
    run_dir = tmp_path / "run"
    (folder,) = (run_dir / "checkpoints").iterdir()
    torch.save(Payload(marker), folder / "__0_0.distcp")
    size = (folder / "__0_0.distcp").stat().st_size
    for name in (".metadata", "common.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    index = json.loads((folder / "tensors.json").read_text())
    for whole in index.values():
        for chunk in whole["chunks"]:
            chunk["at"] = [0, size]
    (folder / "tensors.json").write_text(json.dumps(index))
    seal(folder)
    fresh = [f"training.init_from={run_dir}", f"training.run_dir={tmp_path / 'fresh'}"]
    printed = [pretrain(*short, code=2), pretrain(*short, *fresh, code=2)]
    for words, code in ((["evaluate", run_dir], 2), (["checkpoint", "inspect", run_dir], 0)):
        command = [sys.executable, "-m", "megatron_ext.cli", *map(str, words)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        printed += [done.stderr] if code else []
    assert all("something else than tensors" in text for text in printed), printed
    assert not any("Traceback" in text for text in printed)
    assert not marker.exists()


def test_no_other_way_in_opens_a_pickle() -> None:
    """Whatever reads a checkpoint goes through storage.py: nothing else calls a loader."""
    for file in [*(ROOT / "megatron_ext").rglob("*.py"), ROOT / "pretrain.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                unsafe = {"pickle.load", "pickle.loads", "dist_checkpointing.load"}
                assert call not in unsafe, f"{file}:{node.lineno}"
                only_weights = any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True"
                    for word in node.keywords
                )
                assert call != "torch.load" or only_weights, f"{file}:{node.lineno}"
