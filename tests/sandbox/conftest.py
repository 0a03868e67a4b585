"""One server for each module; every test gets it as if it were new."""

from collections.abc import AsyncIterator

import pytest

from tests.sandbox.support import Caller, calling


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def serving(anyio_backend: str) -> AsyncIterator[Caller]:  # noqa: ARG001  # anyio wants it named
    async with calling() as caller:
        yield caller


@pytest.fixture
def caller(serving: Caller) -> Caller:
    serving.sandbox.reset()
    return serving
