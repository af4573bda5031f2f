"""Pre-train a Llama on Megatron-Core. The same line under python, torchrun and srun:

    python pretrain.py configs/models/tiny.yaml rope.base=5e5
    torchrun --nproc-per-node 8 pretrain.py configs/models/llama_2b.yaml parallel.tensor=2
    python pretrain.py configs/models/llama_2b.yaml --check --world-size 128

Run it again to go on from the newest checkpoint that verifies. SIGTERM, SIGUSR1 and Ctrl-C save a
checkpoint and end with exit code 0. Exit code 2 means a mistake in the command or the config,
1 a failure; status.json in the run folder says which and whether to run the same command again.
See docs/config.md for every setting.
"""

import argparse
import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from megatron_ext.checkpoint.manifest import MANIFEST, find_checkpoints
from megatron_ext.config import Config, load_config, validate
from megatron_ext.data.corpora import cache_parent, check_corpora, epochs, fingerprint_of
from megatron_ext.errors import UserError
from megatron_ext.evaluation.in_training import plan_tasks
from megatron_ext.launch import launched_as
from megatron_ext.training.supervision import Supervision


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.check:
            return check(config, options)
        with Supervision(config) as watch:
            return pretrain(config, watch)
    except UserError as error:
        if launched_as()[0]:
            # Rank 0 speaks, and its end makes the launcher end us; unless we alone are in trouble.
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr)
        return 2


def check(config: Config, options: argparse.Namespace) -> int:
    """What can be known before a GPU is asked: settings and data at once, then every rank."""
    from megatron_ext.planning.preflight import preflight
    from megatron_ext.planning.ranks import check_ranks

    world_size = options.world_size
    if world_size is None:
        world_size = config.parallel.world_size
    if world_size < 1:
        raise UserError(f"--world-size {world_size} is no number of ranks: write at least 1")
    report = preflight(config, world_size)
    # Ranks take seconds to build: only those of a config that is right.
    ranks = check_ranks(config, world_size, options.gpu, options.slurm) if report.ok else None
    ok = report.ok and (ranks is None or ranks.ok)
    if options.json:
        layout = {} if ranks is None else {"layout": ranks.as_dict()}
        print(json.dumps({**json.loads(report.json()), "ok": ok, **layout}, indent=2))
    else:
        print(report.text(ranks.text() if ranks else "", ok))
    return 0 if ok else 2


def pretrain(config: Config, watch: Supervision) -> int:
    """Config -> world -> data, model, optimizer -> restore -> train."""
    check_corpora(config)
    check_machine(config)
    if launched_as()[0]:  # rank 0 says for all what the plans have to remark
        logging.getLogger("megatron_ext.evaluation").setLevel(logging.ERROR)
    planned = plan_tasks(config)
    watch.start()

    # What slurm/pretrain.sbatch sets and explains, for other launchers. CUDA reads it at its start.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Torch and Megatron-Core take seconds to import: only after everything cheap was checked.
    # Which kernels are used stands in our own log; Megatron-Core would warn six times.
    warnings.filterwarnings("ignore", module="megatron|torch.distributed")
    from megatron.core import parallel_state

    from megatron_ext.checkpoint import sharded
    from megatron_ext.checkpoint.saving import Saver
    from megatron_ext.data import blend
    from megatron_ext.model.kernels import choose, look
    from megatron_ext.model.llama import build_model
    from megatron_ext.planning.plan import expected_on
    from megatron_ext.training import guard as guarding
    from megatron_ext.training.journal import Journal
    from megatron_ext.training.loop import train
    from megatron_ext.training.optimizer import build_optimizer
    from megatron_ext.training.provenance import describe_run
    from megatron_ext.training.tasks import Tasks
    from megatron_ext.training.utilization import peak_of
    from megatron_ext.world import device_name, limit_collectives, world

    kernels = choose(config, look())
    watch.phase("meet")
    with world(config, watch.report) as here:
        log = start_logging(here.is_main)
        for warning in validate(config, here.size):
            log.warning(warning)
        if here.is_main:
            for name, times in epochs(config).items():
                log.info("data: %s is read %.3g times", name, times)
        watch.phase("data")
        data = blend.build_datasets(config)
        watch.phase("model")
        log.info("kernels: %s", kernels)
        model = build_model(config)
        optimizer = build_optimizer(model, config)

        watch.phase("restore")
        record = {"config": config.model_dump(mode="json"), "data": fingerprint_of(config)}
        saved_step = sharded.restore(config, model, optimizer, record)
        if saved_step:
            log.info("resuming after step %d", saved_step)
        elif config.training.init_from is not None:
            source = sharded.load_weights(config.training.init_from, model, optimizer)
            log.info("weights from %s", source)
        done_steps, guard = guarding.resume(config, saved_step)
        peak = peak_of(here, config)
        predicted = expected_on(device_name(here.device), config, here.size)
        describe_run(config, here, record["data"], peak, predicted)

        layout = blend.Layout(
            parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        )
        limit_collectives(config)
        watch.hold(done_steps)
        journal = Journal(config, here, done_steps, peak, predicted)
        saver = Saver(config, record, saved_step)
        tasks = Tasks(planned, here, watch, journal)
        done, stopped = train(
            config, model, optimizer, data, layout, saver, done_steps, watch, journal, guard, tasks
        )
        log.info(watch.ended(done, stopped))
    return 0


def check_machine(config: Config) -> None:
    """Raise UserError for what would fail only after the model was built."""
    run_dir = config.training.run_dir
    folders = {"training.run_dir": run_dir, "data.cache_dir": cache_parent(config)}
    for setting, folder in folders.items():
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(
                f"{setting}={folder} cannot be written: {there} is "
                f"{'not writable' if there.is_dir() else 'no folder'}; choose another {setting}"
            )
    source = config.training.init_from
    beginning = source is not None and not find_checkpoints(run_dir)
    if beginning and not (source / MANIFEST).is_file() and not find_checkpoints(source):
        raise UserError(
            f"training.init_from={source} is neither a checkpoint nor a run folder that holds "
            "one: train it first, or name runs/NAME or runs/NAME/checkpoints/step_N"
        )
    if config.logging.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb={config.logging.wandb} needs the package wandb: "
            "pip install 'megatron-ext[track]', or set logging.wandb=null"
        )
    if config.logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard=true needs the package tensorboard: "
            "pip install 'megatron-ext[track]', or set logging.tensorboard=false"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that replace those of the file"
    )
    parser.add_argument("--check", action="store_true", help="all checks, no training")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --check: judge the layout for N ranks"
    )
    parser.add_argument(
        "--gpu", default="a100-80gb", help="with --check: whose memory and speed to reckon with"
    )
    parser.add_argument(
        "--slurm", type=Path, metavar="FILE", help="with --check: batch script to compare with"
    )
    parser.add_argument("--json", action="store_true", help="with --check: print JSON")
    return parser.parse_intermixed_args(arguments)


def start_logging(is_main: bool) -> logging.Logger:
    """Rank 0 speaks; the others only warn."""
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=logging.INFO if is_main else logging.WARNING,
        stream=sys.stdout,
        force=True,
    )
    # Megatron-Core tells of every buffer and index it makes.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    return logging.getLogger("pretrain")


if __name__ == "__main__":
    sys.exit(main())
