"""Saving without stopping: the state is copied to host memory, a thread writes it while training
goes on, and the folder becomes a checkpoint once all ranks agree that theirs is on disk.

    saver = Saver(config, record, done_steps)
    saver.save(step, model, optimizer)      # every rank; returns once the state is copied
    saver.poll()                            # every rank, each step: looks whether it is written
    saver.close()                           # every rank, at the end: waits for it
    saver.stall_s, saver.saved_step

A save goes into a folder of its own named `.unfinished`, gets its manifest last and is renamed. The
writer is a thread: no process is left over by a kill, and none dies of a signal to the group. It
takes part in no collective. Saves never overlap. One that fails, for lack of space or otherwise, is
a warning: what it wrote is removed, older checkpoints stay, the run goes on.
"""

import itertools
import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.checkpoint import manifest, storage
from megatron_ext.checkpoint.chunks import Chunk, Model, gather_weights, state_chunks
from megatron_ext.checkpoint.rng import random_chunks, random_state
from megatron_ext.config import Config
from megatron_ext.config.batch_sizes import BatchSizes
from megatron_ext.errors import Verdict

log = logging.getLogger(__name__)

_BYTES_A_CHUNK = 4096  # around the numbers of a chunk, in its file and in the index


class Saver:
    """The checkpoints of one run; `record` (config, data) goes into each."""

    def __init__(self, config: Config, record: dict[str, Any], saved_step: int) -> None:
        self.config = config
        self.record = record
        self.run_dir = config.training.run_dir
        self.saved_step = saved_step  # steps done in the newest checkpoint
        self.stall_s = 0.0  # seconds that training has waited so far
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._host: list[torch.Tensor] = []  # memory of the last save's copy
        # The save in flight: while each rank writes its part, then while rank 0 seals the folder.
        self._writing: tuple[Save, Future[storage.Written | str]] | None = None
        self._sealing: tuple[Save, Future[Path | None]] | None = None

    def save(self, step: int, model: Model, optimizer: MegatronOptimizer) -> None:
        """Begin to save the state after `step` steps, after waiting for the save before."""
        self.wait()
        started = time.monotonic()
        save = begin(self.run_dir, step, model, optimizer, self.record, self._host)
        if save is not None:
            self._host = [chunk.tensor for chunk in save.chunks]
            self._writing = save, self._worker.submit(save.write)
        self.stall_s += time.monotonic() - started
        if not self.config.checkpoint.async_save:
            self.wait()

    def poll(self) -> None:
        """Take the save in flight a stage further if every rank is through with this one."""
        stage = self._writing or self._sealing
        if stage is None:
            return
        started = time.monotonic()
        done = torch.tensor([stage[1].done()], device=torch.cuda.current_device()).int()
        dist.all_reduce(done, dist.ReduceOp.MIN)
        self.stall_s += time.monotonic() - started
        if done.item():
            self._advance()

    def close(self, done: int) -> None:
        """Wait for the save in flight. Raises Verdict when step `done` has no checkpoint."""
        self.wait()
        self._worker.shutdown()
        if self.saved_step < done:
            raise Verdict(f"the state after step {done} could not be saved: see the warning above")

    def wait(self) -> None:
        """Wait for the save in flight, if there is one, until it is a checkpoint."""
        while self._writing or self._sealing:
            self._advance()

    def _advance(self) -> None:
        """From written to being sealed, or from sealed to done, waiting for what is not ready.

        Rank 0 seals in its thread too: that syncs several files, for which a busy disk may take
        seconds, and all ranks would wait for them."""
        started = time.monotonic()
        if self._writing:
            (save, part), self._writing = self._writing, None
            parts = _gather(part.result())
            self._sealing = save, self._worker.submit(save.seal, parts)
        elif self._sealing:
            (save, sealed), self._sealing = self._sealing, None
            path = _from_rank_0(sealed.result())
            if path is not None:
                self.saved_step = save.step
                if dist.get_rank() == 0:
                    log.info("step %d  checkpoint %s", save.step, path)
                    self._worker.submit(_prune, self.config, save.step)
        self.stall_s += time.monotonic() - started


@dataclass(frozen=True)
class Save:
    """A save in flight: this rank's part of the state, in host memory."""

    step: int
    final: Path
    folder: Path
    chunks: list[Chunk]
    facts: dict[str, Any]  # run.json

    def write(self) -> storage.Written | str:
        """Write this rank's file, or say what went wrong. Runs in a thread."""
        try:
            return storage.write_chunks(self.folder, dist.get_rank(), self.chunks)
        except Exception as error:
            return f"{error}"

    def seal(self, parts: list[storage.Written | str] | None) -> Path | None:
        """On rank 0, given what every rank wrote: make the folder a checkpoint. None, after a
        warning, when it cannot be one; the folder is gone then. Runs in a thread."""
        if parts is None:  # on other ranks
            return None
        try:
            written = []
            for rank, part in enumerate(parts):
                if isinstance(part, str):
                    raise RuntimeError(f"rank {rank}: {part}")
                written.append(part)
            _seal(self, written)
        except (OSError, RuntimeError) as error:
            log.warning(
                "checkpoint of step %d NOT SAVED, training goes on: %s. Make room in %s",
                self.step, error, self.final.parent,
            )  # fmt: skip
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        return self.final


