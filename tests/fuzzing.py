"""Runs a check on many made-up values: hundreds always, thousands in tests that are marked slow."""

import random
import resource
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

_SECONDS = 30  # a case takes milliseconds; what loops without an end is to fail rather than to hang
_MIB = 512  # that all cases together may add to the memory of the process

# What JSON can hold, and people do not expect.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 7, 2**31, 2**53, 2**64, 10**30, 1e308, -0.0, float("inf"), float("nan")]),
    st.integers(-100, 100),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "/etc/passwd", "../x", "__class__", "\0", "{}", "%s", "x" * 9999]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# Which place of a tree is changed, how, and to what.
CHANGES = st.lists(
    st.tuples(st.integers(0, 2**32), st.sampled_from(["set", "set", "delete", "add"]), VALUES),
    min_size=1,
    max_size=3,
)
# Changes of bytes: where, as a share; how many are cut; what is put there.
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 1, 7, 10**6]), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)


def fuzzed(values: st.SearchStrategy, *, few: int = 200, many: int = 5000) -> Callable:
    """Makes a test of a check(value, folder) that must not fail for any of the values."""

    def decorate(check: Callable[[Any, Any], None]) -> Callable:
        @pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(count, tmp_path):
            @settings(
                max_examples=count,
                deadline=1000 * _SECONDS,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate,),  # smaller examples would take minutes to be found
            )
            @given(values)
            def run(value):
                check(value, tmp_path)

            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert after - before < _MIB * 1024

        return test

    return decorate


def changed(tree: Any, changes: list[tuple[int, str, Any]]) -> Any:
    """A tree of JSON after changes of places that are in it; the tree itself is used up."""
    for number, how, value in changes:
        places: list[tuple[Any, Any]] = []
        _places(tree, places)
        if not places:
            break
        where, key = places[random.Random(number).randrange(len(places))]
        if how == "add" and isinstance(where, dict):
            where[f"new{number % 7}"] = value
        elif how == "delete" and isinstance(where, dict):
            del where[key]
        else:
            where[key] = value
    return tree


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Bytes after edits."""
    for share, cut, put in edits:
        at = int(share * len(content))
        content = content[:at] + put + content[at + cut :]
    return content


def check_error(error: Exception, *words: str) -> None:
    """What a person is told is short, and names what is wrong."""
    text = str(error)
    assert len(text) < 1000
    assert 1 <= len(text.splitlines()) <= 3
    for word in words:
        assert word in text


def _places(tree: Any, found: list[tuple[Any, Any]]) -> None:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in pairs:
        found.append((tree, key))
        _places(inner, found)
