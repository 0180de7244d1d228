"""Being here puts tests/ on the import path, so that every test can import the launch helper."""

import os

import pytest


@pytest.fixture
def nothing_left_in_shared_memory():
    before = set(os.listdir("/dev/shm"))
    yield
    assert {name for name in set(os.listdir("/dev/shm")) - before if "sidp" in name} == set()
