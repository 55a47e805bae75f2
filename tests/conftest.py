"""What holds for all tests."""

import os

import pytest

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone():
    """A training inside the test process makes it a rank; the processes that later tests start must not take themselves for one."""
    for name in RENDEZVOUS:
        os.environ.pop(name, None)
    yield
    for name in RENDEZVOUS:
        os.environ.pop(name, None)
