"""Command lines from config dataclasses: every field is a flag."""

import argparse
import dataclasses
import difflib
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from minirl.checkpoints import DivergedError, brief
from minirl.config import ConfigError, Sizes, field_types, flag_name
from minirl.runs import CONFIG_FILE, default_run_dir, load_settings
from minirl.seeds import read_seeds, train_seeds

# What may be given with --resume: how far to go on, and what changes no result.
MAY_CHANGE = ("total_timesteps", "num_episodes", "num_workers", "checkpoint_frequency", "video_frequency")


class Train(Protocol):
    """The `train` function of an algorithm."""

    def __call__(self, config: Any, *, run_dir: Path | None, resume: bool, device: str) -> Any:
        """Train as `config` says."""


class Parser(argparse.ArgumentParser):
    """An argument parser that fails with one line on standard error and status 2, and suggests the flag that was meant.

    Flags are written out: a prefix that is taken for a flag today is another's tomorrow.
    """

    def __init__(self, **options: Any) -> None:
        layout = functools.partial(argparse.HelpFormatter, max_help_position=36)
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 is a number, too

    def error(self, message: str) -> NoReturn:
        """Print `error: message` and exit."""
        unknown = message.removeprefix("unrecognized arguments: ")
        hint = "" if unknown == message else self._hint(unknown.split(" ")[0])
        fail(message.removeprefix("argument ") + hint)

    def _hint(self, unknown: str) -> str:
        if not unknown.startswith("-") or not unknown.strip("-"):
            return "; names of flags start with --, and switches take no value"
        flag = flag_name(unknown.split("=")[0].strip("-").lower())
        known = [flag for action in self._actions for flag in action.option_strings]
        meant = [
            *(name for name in known if name == flag),
            *(name for name in known if name.startswith(flag)),
            *difflib.get_close_matches(flag, known, n=1, cutoff=0.75),
        ]
        if meant:
            return f"; did you mean {meant[0]}?"
        scripts = scripts_with(flag)
        return f"; {flag} belongs to {' and '.join(scripts)}" if scripts else "; --help shows all flags"


def scripts_with(flag: str) -> list[str]:
    """Return the training scripts that have this flag."""
    from minirl.dqn import DQNConfig
    from minirl.ppo import PPOConfig
    from minirl.q_learning import QLearningConfig

    scripts = {"train_ppo.py": PPOConfig, "train_dqn.py": DQNConfig, "train_q.py": QLearningConfig}
    fields = {script: dataclasses.fields(config_class) for script, config_class in scripts.items()}
    return [script for script in scripts if flag in [flag_name(field.name) for field in fields[script]]]


def fail(message: object) -> NoReturn:
    """Print `error: message` on standard error, in one line, and exit with status 2."""
    print("error:", *str(message).splitlines(), file=sys.stderr)
    raise SystemExit(2)


def run_training(
    algorithm: str, config_class: type, train: Train, description: str, argv: list[str] | None = None
) -> tuple[Any, Any]:
    """Parse flags into a config and train: what `train_ppo.py` and its like do.

    Returns the config and what `train` returned. A user's mistake ends with status 2 and one line, before anything is
    written.
    """
    arguments = vars(make_parser(config_class, description).parse_args(argv))
    device = arguments.pop("device")
    run_dir: Path | None = arguments.pop("run_dir")
    resume: Path | None = arguments.pop("resume")
    seeds: list[int] | None = arguments.pop("seeds")
    final_games: int | None = arguments.pop("final_games", None)
    from minirl.report import check_final_games, report  # which imports this module

    try:
        if seeds is not None:
            if resume is not None:
                raise ConfigError("--seeds can't go with --resume, which goes on with one run")
            others = {"device": device} if final_games is None else {"device": device, "final_games": final_games}
            raise SystemExit(train_with_seeds(algorithm, config_class, seeds, arguments, run_dir, others))
        if resume is not None:
            if run_dir is not None:
                raise ConfigError("--run-dir can't go with --resume, which names the run's own directory")
            config = resumed_config(algorithm, config_class, resume, arguments)
        else:
            config = config_class(**arguments)
        run_dir = resume or run_dir or default_run_dir(algorithm, config)
        check_final_games(final_games, config)
        result = train(config, run_dir=run_dir, resume=resume is not None, device=device)
        report(run_dir, final_games, device)
        return config, result
    except ConfigError as error:
        fail(error)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        # PyTorch has an error of its own for a GPU; for the processor's memory it raises any RuntimeError.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        fail(f"the settings must fit into this machine's memory, --num-envs or --num-steps say: {brief(error)}")
    except KeyboardInterrupt:  # while the run was being set up: there is nothing to save yet
        raise SystemExit(130) from None


