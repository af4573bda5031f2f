"""The metrics of a run: records for the sinks, and one line that a person can scan.

    journal = Journal(config, here, done_steps, peak, predicted)
    journal.step(step, result, seconds, data_wait, stalled)

Rank 0 writes; on other ranks nothing happens. What a record holds is in docs/training.md.
"""

import logging
import statistics
import time
from collections.abc import Callable

import psutil
import torch

from megatron_ext.checkpoint.manifest import write_json
from megatron_ext.config import Config
from megatron_ext.training.sinks import Record, Sink, open_sinks
from megatron_ext.training.step import StepResult
from megatron_ext.training.utilization import Peak, flops_per_token
from megatron_ext.world import World

log = logging.getLogger(__name__)


class Journal:
    """The metrics of one run, from the first step of this start to the last."""

    def __init__(
        self,
        config: Config,
        here: World,
        done_steps: int,
        peak: Peak,
        predicted: Record | None = None,
    ) -> None:
        """predicted: what the planner expects of this layout here, as planning.plan.expected_on
        has it, to stand beside what is measured."""
        self.config = config
        self.here = here
        self.run_dir = config.training.run_dir
        self.peak = peak
        self.predicted = predicted
        self.last: Record = {}  # of a step
        self.first_step = done_steps
        self.started = time.monotonic()
        self.seconds: list[float] = []  # of the steps since the last record
        self.stalled = 0.0
        self.sinks = open_sinks(config, done_steps) if here.is_main else []
        self._failed: set[Sink] = set()  # of which was warned

    def step(
        self, done: int, result: StepResult, seconds: float, data_wait: float, stalled: float = 0.0
    ) -> None:
        """Record the step after which `done` steps are done, if it is one to be logged. `stalled`:
        seconds that training has waited for checkpoints since the start of this process."""
        self.seconds.append(seconds)
        training = self.config.training
        if not self.here.is_main or not (
            done % self.config.logging.interval == 0 or done == training.steps
        ):
            return
        tokens = training.tokens_after(done)
        tokens_per_s = (tokens - training.tokens_after(done - 1)) / seconds
        full, causal = (
            tokens_per_s / self.here.size * flops_per_token(self.config, share) / 1e12
            for share in (1.0, 0.5)
        )
        self.last = {
            "step": done,
            "tokens": tokens,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "step_time_s": seconds,
            "step_time_p50_s": percentile(self.seconds, 50),
            "step_time_p95_s": percentile(self.seconds, 95),
            "tokens_per_s": tokens_per_s,
            "tflops_per_gpu": full,
            "mfu": full / self.peak.tflops if self.peak.tflops else None,
            "mfu_causal": causal / self.peak.tflops if self.peak.tflops else None,
            "memory_gb": _memory_gb(self.here.device),
            "data_wait_s": data_wait,
            "checkpoint_stall_s": stalled - self.stalled,  # since the record before
            "skipped": result.skipped,
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            **self._predicted(),
        }
        self._write(self.last)
        self.stalled, self.seconds = stalled, []
        # By tokens, as batches may grow.
        rate = (time.monotonic() - self.started) / (tokens - training.tokens_after(self.first_step))
        left = training.tokens_after(training.steps) - tokens
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  grad %.2f  %s tokens/s  %.2f s/step  ETA %s%s",
            done, training.steps, result.loss, result.lr, result.grad_norm,
            f"{tokens_per_s:,.0f}", seconds, _duration(rate * left),
            "  SKIPPED" if result.skipped else "",
        )  # fmt: skip

    def validation(self, done: int, loss: float) -> None:
        """Record the validation loss after `done` steps."""
        self._write({"step": done, "validation_loss": loss})
        log.info("step %d  validation loss %.4f", done, loss)

    def task(self, done: int, figures: dict[str, float]) -> None:
        """Record what a task measured after `done` steps: figures by their names."""
        self._write({"step": done, **figures})
        said = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        log.info("step %d  %s", done, said)

    def fault(self, done: int, fault: str, what_was_done: str, batch: list[Record]) -> None:
        """Record what was wrong with a step; the samples and documents of its batch go into a file
        of their own."""
        if not self.here.is_main:
            return
        file = self.run_dir / "faults" / f"step_{done:08d}.json"
        record = {"step": done, "fault": fault, "action": what_was_done}
        where = f"documents in {file}"
        try:
            file.parent.mkdir(exist_ok=True)
            write_json(file, {**record, "batch": batch})
        except OSError as error:
            where = f"its documents could not be written: {error}"
        self._write({**record, "batch": str(file)})
        log.warning("step %d  %s: %s; %s", done, fault, what_was_done, where)

    def lacks(self, done: int, figure: str) -> bool:
        """Whether there is no record of this figure after `done` steps (rank 0 knows)."""
        if not self.here.is_main:
            return False
        try:
            records = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        except OSError:  # somebody took it away: records are lost, training goes on
            return True
        return not any(f'"step": {done}, "{figure}"' in record for record in records)

    def close(self) -> None:
        """After the last step: the sinks are whole, and the log has measured beside predicted."""
        if "predicted_mfu" in self.last:
            log.info(
                "step %d  MFU %.1f%%, predicted %.1f%%  memory %.1f GB, predicted %.1f GB",
                self.last["step"], 100 * self.last["mfu"], 100 * self.last["predicted_mfu"],
                self.last["memory_gb"], self.last["predicted_memory_gb"],
            )  # fmt: skip
        self._to_each(lambda sink: sink.close())

    def _predicted(self) -> Record:
        """MFU as a share of the peak that the measured one is a share of; none without a plan."""
        if self.predicted is None or not self.peak.tflops:
            return {}
        return {
            "predicted_mfu": self.predicted["tflops_per_gpu"] / self.peak.tflops,
            "predicted_memory_gb": self.predicted["memory_gb"],
        }

    def _write(self, record: Record) -> None:
        self._to_each(lambda sink: sink.write(record))

    def _to_each(self, tell: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            try:
                tell(sink)
            except Exception as error:  # of whatever kind its library raises
                if sink not in self._failed:
                    log.warning(
                        "%s: records are lost, training goes on: %s", type(sink).__name__, error
                    )
                self._failed.add(sink)


def percentile(values: list[float], percent: float) -> float:
    """The value that so many per cent of them do not exceed, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(percent) - 1]


def _memory_gb(device: torch.device) -> float:
    """Peak allocated on the GPU, or resident now on a CPU, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"
