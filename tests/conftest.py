"""Being here puts tests/ on the import path, so that every test can import the launch helper."""

import os
import signal

import pytest


def pytest_configure():
    """A run in the background is started with SIGINT ignored, and every process that it starts would ignore it too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def nothing_left_in_shared_memory():
    before = set(os.listdir("/dev/shm"))
    yield
    assert {name for name in set(os.listdir("/dev/shm")) - before if "sidp" in name} == set()
