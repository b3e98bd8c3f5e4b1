"""Runs the quick tests with every Python here, and with the lowest and the newest packages that setup.cfg allows.

    python -m tests.versions
    python -m tests.versions --python 3.12

Each combination is a new environment in a temporary directory, some gigabytes of downloads. At the end a line for each
says how its tests went, or why it was not tried: for example, NumPy 2.0 is not made for Python 3.13.
"""

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# The deselected test is about the pinned versions, which these are not.
TESTS = [
    "-m",
    "not slow",
    "--deselect",
    "tests/test_setup.py::test_every_direct_and_transitive_version_is_pinned_and_installed",
]


def find_python(version: str) -> str | None:
    """Return an interpreter of this version: the one on the path, or one that pyenv has but does not expose."""
    hidden = Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")
    for python in [shutil.which(f"python{version}") or "", *map(str, hidden)]:
        if python and subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return python  # pyenv's shims fail if no version is chosen
    return None


def lowest_versions() -> list[str]:
    """Return what the package needs at run time, each constrained to the lowest minor version in setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return [line.replace(" >= ", "==") + ".*" for line in settings["options"]["install_requires"].split("\n") if line]


def outcome(python: str, constraints: list[str]) -> tuple[bool, str]:
    """Install into a new environment and run the quick tests; return whether none failed, and a line about it."""
    with tempfile.TemporaryDirectory() as directory:
        environment = Path(directory) / "environment"
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
        binaries = environment / ("Scripts" if sys.platform == "win32" else "bin")
        (Path(directory) / "constraints.txt").write_text("\n".join(constraints))
        pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
        pip += ["--constraint", str(Path(directory) / "constraints.txt")]
        pip += ["--editable", f"{ROOT}[plot,test,bench,mujoco]"]
        installed = subprocess.run(pip, capture_output=True, text=True)
        if installed.returncode != 0:
            reasons = [line for line in installed.stderr.splitlines() if line.startswith("ERROR")]
            return True, f"not tried: {(reasons or ['it can not be installed'])[0]}"
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        pytest = [str(binaries / "python"), "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
        result = subprocess.run(pytest, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
        print(result.stdout, flush=True)
        return result.returncode == 0, re.sub("=+ | =+", "", result.stdout.splitlines()[-1])


def main() -> None:
    """Try all combinations; exit with status 1 if tests failed in one."""
    parser = argparse.ArgumentParser(description="The quick tests with each Python, lowest and newest packages.")
    parser.add_argument("--python", choices=PYTHONS, action="append", help="only this version (default: all)")
    lines, good = [], True
    for version in parser.parse_args().python or PYTHONS:
        python = find_python(version)
        for name, constraints in {"lowest": lowest_versions(), "newest": []}.items():
            passed, said = outcome(python, constraints) if python else (True, "not tried: there is no such Python here")
            good = good and passed
            lines.append(f"Python {version}, {name} packages: {said}")
    print("\n".join(lines))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
