"""The environment that `make` builds: every version pinned, nothing imported that workers should not carry."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def pinned_versions() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def needed(name: str, extras: frozenset[str], seen: dict[str, Version]) -> dict[str, Version]:
    """Map everything that a package needs here, itself included, to its installed version."""
    package = distribution(name)
    for line in package.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})
        key = canonicalize_name(requirement.name)
        if wanted and key not in seen:
            seen[key] = Version(distribution(key).version)
            needed(key, frozenset(requirement.extras), seen)
    return seen


def test_every_direct_and_transitive_version_is_pinned_and_installed() -> None:
    pins = pinned_versions()
    installed = needed("minirl", frozenset({"plot", "test", "bench", "mujoco"}), {})
    assert {"torch", "gymnasium", "sympy", "mypy", "matplotlib", "stable-baselines3"} <= installed.keys()
    assert {name: Version(version.public) for name, version in installed.items()} == {
        name: pins.get(name) for name in installed
    }
    assert pins["torch"] == Version("2.13.0")


@pytest.mark.parametrize(
    ("modules", "not_imported"),
    [
        ("minirl, minirl.envs.make, minirl.envs.gridworld", "torch"),
        ("minirl.q_learning, minirl.dqn, minirl.ppo, minirl.rlhf, minirl.evaluate", "torch._dynamo"),  # two seconds
    ],
)
def test_nobody_waits_for_what_is_not_used(modules: str, not_imported: str) -> None:
    code = f"import sys, {modules}; print({not_imported!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
