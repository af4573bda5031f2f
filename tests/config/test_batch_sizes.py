"""A growing batch: Megatron-Core's own calculator is the oracle."""

import pytest

from megatron_ext.config import load_config
from megatron_ext.config.batch_sizes import BatchSizes
from megatron_ext.errors import ConfigError

RAMPS = [
    (64, (8, 8, 1000)),
    (64, (16, 48, 17)),
    (1024, (32, 32, 3_000_000)),
    (12, (4, 4, 1)),  # over before the second step
    (10, (1, 3, 100)),  # 100 / 3 samples for each size
]


@pytest.mark.parametrize(("full", "rampup"), RAMPS)
def test_sizes_are_megatrons(full: int, rampup: tuple[int, int, int]) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    start, increment, samples = rampup
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        full, 1, 1, False, 1, start, increment, samples
    )
    sizes, read = BatchSizes(full, rampup), 0
    for step in range(60):
        theirs.update(read, consistency_check=False)
        assert sizes.before(step) == read
        assert sizes.of(step) == theirs.get_current_global_batch_size()
        read += sizes.of(step)


@pytest.mark.parametrize(("full", "rampup"), [*RAMPS, (8, ())])
def test_steps_for_samples_are_the_fewest(full: int, rampup: tuple[int, ...]) -> None:
    sizes = BatchSizes(full, rampup)
    for samples in range(1, 400):
        steps = sizes.steps_for(samples)
        assert sizes.before(steps) >= samples > sizes.before(steps - 1)


def test_budget_in_tokens_counts_the_smaller_batches(valid) -> None:
    ramp = "training.rampup_batch_size=[2,2,24]"
    ramped = load_config(valid, [ramp, "training.global_batch_size=6", "training.steps=10"])
    # 12 samples in 6 steps of 2, 12 in 3 steps of 4, and one step of 6.
    assert ramped.training.tokens == 30 * ramped.training.sequence_length
    back = load_config(
        valid,
        [ramp, "training.global_batch_size=6", f"training.tokens={ramped.training.tokens}"],
    )
    assert back.training.steps == 10


@pytest.mark.parametrize(
    ("ramp", "sentence"),
    [
        ("[4,4]", "not three numbers"),
        ("[4,3,100]", "does not lead from 4 by steps of 3 to global_batch_size=8"),
        ("[8,4,100]", "does not lead"),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(valid, ramp: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[")):
        load_config(valid, [f"training.rampup_batch_size={ramp}", "training.global_batch_size=8"])


def test_every_size_of_a_ramp_must_divide_over_the_ranks(valid) -> None:
    with pytest.raises(ConfigError, match=r"its increment is no multiple of .* = 2: choose 2"):
        load_config(
            valid,
            [
                "training.rampup_batch_size=[4,1,100]",
                "training.global_batch_size=8",
                "training.micro_batch_size=2",
            ],
        )
