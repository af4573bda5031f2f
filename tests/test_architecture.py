"""The house's own rules: a short way for a batch, one way for imports, one room for patches."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The files that a batch passes from disk to the optimizer step, in its order.
WAY_OF_A_BATCH = [
    "pretrain.py",
    "megatron_ext/training/loop.py",
    "megatron_ext/data/blend.py",
    "megatron_ext/training/step.py",
    "megatron_ext/model/llama.py",
    "megatron_ext/model/layers.py",
]

# Folder by folder, a room may import those after it and never one before it.
ORDER = [
    {"cli"},
    {"study", "planning", "jobs"},
    {"evaluation", "training"},
    {"checkpoint", "model", "data"},
    {"world", "cpu", "launch"},
    {"config"},
    {"rope"},
    {"errors", "gpu_packages"},
]


def modules() -> list[Path]:
    return [p for p in sorted((ROOT / "megatron_ext").rglob("*.py")) if p.name != "__init__.py"]


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return found


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def level(name: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if name in rooms)


def test_the_way_of_a_batch_is_short() -> None:
    assert len(WAY_OF_A_BATCH) <= 6
    assert sum(len((ROOT / f).read_text().splitlines()) for f in WAY_OF_A_BATCH) <= 1500


def test_the_loop_fits_on_one_screen() -> None:
    tree = ast.parse((ROOT / "megatron_ext/training/loop.py").read_text())
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno - loop.lineno + 1 <= 80


@pytest.mark.parametrize("file", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    here = file.relative_to(ROOT / "megatron_ext").parts[0].removesuffix(".py")
    for name in imports(file):
        if name.startswith("megatron_ext.") and room(name) not in ("", here):
            assert level(room(name)) >= level(here), f"{here} imports {name}"
        assert name != "pretrain"


def test_data_tools_stands_alone() -> None:
    for file in (ROOT / "data_tools").rglob("*.py"):
        for name in imports(file):
            assert name.split(".")[0] not in ("megatron_ext", "megatron", "torch", "transformers")


@pytest.mark.parametrize(
    "module",
    [
        "megatron_ext.config",
        "megatron_ext.rope.bound",
        "megatron_ext.rope.frequencies",
        "megatron_ext.checkpoint.manifest",
        "megatron_ext.checkpoint.huggingface",
        "megatron_ext.evaluation.retrieval",
        "megatron_ext.planning.preflight",
        "megatron_ext.training.status",
        "megatron_ext.jobs.__main__",
        "megatron_ext.cli",
        "data_tools.cli",
    ],
)
def test_module_works_without_torch(module: str) -> None:
    code = (
        f"import sys; sys.modules['torch'] = None; import {module}; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_only_two_files_patch_megatron_or_torch() -> None:
    """They assign to attributes of an imported module, and nothing else does."""
    for file in [*modules(), ROOT / "pretrain.py"]:
        if file.name in ("cpu.py", "weight_gradient.py"):
            continue
        tree = ast.parse(file.read_text())
        imported = {
            (name.asname or name.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in node.names
        }
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Attribute):
                    root: ast.expr = target
                    while isinstance(root, ast.Attribute):
                        root = root.value
                    patched = isinstance(root, ast.Name) and root.id in imported
                    assert not patched, f"{file.name}:{target.lineno} patches an import"
