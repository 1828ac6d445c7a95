import pytest

from tests.server.served import running


@pytest.fixture(scope="module")
def server():
    with running(max_choices=8) as found:
        yield found


@pytest.fixture
def client(server):
    """Speaks to the server of the module, which is idle before and after."""
    with server.client() as found:
        yield found
    server.engine.may_go.set()
    server.wait_until_idle()
