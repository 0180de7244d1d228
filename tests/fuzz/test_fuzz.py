"""The corpus, and some hundred inputs by chance, through every fuzz target; the gate runs them longer (fuzz.py)."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parent))
import fuzz
import targets


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_any_bytes_are_taken_or_refused(name):
    for data in targets.seeds(name):
        targets.TARGETS[name](data)
    assert fuzz.by_chance(targets.TARGETS[name], targets.seeds(name), 5, seed=1, most=1500) > 50


def test_a_reader_that_raises_is_found():
    def wrong(data):
        if b"9" * 300 in data:
            raise OverflowError("a number that does not fit")

    with pytest.raises(OverflowError):
        fuzz.by_chance(wrong, [b'{"a": 1}'], 20, seed=1)
