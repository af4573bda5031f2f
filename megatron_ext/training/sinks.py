"""Where the records of a run go: metrics.jsonl always, TensorBoard and Weights & Biases if wanted.

    for sink in open_sinks(config, done_steps):
        sink.write({"step": 12, "loss": 2.5})
        sink.close()

A sink takes flat records with a `step`. One that fails on the way (a full disk, no network) raises;
the journal warns of it once, and training goes on.
"""

import json
import logging
import math
import os
import threading
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_tools.files import write_file
from megatron_ext.config import Config

log = logging.getLogger(__name__)

Record = dict[str, Any]


class Sink(Protocol):
    """Takes records; `close` leaves nothing unwritten."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def open_sinks(config: Config, done_steps: int) -> list[Sink]:
    """Those that the config asks for, without what they hold of steps after `done_steps`."""
    run_dir = config.training.run_dir
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", done_steps)]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(run_dir / "tensorboard", done_steps))
    if config.logging.wandb is not None:
        sinks.append(WeightsAndBiases(config))
    return sinks


class JsonLines:
    """One JSON object a line; a resumed run drops those after its checkpoint, so that the file
    holds each step once."""

    def __init__(self, file: Path, done_steps: int) -> None:
        if file.is_file():
            _drop_records_after(file, done_steps)
        self.file = file.open("a", buffering=1)

    def write(self, record: Record) -> None:
        # JSON knows no NaN: a loss that is none is null.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Numbers as scalars, into a folder."""

    def __init__(self, folder: Path, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=done_steps + 1)

    def write(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Numbers into a run of the project logging.wandb. Without a key, or with WANDB_MODE=offline,
    into runs/NAME/wandb, from where `wandb sync` sends them, and so too where the server refuses or
    is not reached; a run goes on under its old id."""

    def __init__(self, config: Config) -> None:
        import wandb

        run_dir = config.training.run_dir
        offline = "WANDB_API_KEY" not in os.environ and not _has_login()
        id_file = run_dir / "wandb_id"
        if not id_file.is_file():
            id_file.write_text(uuid.uuid4().hex[:8])
        begin = partial(
            wandb.init,
            project=config.logging.wandb,
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )
        self.patience_s = config.faults.hang_timeout_s / 2
        try:
            mode = os.environ.get("WANDB_MODE", "offline" if offline else "online")
            self.run = begin(mode=mode)
        except Exception as error:
            log.warning("Weights & Biases goes on offline: %s", error)
            wandb.teardown()  # whose service still holds the id
            self.run = begin(mode="offline")

    def write(self, record: Record) -> None:
        self.run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        # Sends what is left, for ever if the server is gone; the folder keeps it for `wandb sync`.
        finishing = threading.Thread(target=self.run.finish, daemon=True)
        finishing.start()
        finishing.join(self.patience_s)


def _numbers(record: Record) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, (bool, int, float))
    }


def _has_login() -> bool:
    """Whether `wandb login` left a key on this machine, where it always does."""
    try:
        return "api.wandb.ai" in (Path.home() / ".netrc").read_text()
    except OSError:
        return False


def _drop_records_after(file: Path, done_steps: int) -> None:
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= done_steps:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that a kill cut short
            continue
    write_file(file, "".join(kept))
