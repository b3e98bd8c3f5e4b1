"""Settings: a frozen dataclass in which every field has a default, one line of help and a range of values.

@dataclass(frozen=True)
class Config:
    gamma: float = setting(0.99, "discount factor", at_least=0, at_most=1, group="returns")

    def __post_init__(self) -> None:
        check_settings(self)
"""

import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any

import minirl
from minirl.checks import ConfigError
from minirl.envs.ids import is_atari

MAX_THREADS = 1_024  # far beyond it, PyTorch fails with its own error
MAX_WHOLE = 10**12  # for any whole number: no run is as long, and floats are exact far beyond it
Sizes = tuple[int, ...]  # as a flag: 24,24
NOUNS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Sizes: "whole numbers with commas between them, each",
}


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    group: str | None = None,
) -> Any:
    """Declare one field of a config: its default, one line of help, and the range or the choices of its values.

    `group` is a heading in `--help`, above this field and those that follow.
    """
    limits = {"at_least": at_least, "at_most": at_most, "above": above}
    metadata = {"help": help, "limits": limits, "choices": choices, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """Return the command-line flag of a field: `total_timesteps` -> `--total-timesteps`."""
    return "--" + field_name.replace("_", "-")


def as_text(value: Any) -> str:
    """Return a setting as one writes it on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def field_types(config_class: type) -> dict[str, tuple[type, bool]]:
    """Map each field's name to its plain type and whether None is allowed (`float | None` -> float, True).

    Raises:
        TypeError: naming a field that is not declared by `setting`, or whose type flags do not support.
    """
    result = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint, where = hints[field.name], f"{config_class.__name__}.{field.name}"
        parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        plain = [part for part in parts if part is not type(None)]
        if len(plain) != 1 or plain[0] not in NOUNS:
            allowed = "int, float, bool, str or tuple[int, ...], or one of these and None"
            raise TypeError(f"{where} must be of type {allowed}, not {hint}")
        if "limits" not in field.metadata:
            raise TypeError(f'{where} must be declared as setting({field.default!r}, "what it is")')
        result[field.name] = (plain[0], len(plain) < len(parts))
    return result


def check_settings(config: Any) -> None:
    """Check each field's type, range and choices.

    Raises:
        ConfigError: naming the first field that is wrong, as its flag, and what would be right.
    """
    kinds = field_types(type(config))
    for field in dataclasses.fields(config):
        plain, optional = kinds[field.name]
        value = getattr(config, field.name)
        if value is None and optional:
            continue
        limits = field.metadata["limits"]
        if not (_has_type(value, plain) and _in_range(value, **limits)):
            wanted = _describe(plain, **limits) + (" or none" if optional else "")
            raise ConfigError(f"{flag_name(field.name)} must be {wanted}, not {value!r}")
        choices = field.metadata["choices"]
        if choices is not None and value not in choices:
            wanted = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ConfigError(f"{flag_name(field.name)} must be {wanted}, not {value!r}")
        if plain in (int, Sizes) and not _in_range(value, None, MAX_WHOLE, None):
            raise ConfigError(f"{flag_name(field.name)} must be at most {MAX_WHOLE}, not {value!r}")


def require_default(config: Any, *names: str, because: str) -> None:
    """Raise a ConfigError, naming the flags, if one of these settings was chosen: here it would do nothing."""
    if any(getattr(config, name) != getattr(type(config), name) for name in names):
        raise ConfigError(f"{' and '.join(map(flag_name, names))} must be left out: {because}")


def _has_type(value: Any, plain: type) -> bool:
    if plain == Sizes:
        return isinstance(value, tuple) and all(_has_type(size, int) for size in value)
    if plain is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, plain)


def _in_range(value: Any, at_least: float | None, at_most: float | None, above: float | None) -> bool:
    if isinstance(value, tuple):
        return all(_in_range(size, at_least, at_most, above) for size in value)
    large_enough = (at_least is None or value >= at_least) and (above is None or value > above)
    return large_enough and (at_most is None or value <= at_most)


def _describe(plain: type, at_least: float | None, at_most: float | None, above: float | None) -> str:
    if at_least is not None and at_most is not None:
        return f"{NOUNS[plain]} from {at_least} to {at_most}"
    limits = {"of at least": at_least, "above": above, "of at most": at_most}
    given = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    return f"{NOUNS[plain]} {given}".strip()


# Settings that change no result, or only how long a run is, or which games are played beside it.
NO_RECIPE = {
    *("env_id", "seed", "total_timesteps", "num_episodes", "compile", "precision", "num_workers", "num_threads"),
    *("eval_frequency", "eval_episodes", "confirm_episodes", "checkpoint_frequency", "video_frequency"),
}
RECIPES = Path(minirl.__file__).parents[1] / "recipes"  # files of flags, in a clone


def recipe_note(algorithm: str, config: Any) -> str | None:
    """Return a line on where to find settings for a task that the defaults are not for; None if some were chosen."""
    if not hasattr(config, "env_id"):
        return None
    defaults = type(config)()
    chosen = {name for name, value in vars(config).items() if value != vars(defaults)[name]}
    of_its_kind = is_atari(config.env_id) and is_atari(defaults.env_id)
    if "env_id" not in chosen or chosen - NO_RECIPE or of_its_kind:
        return None
    files = sorted(RECIPES.glob(f"{algorithm.split('_')[0]}-*.args"))
    fitting = [
        f"@recipes/{file.name}" for file in files if f"--env-id {config.env_id}" in file.read_text().splitlines()
    ]
    others = "; recipes/ has better ones for some tasks" if files else ""
    where = f"; better ones: {' or '.join(fitting)}" if fitting else others
    return f"all settings are the defaults, which are for {defaults.env_id}{where}"


def length_setting(config: Any) -> str:
    """Return the name of the setting that says how long a run is."""
    return "total_timesteps" if hasattr(config, "total_timesteps") else "num_episodes"


def new_schedules(before: dict[str, Any], config: Any, done: float) -> str | None:
    """Return a line on how a changed total affects a run's schedules; None if it is unchanged or there are none.

    Args:
        before: the settings so far.
        config: the settings from here on.
        done: the share of the new total that is done.
    """
    name = length_setting(config)
    total = getattr(config, name)
    annealed = [name for name, value in vars(config).items() if name.startswith("anneal_") and value]
    parts = []
    if annealed:
        parts.append(f"{', '.join(annealed)}: from {1 - done:.0%} of the start value here to 0 at the new end")
    if hasattr(config, "exploration_fraction") and config.epsilon_decay is None:
        parts.append(f"epsilon: falls until {config.exploration_fraction:.0%} of the new total")
    if before.get(name) == total or not parts:
        return None
    return f"{name} is {total:,} now, and schedules follow it; {'; '.join(parts)}"
