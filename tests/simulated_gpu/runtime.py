"""A GPU that is not there: build the library of runtime.c and run a command on it.

    python -m tests.simulated_gpu python pretrain.py run.yaml       # with a CUDA build of torch

Device placement, allocations, launches, graphs of calls and what torch.compile makes of them are
those of a GPU; no kernel computes anything, so every number is meaningless. For finding mistakes
and for counting, not for results. Needs gcc, and the headers that torch's CUDA wheels bring.
"""

import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ["cuda_runtime_api.h", "cuda.h", "cublas_api.h", "cublasLt.h", "nccl.h"]

# The wheels lack this one; without it the others say of a function where it runs.
HOST_DEFINES = """\
#pragma once
#define __no_return__ __attribute__((noreturn))
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __location__(place)
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define CUDARTAPI
#define CUDARTAPI_CDECL
"""


def build(folder: Path) -> Path:
    """Compile it into the folder; returns the library. Raises RuntimeError with what is missing."""
    include = _include_folders()
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    (folder / "crt/host_defines.h").write_text(HOST_DEFINES)
    # Whatever is declared and not defined in runtime.c does nothing and succeeds.
    names = sorted(_declared(include))
    stubs = "".join(
        f'int {name}(void) __attribute__((weak, alias("nothing")));\n' for name in names
    )
    (folder / "rest.c").write_text("int nothing(void) { return 0; }\n" + stubs)
    library = folder / "libcuda.so.1"
    where = [f"-I{path}" for path in (folder, *include)]
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-w",
        *where,
        HERE / "runtime.c",
        folder / "rest.c",
    ]
    done = subprocess.run([*command, "-o", library, "-ldl"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gcc could not compile the simulated runtime: {done.stderr[:2000]}")
    return library


def environment(library: Path, capability: str = "8.0") -> dict[str, str]:
    """Of a process that sees the simulated GPU, of such a compute capability."""
    inherited = {name: x for name, x in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {
        **inherited,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),  # where Triton looks for libcuda.so.1
        "SIMULATED_GPU_CAPABILITY": capability,
    }


def _include_folders() -> list[Path]:
    import nvidia  # a namespace of torch's CUDA wheels

    found = [path for root in nvidia.__path__ for path in sorted(Path(root).glob("*/include"))]
    for header in HEADERS:
        if not any((path / header).exists() for path in found):
            raise RuntimeError(f"{header} is not among the wheels of torch's CUDA build")
    return found


def _declared(include: list[Path]) -> set[str]:
    names: set[str] = set()
    for header in HEADERS:
        text = next(path / header for path in include if (path / header).exists()).read_text()
        names |= set(re.findall(r"\b((?:cu[A-Z]|cuda[A-Z]|cublas[A-Z]|nccl[A-Z])\w*)\s*\(", text))
        # Names under which a function is linked: cuLinkCreate is cuLinkCreate_v2.
        names |= set(re.findall(r"#define\s+cu\w+\s+(cu\w+_v\d+)\b", text))
    return {name for name in names if not name.endswith("_t")}
