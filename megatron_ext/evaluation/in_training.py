"""What is asked of a model while it trains: the plans of `evaluation.tasks`. Needs no torch.

plans = plan_tasks(config)              # before anything costly: refuses what cannot be asked
results = at_step(plans[0], 1000)       # the same, of the weights after 1,000 steps
"""

from dataclasses import replace

from megatron_ext.config import Config
from megatron_ext.evaluation import perplexity, retrieval
from megatron_ext.evaluation.subject import Subject

TaskPlan = perplexity.Plan | retrieval.Plan


def plan_tasks(config: Config) -> list[TaskPlan]:
    """One for each task, the same on every rank: files of earlier measurements are not looked at.
    Raises UserError."""
    run_dir = config.training.run_dir
    subject = Subject(
        config,
        weights=run_dir,
        results=run_dir / "evaluation" / "in_training",
        identity={},
        bos=None,  # as in the sequences that it is trained on
    )
    return [
        perplexity.make_plan(subject)
        if task == "perplexity"
        else retrieval.make_plan(subject, task)
        for task in config.evaluation.tasks
    ]


def at_step(plan: TaskPlan, done: int) -> TaskPlan:
    """The plan for the weights after `done` steps, with a file of its own."""
    file = plan.output.parent / f"step_{done:08d}" / plan.output.name
    header = {**plan.header, "checkpoint": {"step": done, "in_training": True}}
    return replace(plan, output=file, header=header)
