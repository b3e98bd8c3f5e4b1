"""Do the quick tests notice wrong code? Changes one line at a time, and runs the tests that should fail.

    python benchmarks/mutations.py                     # all of mutations.txt
    python benchmarks/mutations.py --only GAE          # those whose name contains this
    python benchmarks/mutations.py --only GAE --whole  # with all quick tests, not only those that should notice

Each mutation is a plausible mistake in a line of the maths, the memory, the wrappers or the checkpoints, made in a copy
of the repository. One that survives shows a line that no test checks: it needs one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from minirl.envs.vector import available_cores

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """A piece of code that occurs once in its file, and its replacement; `tests` are the files that should notice."""

    name: str
    file: str
    tests: tuple[str, ...]
    old: str
    new: str

    def changed(self, source: str) -> str:
        """Return the source with the mutation applied.

        Raises:
            ValueError: if the code that it changes does not occur exactly once.
        """
        if (count := source.count(self.old)) != 1:
            where = f"{self.name} (benchmarks/mutations.txt): {self.file}"
            raise ValueError(f"{where} must have this once, not {count} times:\n{self.old}")
        return source.replace(self.old, self.new)


def read_mutations(text: str) -> list[Mutation]:
    """Read paragraphs: `== FILE TEST_FILE ...` applies to those below, each a name, then `- ` and `+ ` lines."""
    mutations = []
    file, tests = "", [""]
    for paragraph in text.strip().split("\n\n"):
        name, *lines = paragraph.splitlines()
        if name.startswith("== "):
            file, *tests = name.split()[1:]
            continue
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        mutations.append(Mutation(name, file, tuple(tests), old, new))
    return mutations


MUTATIONS = read_mutations(Path(__file__).with_suffix(".txt").read_text())


def run_tests(tests: tuple[str, ...], mutation: Mutation | None = None, *, slow: bool = False) -> tuple[int, str]:
    """Run tests in a copy, with a mutation or without; return pytest's status, and the first test that failed.

    Raises:
        ValueError: if the code that the mutation changes does not occur exactly once in its file.
    """
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for file in listed.splitlines():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
        if mutation is not None:
            path = copy / mutation.file
            path.write_text(mutation.changed(path.read_text()))
        # One thread each, because several run side by side.
        environment = {**os.environ, "PYTHONPATH": directory, "OMP_NUM_THREADS": "1"}
        chosen = [] if slow else ["-m", "not slow"]
        command = [sys.executable, "-m", "pytest", "-x", "-q", *chosen, "-p", "no:cacheprovider", *tests]
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    said = result.stdout.splitlines() or result.stderr.splitlines()
    return result.returncode, next((line for line in said if line.startswith(("FAILED", "ERROR"))), *said[-1:])


def main() -> None:
    """Run the tests without a mutation, then with each; print which make them fail. Status 1 if one does not."""
    parser = argparse.ArgumentParser(description="Change one line at a time, and see whether the quick tests notice.")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutations whose name has this in it")
    parser.add_argument("--whole", action="store_true", help="run all quick tests, not only those that should notice")
    parser.add_argument("--slow", action="store_true", help="the slow tests, too")
    given = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if given.only in mutation.name]
    named = {test for mutation in chosen for test in mutation.tests}
    status, said = run_tests(() if given.whole else tuple(sorted(named)), slow=given.slow)
    if status != 0:
        raise SystemExit(f"error: the tests must pass without a mutation: {said}")
    survived = 0
    with ThreadPoolExecutor(available_cores()) as pool:
        results = pool.map(
            lambda mutation: run_tests(() if given.whole else mutation.tests, mutation, slow=given.slow), chosen
        )
        for mutation, (status, said) in zip(chosen, results, strict=True):
            red = status == 1 or status < 0  # a test failed, or a signal ended them; otherwise they could not be run
            survived += not red
            print(f"{'red' if red else 'SURVIVED'}  {mutation.file}: {mutation.name}: {said}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations turn the tests red")
    raise SystemExit(survived > 0)


if __name__ == "__main__":
    main()
