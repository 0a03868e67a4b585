"""Fixtures that every test may use. Real servers only; nothing is mocked."""

import pytest

from tests.servers import prefix, redis_url, valkey_url  # noqa: F401  # fixtures


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
