"""python -m tests.simulated_gpu COMMAND ...: see runtime.py."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.simulated_gpu.runtime import build, environment

if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("usage: python -m tests.simulated_gpu COMMAND ...", file=sys.stderr)
        sys.exit(2)
    capability = os.environ.get("SIMULATED_GPU_CAPABILITY", "8.0")
    with tempfile.TemporaryDirectory() as folder:
        here = environment(build(Path(folder)), capability)
        sys.exit(subprocess.run(sys.argv[1:], env=here).returncode)
