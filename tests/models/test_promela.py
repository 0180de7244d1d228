"""The protocols as small Promela models (docs/models), searched in full by SPIN; and each invariant shown to bite.

A model names its mutations: `#ifdef MUTATE_X` is a way to get the protocol wrong, and the checker must find it.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "models"
MODELS = sorted(path.stem for path in FOLDER.glob("*.pml"))
DEADLINE_S = 240

pytestmark = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("cc") is None,
    reason="needs the model checker spin (Debian: apt-get install spin) and a C compiler",
)


def mutations(name):
    return sorted(set(re.findall(r"#ifn?def (MUTATE_\w+)", (FOLDER / f"{name}.pml").read_text())))


def search(name, folder, *defines):
    """(errors found, text of the first one): an assertion violated, or an end in which somebody waits for ever."""
    level = "-O0" if defines else "-O2"  # a mutation is found after few states
    words = [f"-D{define}" for define in defines]
    for command in (["spin", *words, "-a", FOLDER / f"{name}.pml"], ["cc", level, "-DSAFETY", "-o", "pan", "pan.c"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=DEADLINE_S)
    ran = subprocess.run(["./pan", "-m100000"], cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "max search depth too small" not in ran.stdout and "out of memory" not in ran.stdout, ran.stdout
    found = int(re.search(r"errors: (\d+)", ran.stdout).group(1))
    states = float(re.search(r"([\d.e+]+) states, stored", ran.stdout).group(1))
    first = re.search(r"^pan:1: (.*)$", ran.stdout, re.MULTILINE)
    return found, states, first.group(1) if first else ""


def test_every_protocol_has_a_model():
    assert MODELS == ["life", "mailbox", "recovery", "relaunch", "slot", "turns"]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_holds_in_every_state(name, tmp_path):
    found, states, first = search(name, tmp_path)
    assert found == 0, first
    assert states > 1000  # a model whose processes never start holds too


@pytest.mark.parametrize(("name", "mutation"), [(name, wrong) for name in MODELS for wrong in mutations(name)])
def test_a_wrong_protocol_is_found(name, mutation, tmp_path):
    found, _, first = search(name, tmp_path, mutation)
    assert found > 0 and ("assertion violated" in first or "invalid end state" in first)
