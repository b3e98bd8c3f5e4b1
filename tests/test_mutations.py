"""`benchmarks/mutations.txt` changes code that is there. That each turns the tests red is for the script to say."""

import collections

import mutations
import pytest
from mutations import MUTATIONS, ROOT, Mutation


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTATIONS) >= 60
    assert collections.Counter(mutation.name for mutation in MUTATIONS).most_common(1)[0][1] == 1


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_what_a_mutation_changes_stands_once_in_its_file(mutation: Mutation) -> None:
    source = (ROOT / mutation.file).read_text()
    changed = mutation.changed(source)
    assert changed != source
    compile(changed, mutation.file, "exec")
    assert mutation.tests
    assert all((ROOT / test).is_file() for test in mutation.tests)


def test_what_stands_there_twice_or_not_at_all_is_an_error() -> None:
    (mutation,) = mutations.read_mutations("== a.py tests/b.py\n\nit adds\n- x - y\n-\n- z\n+ x + y\n")
    assert tuple(mutation) == ("it adds", "a.py", ("tests/b.py",), "x - y\n\nz", "x + y")
    assert mutation.changed("a\nx - y\n\nz\n") == "a\nx + y\n"
    for source in ("a\n", "x - y\n\nz x - y\n\nz"):
        with pytest.raises(ValueError, match=r"it adds .*: a.py must have this once, not [02] times"):
            mutation.changed(source)
