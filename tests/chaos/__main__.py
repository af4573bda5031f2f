"""Kill a training run at random moments, start it again, and compare it with one left alone.

    make chaos ROUNDS=100                       or: python -m tests.chaos --rounds 100 --seed 7

A round starts the same command on the same run folder (2 processes under torchrun, data parallel,
distributed optimizer), waits for a moment (start-up, a step, a save, an evaluation) and strikes:
SIGKILL to one rank, to all processes or to the launcher, SIGTERM to the launcher, SIGSTOP to a rank
and then SIGCONT or SIGKILL. What is left of the processes is killed, as a cluster does. It survived
when every number logged so far is that of the run left alone and the next start goes on. At the end
the last checkpoint must hold the same bits. Exit code 1 when anything differs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.rounds import chaos, write_config
from tests.conftest import make_corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"seed {options.seed}", flush=True)
        report = chaos(
            folder, write_config(folder, make_corpus(folder)), options.rounds, options.seed
        )
    print(report.text())
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
