"""Fill a queue through the relay's own commit script, as fast as Redis takes it.

    python -m bench.fill REDIS_URL EVENTS BATCH

Two commits are under way at any time, as in the relay's admission, and each event has
an id of its sender's and a customer of its own.
"""

import asyncio
import json
import sys
import time
from secrets import token_hex

from bench.beacons import body
from relay.limits import DEFAULT_LIMITS, parse_limits
from relay.queue import Queue
from relay.queueable import Request, Waiting

IN_FLIGHT = 2
TTL_MS = 72 * 3_600_000  # the default of RELAY_TTL
# The site's limit is a number; as in stack.py.
LIMITS = DEFAULT_LIMITS.replace("site=20000/1m", "site=6000000/1m")


async def fill(url: str, events: int, batch: int) -> dict[str, float]:
    """Commit that many; gives how many Redis took, and the seconds they took."""
    queue = Queue(
        url=url,
        prefix="relay",
        limits=parse_limits(LIMITS),
        dedupe_ms=TTL_MS,
        timeout=10.0,
    )
    nonce = token_hex(6)
    rest = iter(range(0, events, batch))
    taken = 0

    async def commits(slot: str) -> None:
        nonlocal taken
        for seq, first in enumerate(rest, 1):
            last = min(first + batch, events)
            requests = [one(n, nonce) for n in range(first, last)]
            replies = await queue.commit(slot, seq, requests, [])
            taken += sum(reply.codes[0] == 0 for reply in replies)

    start = time.perf_counter()
    await asyncio.gather(*(commits(f"{nonce}:{n}") for n in range(IN_FLIGHT)))
    seconds = time.perf_counter() - start
    await queue.aclose()
    return {"taken": taken, "seconds": seconds}


def one(n: int, nonce: str) -> Request:
    """A request of one event, as the edge hands it on."""
    digest = f"{n:018x}"
    event = Waiting(
        id=f"{nonce}-{n:010}",
        name="cart_abandoned",
        customer=f"{nonce}{n:06x}",  # of the length of a digest
        delivery="at_least_once",
        ttl_ms=TTL_MS,
        lane="normal",
        body=body(n, nonce=nonce).decode(),
    )
    return (digest, [(True, None, event)])


def main() -> None:
    """Fill, and print what came of it."""
    url, events, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.stdout.write(json.dumps(asyncio.run(fill(url, events, batch))) + "\n")


if __name__ == "__main__":
    main()
