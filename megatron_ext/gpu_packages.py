"""Packages that hold nothing but GPU kernels: where there is no GPU they cannot be imported.

    hide()                       # once, before Megatron-Core: megatron_ext/__init__.py does it
    with shown():                # for `doctor`, which asks whether an installation is whole

Megatron-Core calls the kernels of what it can import on whatever tensors it is given; so on a login
node with NVIDIA's image, every run on the CPU and `pretrain.py --check` would end in a CUDA error.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

NAMES = frozenset({"transformer_engine", "apex", "amp_C"})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is installed, so that it is not said to be missing, and refuses to load it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in NAMES or _gpu():
            return None
        for finder in sys.meta_path:  # an editable installation has one of its own
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                spec.loader = self
                return spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError(
            f"{module.__name__} is for GPUs, and there is none", name=module.__name__
        )


_finder = _Finder()


def hide() -> None:
    """From now on, without a GPU, an import of one of NAMES raises ModuleNotFoundError."""
    sys.meta_path.insert(0, _finder)


@contextmanager
def shown() -> Iterator[None]:
    """Meanwhile they can be imported again. What was, stays so in this process."""
    sys.meta_path.remove(_finder)
    try:
        yield
    finally:
        hide()


def _gpu() -> bool:
    import torch  # whoever imports one of them has it already

    return torch.cuda.is_available()