def train_with_seeds(
    algorithm: str,
    config_class: type,
    seeds: list[int],
    given: dict[str, Any],
    run_dir: Path | None,
    others: dict[str, Any],
) -> int:
    """Train with each of several seeds, in processes of their own; return the status to exit with.

    Raises:
        ConfigError: if a setting or a directory will not do.
    """
    if "seed" in given:
        raise ConfigError("--seeds can't go with --seed")
    configs = [config_class(**given, seed=seed) for seed in seeds]
    run_dirs = [
        default_run_dir(algorithm, config) if run_dir is None else run_dir / f"seed{config.seed}" for config in configs
    ]
    flags = as_flags({**given, **others})
    return train_seeds(algorithm, configs[0], flags, dict(zip(seeds, run_dirs, strict=True)))


def resumed_config(algorithm: str, config_class: type, run_dir: Path, given: dict[str, Any]) -> Any:
    """Return the settings of a saved run; only those of `MAY_CHANGE` may be given anew.

    Raises:
        ConfigError: if the run is another algorithm's, or a flag says otherwise than the run's settings.
    """
    settings = load_settings(run_dir)
    saved_algorithm = settings["algorithm"]
    if saved_algorithm != algorithm:
        raise ConfigError(f"--resume must name a run of {algorithm}: {run_dir} is one of {saved_algorithm}")
    config = saved_config(config_class, run_dir, settings)
    for name, value in given.items():
        if name not in MAY_CHANGE and value != (saved := getattr(config, name)):
            raise ConfigError(
                f"{flag_name(name)} {shown(value)} can't go with --resume: the run has {shown(saved)}; leave it out"
            )
    return dataclasses.replace(config, **given)


def saved_config(config_class: type, run_dir: Path, settings: dict[str, Any]) -> Any:
    """Return the config that the settings in `config.json` of a run are.

    Raises:
        ConfigError: if a setting is unknown or wrong.
    """
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    settings.pop("algorithm", None)
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"{run_dir} has settings that this version does not know: {', '.join(unknown)}")
    try:
        return config_class(**settings)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / CONFIG_FILE}: {error}") from error


def make_parser(config_class: type, description: str) -> Parser:
    """Return a parser with a flag for each field of a config, and the flags that all algorithms share.

    Flags that are not given are absent from the result, so that a resumed run can tell.
    """
    parser = Parser(usage="%(prog)s [--flag value ...]", description=description, add_help=False)
    kinds = field_types(config_class)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(config_class):
        group = parser.add_argument_group(field.metadata["group"]) if field.metadata["group"] else group
        plain, optional = kinds[field.name]
        options: dict[str, Any] = {"help": f"{field.metadata['help']} (default: {shown(field.default)})"}
        if plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = reader(plain, optional)
            options["metavar"] = {int: "N", float: "X", str: "TEXT", Sizes: "N,N"}[plain]
        group.add_argument(flag_name(field.name), default=argparse.SUPPRESS, **options)
    group = parser.add_argument_group("run")
    group.add_argument(
        "--run-dir",
        type=read_path,
        metavar="DIR",
        help="where to write (default: runs/<algorithm>/<env>/<time>-seed<seed>)",
    )
    group.add_argument(
        "--resume",
        type=read_path,
        metavar="RUN_DIR",
        help="go on with the run in this directory; with a larger total, too, which annealed settings then follow",
    )
    group.add_argument(
        "--seeds",
        type=read_seeds,
        metavar="N-N",
        help="train with each of several seeds, as in 0-4 or 0,3,7, and print a table; --run-dir is then their parent",
    )
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    group.add_argument(
        "--final-games",
        type=reader(int),
        default=argparse.SUPPRESS,
        metavar="N",
        help="greedy games after the training, for TensorBoard (default: 10, on Atari 2, if that takes no longer "
        "than a tenth of the training)",
    )
    group.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """Return the flags that parse into these arguments."""
    flags = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            flags.append(flag_name(name if value else f"no_{name}"))
        else:
            flags.append(f"{flag_name(name)}={shown(value)}")
    return flags


def shown(default: Any) -> str:
    """Return a setting as one writes it on a command line."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default is None else str(default)


def read_path(text: str) -> Path:
    """Return the path that a flag gives; nothing would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not ''")
    return Path(text)


def reader(plain: type, optional: bool = False) -> Callable[[str], Any]:
    """Return a function that reads one value of a flag."""

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            return tuple(map(int, text.split(","))) if plain == Sizes else plain(text)
        except ValueError:
            noun = {int: "a whole number", float: "a number", Sizes: "whole numbers as in 24,24"}[plain]
            raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}") from None

    return read
