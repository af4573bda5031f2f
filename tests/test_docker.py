"""What is installed into NVIDIA's image, and which images are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("tomllib")  # python 3.11, as the images have


@pytest.mark.parametrize(
    ("torch", "engine", "refusal"),
    [
        ("2.10.0a0+b4e4ee81d3.nv26.01", "2.11.0+c188b533", ""),
        ("2.12.0a0+0291f960b6.nv26.05", "2.15.0+42d8402b", "has transformer-engine 2.15.0"),
        ("2.8.0a0+5228986c39.nv25.06", "2.10.0", "has torch 2.8.0a0"),
    ],
)
def test_an_image_of_another_transformer_engine_ends_the_build(
    torch: str, engine: str, refusal: str, tmp_path: Path
) -> None:
    for name, version in (("torch", torch), ("transformer_engine", engine)):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    done = subprocess.run(
        [sys.executable, ROOT / "docker/requirements.py"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    names = {line.split(">")[0] for line in done.stdout.splitlines()}
    if refusal:
        assert done.returncode == 1
        assert refusal in done.stderr and done.stderr.count("\n") == 1
    else:
        assert {"numpy", "xxhash", "transformers", "wandb", "numba"} <= names
        assert not {"torch", "megatron-core", "transformer-engine"} & names
