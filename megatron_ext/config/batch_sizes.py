"""Sequences in each step's global batch: always the same, or growing at the start of a run.

    sizes = BatchSizes(1024, (256, 256, 3_000_000))     # 256, 512, 768, then 1024 from 3M on
    sizes.of(step), sizes.before(step), sizes.steps_for(samples)

Megatron-LM's rule (megatron/core/num_microbatches_calculator.py): after c samples the size is
start + increment x floor(c / (samples / n)), n the number of increments, and the full one from
`samples` on. So the samples read before a step follow from its number alone. Refuses (ValueError) a
ramp that does not end at the full size.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes of a run by step, the first being 0."""

    full: int
    rampup: tuple[int, ...] = ()
    """Start, increment and the samples over which the size grows; empty for none."""

    def __post_init__(self) -> None:
        if not self.rampup:
            return
        if len(self.rampup) != 3 or min(self.rampup) < 1:
            raise ValueError(
                f"rampup_batch_size={list(self.rampup)} is not three numbers above 0: write "
                "[start, increment, samples]"
            )
        start, increment, _ = self.rampup
        if start >= self.full or (self.full - start) % increment:
            raise ValueError(
                f"rampup_batch_size={list(self.rampup)} does not lead from {start} by steps of "
                f"{increment} to global_batch_size={self.full}: choose a smaller start and an "
                "increment that divides their difference"
            )

    @cached_property
    def _phases(self) -> list[tuple[int, int, int]]:
        """First step, samples before it, and size, of each stretch of equal steps."""
        step, done, phases = 0, 0, []
        if self.rampup:
            start, increment, samples = self.rampup
            n = (self.full - start) // increment
            for i, size in enumerate(range(start, self.full, increment)):
                # As long as done < (i + 1) samples / n, in whole numbers.
                steps = max(0, -(-((i + 1) * samples - done * n) // (n * size)))
                if steps:
                    phases.append((step, done, size))
                step, done = step + steps, done + steps * size
        return [*phases, (step, done, self.full)]

    def of(self, step: int) -> int:
        """Sequences of step `step`."""
        return self._phase(step)[2]

    def before(self, step: int) -> int:
        """Sequences of all steps before it: where step `step` begins in the order of samples."""
        first, done, size = self._phase(step)
        return done + (step - first) * size

    def steps_for(self, samples: int) -> int:
        """The fewest steps that read so many sequences."""
        place = bisect_right([done for _, done, _ in self._phases], max(0, samples - 1)) - 1
        first, done, size = self._phases[place]
        return first + -(-(samples - done) // size)

    def _phase(self, step: int) -> tuple[int, int, int]:
        return self._phases[bisect_right([first for first, _, _ in self._phases], step) - 1]