def begin(
    run_dir: Path,
    step: int,
    model: Model,
    optimizer: MegatronOptimizer | None,
    record: dict[str, Any],
    host: Sequence[torch.Tensor] = (),
) -> Save | None:
    """Copy this rank's part of the state to host memory, into that of the copy before if given, and
    make the folder; every rank calls it. None, after a warning, when the disk has no room for it.
    """
    gather_weights(model)
    live = state_chunks(model, optimizer, to_write=True)
    rank = dist.get_rank()
    live += random_chunks(random_state(), rank)
    size = sum(chunk.tensor.nbytes + _BYTES_A_CHUNK for chunk in live)
    total = torch.tensor([size], device=torch.cuda.current_device())
    dist.all_reduce(total)
    final = manifest.checkpoint_dir(run_dir, step)
    answer: list[Any] = [None]
    if rank == 0:
        answer = [_make_room(final, int(total.item()))]
    dist.broadcast_object_list(answer)
    folder = answer[0]
    if folder is None:
        return None
    chunks = _copied(live, host)
    facts = {
        **progress(step, record["config"]),
        "optimizer_steps": optimizer_steps(optimizer),
        "loss_scale": loss_scale(optimizer),
        "layout": layout(),
        "config_hash": manifest.hash_of(record["config"]),
        "data_hash": manifest.hash_of(record["data"]),
        **record,
    }
    return Save(step, final, folder, chunks, facts)


def seal(save: Save, written: storage.Written | str) -> Path | None:
    """Make the folder a checkpoint if every rank wrote its part, and wait for it; every rank calls
    it. None, after a warning, when one could not."""
    return _from_rank_0(save.seal(_gather(written)))


def _gather(written: storage.Written | str) -> list[storage.Written | str] | None:
    """What every rank wrote, on rank 0."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(written, gathered)
    return gathered


def _from_rank_0(path: Path | None) -> Path | None:
    answer = [path]
    dist.broadcast_object_list(answer)
    return answer[0]


def progress(step: int, config: dict[str, Any]) -> dict[str, int]:
    """How far a run is after `step` steps: sequences and tokens read."""
    training = config["training"]
    rampup = tuple(training["rampup_batch_size"])
    samples = BatchSizes(training["global_batch_size"], rampup).before(step)
    return {
        "step": step,
        "consumed_samples": samples,
        "consumed_tokens": samples * training["sequence_length"],
    }


def layout() -> dict[str, int]:
    """Ranks in each direction of parallelism."""
    return {
        "world_size": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def optimizer_steps(optimizer: MegatronOptimizer | None) -> int:
    """Updates that AdamW has made, which its bias correction counts: skipped steps are none."""
    for part in [] if optimizer is None else optimizer.chained_optimizers:
        for holder in (*part.optimizer.state.values(), *part.optimizer.param_groups):
            if "step" in holder:
                return int(holder["step"])
    return 0


def _copied(live: Sequence[Chunk], host: Sequence[torch.Tensor]) -> list[Chunk]:
    """The chunks in host memory. Memory that was used before, and is pinned for a GPU, takes the
    copy several times faster than pages that the kernel has to find first."""
    copies = []
    for chunk, room in itertools.zip_longest(live, host[: len(live)]):
        tensor = chunk.tensor
        if room is None or (room.shape, room.dtype) != (tensor.shape, tensor.dtype):
            room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies.append(replace(chunk, tensor=room.copy_(tensor, non_blocking=True)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


def loss_scale(optimizer: MegatronOptimizer | None) -> dict[str, float] | None:
    """fp16: the loss scale, and the counts that decide when it changes; None otherwise."""
    parts = [] if optimizer is None else optimizer.chained_optimizers
    scaler = next((s for part in parts if (s := getattr(part, "grad_scaler", None))), None)
    if scaler is None:
        return None
    return {name: float(value) for name, value in scaler.state_dict().items()}


def _make_room(final: Path, size: int) -> Path | None:
    """A folder to write `size` bytes into; None when there is no room."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob("*.unfinished"):
            shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(final.parent).free
        if size > free:
            log.warning(
                "checkpoint of step %d NOT SAVED, training goes on: it takes %s GB and %s has %s "
                "GB free: make room, or lower checkpoint.keep_last (older ones go after a save)",
                manifest.step_of(final), f"{size / 1e9:.3g}", final.parent, f"{free / 1e9:.3g}",
            )  # fmt: skip
            return None
        # A process of a killed run that is still writing has another folder.
        folder = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.unfinished")
        folder.mkdir()
    except OSError as error:
        log.warning(
            "checkpoint of step %d NOT SAVED, training goes on: %s", manifest.step_of(final), error
        )
        return None
    return folder


def _seal(save: Save, written: list[storage.Written]) -> None:
    storage.write_index(save.folder, written)
    manifest.write_json(save.folder / "run.json", save.facts)
    files = {part.name: part.facts for part in written}
    own = sorted(p.name for p in save.folder.iterdir() if p.name not in files)
    files |= manifest.file_facts(save.folder, own)
    for name, facts in files.items():
        found = (save.folder / name).stat().st_size
        if found != facts["bytes"]:
            raise RuntimeError(f"{name} has {found} bytes instead of {facts['bytes']}")
    for name in own:
        manifest.sync(save.folder / name)
    manifest.write_manifest(save.folder, dict(sorted(files.items())))
    manifest.sync(save.folder)
    if save.final.exists():  # a damaged one of the same step
        manifest.delete([save.final])
    save.folder.replace(save.final)
    manifest.sync(save.final.parent)


def _prune(config: Config, done: int) -> None:
    keep = config.checkpoint
    try:
        problems = manifest.prune(config.training.run_dir, keep.keep_last, keep.keep_every, done)
    except OSError as error:
        log.warning("old checkpoints could not be deleted: %s", error)
        return
    for problem in problems:
        log.warning("damaged checkpoint, older ones are kept: %s", problem)
