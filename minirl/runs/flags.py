"""Command lines from config dataclasses: every field is a flag."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from minirl.checks import ConfigError
from minirl.distributed import RankError, first_to_fail
from minirl.envs.guard import EnvError
from minirl.envs.workers import WorkerError
from minirl.runs.checkpoints import DivergedError
from minirl.runs.directory import CONFIG_FILE
from minirl.runs.progress import open_streams, say
from minirl.runs.seeds import read_seeds
from minirl.runs.settings import NOUNS, Sizes, as_text, field_types, flag_name


class Parser(argparse.ArgumentParser):
    """An argument parser that fails with one line on standard error and status 2, and suggests the intended flag.

    Flags can't be abbreviated: a prefix that means one flag today may mean another tomorrow. `@FILE` stands for the
    flags in a file, several per line, with comments after `#`; later flags win.

    Args:
        scripts: the training scripts and their configs; a flag of another script gets a hint.
        options: of `argparse.ArgumentParser`.
    """

    def __init__(self, *, scripts: dict[str, type], **options: Any) -> None:
        open_streams()
        self.scripts = scripts
        self.words: list[tuple[str, str]] = []  # what was given, and where it stands
        layout = functools.partial(argparse.HelpFormatter, max_help_position=36)
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 is a number, too

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, with the flags of each `@FILE` in its place."""
        given = sys.argv[1:] if args is None else args
        self.words = [word for argument in given for word in self._expanded(argument, "", ())]
        return super().parse_known_args([word for word, _ in self.words], namespace)

    def _expanded(self, given: str, origin: str, within: tuple[Path, ...]) -> Iterator[tuple[str, str]]:
        """Yield a word, or the words of an `@FILE`, and of each where it stands, "" for the command line."""
        if not given.startswith("@"):
            yield given, origin
            return
        path = Path(given[1:])
        if path in within:
            fail(f"{given} must be flags, and names itself{origin}")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows' Notepad begins a file with a mark
        except (OSError, ValueError) as error:  # the latter where it is no text
            near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.args")], n=1)
            hint = "" if path.exists() else "".join(f"; did you mean @{path.with_name(name)}?" for name in near)
            fail(f"{given} must be a file of flags: {error}{hint}{origin}")
        for number, line in enumerate(lines, start=1):
            here = f" ({path}, line {number})"
            try:
                words = shlex.split(line, comments=True)
            except ValueError as error:
                fail(f"{line.strip()!r} must be flags: {error}{here}")
            for word in words:
                yield from self._expanded(word, here, (*within, path))

    def error(self, message: str) -> NoReturn:
        """Print `error: message` and exit; if it is about a line of a file, name that, too."""
        unknown = message.removeprefix("unrecognized arguments: ")
        hint = "" if unknown == message else self._hint(unknown.split(" ")[0])
        about = re.search(r"--[a-z][a-z-]*", message)
        origin = self._origin(about[0] if about else unknown.split(" ")[0], message)
        message = message.removeprefix("argument ").replace("ignored explicit argument", "takes no value, so not")
        fail(message + hint + origin)

    def _origin(self, flag: str, message: str) -> str:
        """Return where a word stands; of several, the last one with a value that the message names, or the last."""
        places = []
        for number, (word, origin) in enumerate(self.words):
            if word.split("=")[0] == flag:
                following = self.words[number + 1][0] if number + 1 < len(self.words) else ""
                value = word.partition("=")[2] or following
                places.append((value in message.rpartition("not ")[2], number, origin))
        return max(places, default=(False, 0, ""))[2]

    def _hint(self, unknown: str) -> str:
        if not unknown.startswith("-") or not unknown.strip("-"):
            return "; names of flags start with --, and switches take no value"
        flag = flag_name(unknown.split("=")[0].strip("-").lower())
        known = [flag for action in self._actions for flag in action.option_strings]
        begun = [name for name in known if name.startswith(flag)]
        if meant := begun or difflib.get_close_matches(flag, known, n=1, cutoff=0.75):
            return f"; did you mean {min(meant, key=len)}?"
        others = [script for script, kind in self.scripts.items() if flag in map(flag_name, field_types(kind))]
        return f"; {flag} belongs to {' and '.join(others)}" if others else "; --help shows all flags"


