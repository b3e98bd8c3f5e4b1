"""Settings from `recipes/`."""

import dataclasses
from typing import Any

from minirl.evaluate import TRAINING_SCRIPTS
from minirl.runs.flags import make_parser
from minirl.runs.settings import RECIPES


def parsed(script: str, *argv: str) -> tuple[Any, dict[str, Any]]:
    """Parse flags as a script does; return the config, and the settings that were given."""
    config_class = TRAINING_SCRIPTS[script]
    given = vars(make_parser(config_class, "", TRAINING_SCRIPTS).parse_args(list(argv)))
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in given.items() if name in fields}
    return config_class(**settings), settings


def recipe(name: str) -> Any:
    """Return the config of a recipe, by its file's name without the suffix."""
    return parsed(f"train_{name.split('-')[0]}.py", f"@{RECIPES / name}.args")[0]
