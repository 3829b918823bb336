import pytest

from scripted_server import Server


@pytest.fixture(scope="module")
def server():
    """A server that answers by a script."""
    with Server() as server:
        yield server
