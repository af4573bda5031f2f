"""A run goes on by itself while it gets anywhere, and never in circles."""

import pytest

from megatron_ext.jobs.decision import Decision, End, decide
from megatron_ext.jobs.journal import Life


def end(step: int = 70, error: str = "RuntimeError: x", **facts: object) -> End:
    return End(code=1, step=step, steps=100, error=error, **facts)


def life(step: int, error: str = "RuntimeError: x", stopped: bool = False) -> Life:
    ended = {"step": step, "error": error, "stopped": stopped, "action": "requeue"}
    return Life("7", 0, {}, ended)


def test_nothing_follows_the_last_step_even_after_a_signal() -> None:
    assert decide(End(0, 100, 100, finished=True, stopped=True), []).action == "finished"


def test_a_signal_goes_on() -> None:
    decision = decide(end(stopped=True), [life(30)])
    assert decision.action == "requeue" and "stopped by a signal after step 70" in decision.reason


def test_signals_without_a_step_between_them_stop_it() -> None:
    stopped = [life(70, "", stopped=True)]
    assert decide(end(stopped=True), stopped).action == "requeue"
    assert "more time" in decide(end(stopped=True), stopped * 2).reason
    assert decide(end(71, stopped=True), stopped * 2).action == "requeue"


def test_a_mistake_of_the_user_is_not_tried_again() -> None:
    decision = decide(end(error="rope.base=0 must be above 1", hopeless=True), [])
    assert (decision.action, decision.reason) == ("stop", "rope.base=0 must be above 1")


def test_the_same_failure_at_the_same_step_stops_the_second_time() -> None:
    failure = end(error="RuntimeError: connection to 10.0.0.2:4711 closed")
    assert decide(failure, []).action == "requeue"
    before = life(70, "RuntimeError: connection to 10.0.0.9:80 closed")
    assert decide(failure, [before]).reason.startswith("failed twice at step 70: RuntimeError")


def test_a_failure_elsewhere_or_of_another_kind_goes_on() -> None:
    assert decide(end(), [life(69)]).action == "requeue"
    assert decide(end(), [life(70), life(80), life(90)]).action == "requeue"
    assert decide(end(), [life(70, "OSError: y")]).action == "requeue"
    assert decide(end(), [life(70, stopped=True)]).action == "requeue"
    # A node that died wrote nothing of its end.
    assert decide(end(), [Life("7", 0, {"step": 0})]).action == "requeue"


def test_three_failures_at_one_step_stop_whatever_they_were() -> None:
    lives = [life(70, "OSError: y"), life(70, "ValueError: z")]
    assert "failed 3 times at step 70" in decide(end(), lives).reason


def test_few_bad_nodes_are_avoided_and_many_are_nobodys_fault() -> None:
    few = decide(end(bad_nodes=("n3",), nodes=16), [])
    assert few.action == "requeue" and "without n3" in few.reason
    many = tuple(f"n{i}" for i in range(9))
    assert decide(end(bad_nodes=many, nodes=16), []).action == "stop"
    assert decide(end(bad_nodes=("n1",), nodes=1), []).action == "stop"


BAD = {"bad_nodes": ("n3",), "nodes": 16}
SIGNAL = {"stopped": True}


@pytest.mark.parametrize(
    ("checkpoint", "ends"),
    [
        (0, [{"step": 100}, {"step": 110}]),
        (90, [{"step": 100}, {"step": 110}]),
        (0, [{"step": 0, **BAD}]),
        (0, [{"step": 14}, {"step": 0, **BAD}, {"step": 18}, {"step": 12, **SIGNAL}]),
    ],
    ids=["failures before a checkpoint", "failures after one", "bad nodes", "of all kinds"],
)
def test_starts_that_leave_no_newer_checkpoint_end(checkpoint: int, ends: list[dict]) -> None:
    lives: list[Life] = []
    for number in range(40):
        how = ends[number % len(ends)]
        decision = decide(end(checkpoint=checkpoint, error=f"E{number % 2 * 'x'}", **how), lives)
        lives.append(recorded(decision, how, checkpoint))
        if decision.action == "stop":
            break
    assert len(lives) == 5 and "5 starts in a row left no checkpoint newer" in decision.reason
    # A person who submits it again after that has five more.
    assert decide(end(step=130, checkpoint=checkpoint), lives).action == "requeue"


def test_failures_with_a_newer_checkpoint_now_and_then_go_on() -> None:
    lives: list[Life] = []
    for number in range(40):
        how, checkpoint = {"step": 10 * number}, 20 * (number // 3)
        decision = decide(end(checkpoint=checkpoint, **how), lives)
        lives.append(recorded(decision, how, checkpoint))
        assert decision.action == "requeue"


def recorded(decision: Decision, how: dict, checkpoint: int) -> Life:
    ended = {"error": "", "stopped": False, **how, "checkpoint": checkpoint}
    return Life("7", 0, {}, {**ended, "action": decision.action})