def fail(message: object, status: int = 2) -> NoReturn:
    """Print `error: message` on standard error, in one line, and exit; add the traceback that an error brings.

    If several ranks fail, only the first one prints.
    """
    if first_to_fail():
        say(" ".join(["error:", *str(message).splitlines()]))
        if trace := getattr(message, "trace", ""):
            say(trace.rstrip("\n"))
    raise SystemExit(status)


@contextlib.contextmanager
def errors_in_one_line(tell: Callable[[str], NoReturn] = fail) -> Iterator[None]:
    """End the program at an error in the block: 2 for a user's mistake, 1 for a failure, 128 + N for signal N."""
    try:
        yield
    except ConfigError as error:
        tell(str(error))
    except (DivergedError, EnvError, RankError, WorkerError) as error:
        fail(error, status=1)
    except KeyboardInterrupt as stop:
        raise SystemExit(128 + getattr(stop, "number", signal.SIGINT)) from None


def saved_config(config_class: type, run_dir: Path, settings: dict[str, Any]) -> Any:
    """Return the config of the settings in a run's `config.json`.

    Raises:
        ConfigError: if a setting is unknown or wrong.
    """
    settings = {name: value for name, value in settings.items() if name != "algorithm"}
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"{run_dir} has settings that this version does not know: {', '.join(unknown)}")
    try:
        return config_class(**settings)
    except ConfigError as error:
        raise ConfigError(f"{run_dir / CONFIG_FILE}: {error}") from error


def make_parser(config_class: type, description: str, scripts: dict[str, type]) -> Parser:
    """Return a parser with a flag for each field of a config, and the flags that all algorithms share.

    Flags that are not given are absent from the result, so that a resumed run can tell.
    """
    parser = Parser(scripts=scripts, usage="%(prog)s [--flag value ...]", description=description, add_help=False)
    kinds = field_types(config_class)
    group: argparse._ActionsContainer = parser
    for field in dataclasses.fields(config_class):
        group = parser.add_argument_group(field.metadata["group"]) if field.metadata["group"] else group
        plain, optional = kinds[field.name]
        options: dict[str, Any] = {"help": f"{field.metadata['help']} (default: {as_text(field.default)})"}
        if plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = reader(plain, optional)
            options["metavar"] = {int: "N", float: "X", str: "TEXT", Sizes: "N,N"}[plain]
        group.add_argument(flag_name(field.name), default=argparse.SUPPRESS, **options)
    add = parser.add_argument_group("run").add_argument
    where = "where to write (default: runs/<algorithm>/<env>/<time>-seed<seed>)"
    resume = "go on with the run in this directory; with a larger total, too, which annealed settings then follow"
    seeds = "train with each of several seeds, as in 0-4 or 0,3,7, and print a table; --run-dir is then their parent"
    games = (
        "greedy games after the training, for TensorBoard (default: 10, on Atari 2, if that takes no longer "
        "than a tenth of the training); of Double DQN, only with --eval-frequency none; of RLHF, texts (default: 500)"
    )
    add("--run-dir", type=read_path, metavar="DIR", help=where)
    add("--resume", type=read_path, metavar="RUN_DIR", help=resume)
    add("--seeds", type=read_seeds, metavar="N-N", help=seeds)
    add("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    add("--final-games", type=reader(int), default=argparse.SUPPRESS, metavar="N", help=games)
    add("-h", "--help", action="help", help="show this text")
    return parser


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """Return flags that parse into these arguments."""
    flags = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            flags.append(flag_name(name if value else f"no_{name}"))
        else:
            flags.append(f"{flag_name(name)}={as_text(value)}")
    return flags


def read_path(text: str) -> Path:
    """Return a flag's path, absolute, as environments may change the working directory; '' would mean that one."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not ''")
    return Path(text).absolute()


def reader(plain: type, optional: bool = False) -> Callable[[str], Any]:
    """Return a function that reads one value of a flag."""

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            return tuple(map(int, text.split(","))) if plain == Sizes else plain(text)
        except ValueError:
            noun = "whole numbers as in 24,24" if plain == Sizes else NOUNS[plain]
            raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}") from None

    return read
