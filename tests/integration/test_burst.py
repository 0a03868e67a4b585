"""A burst is answered in milliseconds and delivered once, every event of it."""

from collections import Counter
from pathlib import Path

import pytest

from tests.integration.stack import Sender, stack

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

EVENTS, CONNECTIONS = 10_000, 200


async def test_ten_thousand_events_from_200_connections_arrive_once_each(
    valkey_url: str, prefix: str, tmp_path: Path
) -> None:
    async with (
        stack(valkey_url, prefix, tmp_path) as relay,
        Sender(CONNECTIONS) as sender,
    ):
        url = await relay.start("serve").track_url()
        await sender.send_all(url, range(EVENTS))
        assert sender.statuses == {202: EVENTS}
        await relay.drained(within=180)
        assert Counter(relay.delivered_ids()) == Counter(map(str, range(EVENTS)))
        assert await relay.bench.totals() == {"received": EVENTS, "delivered": EVENTS}
