"""What the scripts such as `train_ppo.py` do: flags into a config, training, and the report at the end."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch

from minirl.checks import ConfigError
from minirl.distributed import broadcast_from_rank_0, launched, process_group, rank, recall
from minirl.evaluate import TRAINING_SCRIPTS
from minirl.runs.checkpoints import CHECKPOINT_FILE, brief
from minirl.runs.directory import CONFIG_FILE, default_run_dir, load_settings
from minirl.runs.flags import as_flags, errors_in_one_line, fail, make_parser, saved_config
from minirl.runs.seeds import train_seeds
from minirl.runs.settings import flag_name
from minirl.scripts.report import check_final_games, report

SIZES = (  # settings that memory limits
    *("num_envs", "num_steps", "buffer_size", "batch_size", "hidden_sizes", "cnn_channels", "frame_size"),
    *("lm_batch_size", "reward_batch_size", "num_pairs", "width", "context"),
)


class Train(Protocol):
    """The `train` function of an algorithm."""

    def __call__(self, config: Any, *, run_dir: Path | None, resume: bool, device: str) -> Any:
        """Train as `config` says."""


@process_group()
def run_training(
    algorithm: str, config_class: type, train: Train, description: str, argv: list[str] | None = None
) -> tuple[Any, Any]:
    """Parse flags into a config and train, as the scripts such as `train_ppo.py` do.

    Returns the config and what `train` returned. A user's mistake ends with status 2 and one line, before anything is
    written; diverged training or a failed environment with status 1; Ctrl-C with 130, SIGTERM 143, SIGHUP 129, and a
    standard error that nobody reads any more 141. When torchrun restarts ranks, they continue the run that the ranks
    before them began.
    """
    parser = make_parser(config_class, description, TRAINING_SCRIPTS)
    arguments = vars(parser.parse_args(argv))
    run_dir: Path | None = arguments.pop("run_dir")
    resume: Path | None = arguments.pop("resume")
    seeds: list[int] | None = arguments.pop("seeds")
    flags = as_flags(arguments)
    device = arguments.pop("device")
    final_games: int | None = arguments.pop("final_games", None)

    try:
        with errors_in_one_line(parser.error), contextlib.ExitStack() as stack:
            resume, run_dir = broadcast_from_rank_0(lambda: started_again(resume, run_dir))
            if seeds is not None:
                if resume is not None:
                    raise ConfigError("--seeds can't go with --resume, which goes on with one run")
                if launched():
                    raise ConfigError("--seeds can't go with torchrun, whose processes train together, with one seed")
                raise SystemExit(train_with_seeds(algorithm, config_class, seeds, arguments, run_dir, flags))
            if resume is not None:
                if run_dir is not None:
                    raise ConfigError("--run-dir can't go with --resume, which names the run's own directory")
                directory = resume
                config = broadcast_from_rank_0(lambda: resumed_config(algorithm, config_class, directory, arguments))
            else:
                config = config_class(**arguments)
            check_final_games(final_games, config)
            given = resume or run_dir
            directory = given or broadcast_from_rank_0(lambda: stack.enter_context(default_run_dir(algorithm, config)))
            result = train(config, run_dir=directory, resume=resume is not None, device=device)
            if rank() == 0:
                report(directory, final_games, device)
            return config, result
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a special error for GPU memory; for CPU memory it raises a plain RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fields = {field.name for field in dataclasses.fields(config_class)}
        sizes = ", ".join(flag_name(name) for name in SIZES if name in fields)
        fail(f"the settings must fit into this machine's memory, {sizes} say: {brief(error)}")


def started_again(resume: Path | None, run_dir: Path | None) -> tuple[Path | None, Path | None]:
    """Return the directory to resume and the new one, from the flags or, after a restart, from the ranks before."""
    if (begun := recall()) is None:
        return resume, run_dir
    if (begun / CHECKPOINT_FILE).exists():
        return begun, None
    (begun / CONFIG_FILE).unlink(missing_ok=True)  # they had only begun it
    return None, begun


def train_with_seeds(
    algorithm: str, config_class: type, seeds: list[int], given: dict[str, Any], run_dir: Path | None, flags: list[str]
) -> int:
    """Train with each of several seeds, in separate processes; return the status to exit with.

    Raises:
        ConfigError: if a setting or a directory can't be used.
    """
    if "seed" in given:
        raise ConfigError("--seeds can't go with --seed")
    configs = [config_class(**given, seed=seed) for seed in seeds]
    with contextlib.ExitStack() as stack:
        run_dirs = {
            config.seed: run_dir / f"seed{config.seed}"
            if run_dir
            else stack.enter_context(default_run_dir(algorithm, config))
            for config in configs
        }
        return train_seeds(algorithm, configs[0], flags, run_dirs)


def resumed_config(algorithm: str, config_class: type, run_dir: Path, given: dict[str, Any]) -> Any:
    """Return the settings of a saved run, with those that were given; `train` refuses what may not change.

    Raises:
        ConfigError: if the run is another algorithm's.
    """
    settings = load_settings(run_dir)
    saved_algorithm = settings["algorithm"]
    if saved_algorithm != algorithm:
        raise ConfigError(f"--resume must name a run of {algorithm}: {run_dir} is one of {saved_algorithm}")
    return dataclasses.replace(saved_config(config_class, run_dir, settings), **given)
