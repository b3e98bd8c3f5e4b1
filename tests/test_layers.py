"""The layers of the package: which module may import which. Imports go downwards, and never in a circle."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Lowest first; each layer has modules or packages whose files may import each other.
FLOORS = [
    ("minirl",),  # the package's own __init__, not all that is in it
    ("minirl.checks", "minirl.streams"),
    ("minirl.envs",),
    ("minirl.distributed",),
    ("minirl.fast",),
    ("minirl.networks", "minirl.normalize", "minirl.replay", "minirl.rollout"),
    ("minirl.runs",),
    ("minirl.texts", "minirl.transformer"),
    ("minirl.results",),
    ("minirl.q_learning", "minirl.dqn", "minirl.ppo"),
    ("minirl.rlhf",),  # with the loss and the advantages of minirl.ppo
    ("minirl.evaluate",),
    ("minirl.plots",),
    ("minirl.scripts",),
    ("train_q", "train_dqn", "train_ppo", "train_rlhf"),
]
STRANGERS = {"minirl.q_learning", "minirl.dqn", "minirl.ppo"}  # on one floor, and yet they don't import each other

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*ROOT.glob("minirl/**/*.py"), *ROOT.glob("train_*.py")]
}


def floor_of(module: str) -> int:
    """The number of a module's floor."""
    for number, prefixes in enumerate(FLOORS):
        if module in prefixes or any(module.startswith(f"{prefix}.") for prefix in prefixes if prefix != "minirl"):
            return number
    raise AssertionError(f"{module} stands on no floor")


def imported_by(module: str) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            assert not start.startswith("."), f"{module} imports from {start}: a module's name is written out"
            found |= {inner if (inner := f"{start}.{name.name}") in FILES else start for name in node.names}
    ours = {name for name in found if name.split(".")[0] in ("minirl", *FLOORS[-1])}
    assert ours <= FILES.keys(), f"{module} imports {sorted(ours - FILES.keys())}"
    return ours


def test_imports_run_downwards_and_in_no_circle() -> None:
    imports = {module: imported_by(module) for module in FILES}
    assert "minirl.ppo" in imports["train_ppo"], "an import within a function counts"
    assert "minirl.evaluate" in imports["minirl.plots.of_run"]
    floors = {module: floor_of(module) for module in FILES}
    upwards = [
        f"{module} imports {other}"
        for module, others in sorted(imports.items())
        for other in sorted(others)
        if floors[other] > floors[module] or {module, other} <= STRANGERS
    ]
    assert not upwards, "\n".join(upwards)
    graphlib.TopologicalSorter(imports).prepare()  # an error names the circle
