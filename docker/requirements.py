"""What NVIDIA's PyTorch image lacks of ours, one requirement a line; both recipes install it.

    python docker/requirements.py > /tmp/requirements.txt

The image's own torch and Transformer Engine stay: no package index has the one, and the other is
compiled against it. Ends the build where they are not the versions that pyproject.toml names.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

EXTRAS = ("hf", "report", "track", "data")
OF_THE_IMAGE = ("torch", "transformer-engine")


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for name in EXTRAS for line in extras[name]]
    requirements = [Requirement(line) for line in wanted + extras["gpu"]]
    for requirement in requirements:
        if requirement.name in OF_THE_IMAGE:
            check(requirement)
    # megatron-core is installed without what it asks for: torch, which is there.
    left_out = (*OF_THE_IMAGE, "megatron-core")
    print("\n".join(str(one) for one in requirements if one.name not in left_out))


def check(requirement: Requirement) -> None:
    """End the build unless the image has it. NVIDIA's builds are named as pre-releases."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not requirement.specifier.contains(found, prereleases=True):
        sys.exit(
            f"this image has {requirement.name} {found}, not {requirement.specifier}: build on "
            "another month's, with --build-arg IMAGE=nvcr.io/nvidia/pytorch:YY.MM-py3 (Apptainer: "
            "its line From)"
        )


if __name__ == "__main__":
    main()
