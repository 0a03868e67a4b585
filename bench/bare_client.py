"""The floor of delivery: the relay's own transport with nothing around it.

    python -m bench.bare_client URL CALLS CONCURRENCY [rarely]

The same connections, timeouts and headers as the forwarder; no queue, no budget.
With `rarely`, Python's garbage collector looks as rarely as in the relay.
"""

import asyncio
import sys

import httpx
import uvloop
from pydantic import SecretStr

from bench.beacons import body
from relay.cluster import Keys, event_headers
from relay.collector import look_rarely
from relay.replies import Reply
from relay.transport import Transport


async def send(url: str, calls: int, concurrency: int) -> None:
    """Make that many calls. Raises when one fails."""
    transport = Transport(max_connections=concurrency)
    target = httpx.URL(f"{url}/client/v1/events")
    keys = Keys(app_id="sandbox-application", token=SecretStr("sandbox-token"))
    headers = httpx.Headers(event_headers("client", "shop.example", keys))
    rest = iter(range(calls))

    async def some() -> None:
        for n in rest:
            said = await transport.request(
                "POST", target, headers, body(n, nonce="bare")
            )
            assert isinstance(said, Reply), said
            assert said.status == 200, said

    await asyncio.gather(*(some() for _ in range(concurrency)))
    await transport.aclose()


def main() -> None:
    """Send what the command line says."""
    if "rarely" in sys.argv[4:]:
        look_rarely()
    uvloop.run(send(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))


if __name__ == "__main__":
    main()
