"""The open loop: requests at a fixed rate, whether or not the server keeps up.

    python -m bench.generator '{"port": …, "rate": 2000, "seconds": 5, …}'

Each latency counts from the moment at which its request was due, so a server that
stalls is charged for all that had to wait (no coordinated omission). wrk2 and oha can
do that and are in no registry that this project installs from; autocannon is, and
estimates it afterwards. Without a rate it sends a burst: all at once, each event once.

It polls without sleeping, since a timer of a millisecond would be all that a fast
server shows, and with the lowest priority (SCHED_IDLE), so that Redis on the same core
does not wait for it. What Redis takes makes the generator late; that lateness counts
as the server's.
"""

import errno
import json
import os
import select
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from bench.beacons import request

TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to send."""

    port: int
    path: str = "/track"
    nonce: str
    connections: int = 64
    rate: float | None = None  # a second; None: a burst
    seconds: float = 0.0
    total: int = 0  # of a burst
    warm_up_s: float = 0.0  # sent and not counted
    within_s: float = 0.0  # of a burst: what is not answered by then is lost


@dataclass(slots=True)
class Connection:
    """One connection, with at most one request on it."""

    sock: socket.socket
    due: float = 0.0
    busy: bool = False
    buffer: bytearray = field(default_factory=bytearray)


class Generator:
    """Sends a plan over raw sockets; a library would cost more than the server."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._poll = select.epoll()
        self._by_fd: dict[int, Connection] = {}
        self._free: deque[Connection] = deque()
        self._sent = 0
        self.statuses: Counter[int] = Counter()
        self.lost = 0  # no answer: closed, reset, or silent for too long
        self.latencies: list[float] = []
        self.lateness: list[float] = []  # of the generator, before each sending

    def run(self) -> None:
        """Send everything and wait for the answers."""
        try:
            self._send_all()
        finally:
            self._poll.close()
            for connection in self._by_fd.values():
                connection.sock.close()

    def _send_all(self) -> None:
        for _ in range(self._plan.connections):
            self._free.append(self._connect())
        start = time.perf_counter() + 0.01
        self._count_from = start + self._plan.warm_up_s
        step = 1 / self._plan.rate if self._plan.rate else 0.0
        total = self._plan.total or round(
            (self._plan.warm_up_s + self._plan.seconds) / step
        )
        looked = start
        while self._sent < total or any(c.busy for c in self._by_fd.values()):
            now = time.perf_counter()
            if self._plan.within_s and now - start > self._plan.within_s:
                break
            while self._free and self._sent < total:
                due = start + self._sent * step
                if due > now:
                    break
                self._send(self._free.popleft(), due if step else now, now)
            # A burst waits for answers; a rate has its next request to look out for.
            for fd, _ in self._poll.poll(0.05 if not step else 0):
                self._read(self._by_fd[fd])
            if now - looked > 1.0:
                looked = now
                self._give_up(now)

    def _connect(self) -> Connection:
        sock = socket.create_connection(("127.0.0.1", self._plan.port), timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        made = Connection(sock)
        self._by_fd[sock.fileno()] = made
        self._poll.register(sock.fileno(), select.EPOLLIN)
        return made

    def _send(self, connection: Connection, due: float, now: float) -> None:
        self._sent += 1
        connection.due, connection.busy = due, True
        self.lateness.append(now - due)
        data = request(
            self._sent,
            nonce=self._plan.nonce,
            path=self._plan.path,
            port=self._plan.port,
        )
        try:
            # A beacon is far smaller than a socket's buffer.
            connection.sock.send(data)
        except OSError:
            self._lose(connection)

    def _read(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return
            data = b""
        if not data:
            self._lose(connection)
            return
        connection.buffer += data
        answer = read_answer(connection.buffer)
        if answer is None:
            return
        status, keeps = answer
        connection.buffer.clear()
        now = time.perf_counter()
        if connection.due >= self._count_from:
            self.statuses[status] += 1
            self.latencies.append(now - connection.due)
        connection.busy = False
        if keeps:
            self._free.append(connection)
        else:
            self._replace(connection)

    def _lose(self, connection: Connection) -> None:
        if connection.busy:
            self.lost += 1
        self._replace(connection)

    def _replace(self, connection: Connection) -> None:
        self._poll.unregister(connection.sock.fileno())
        del self._by_fd[connection.sock.fileno()]
        if connection in self._free:
            self._free.remove(connection)
        connection.sock.close()
        self._free.append(self._connect())

    def _give_up(self, now: float) -> None:
        for connection in list(self._by_fd.values()):
            if connection.busy and now - connection.due > TIMEOUT_S:
                self._lose(connection)


def read_answer(buffer: bytes | bytearray) -> tuple[int, bool] | None:
    """Status, and whether the connection is kept; None: not whole yet."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(buffer[:end]).lower()
    status = int(head[9:12])
    keeps = b"connection: close" not in head
    if b"transfer-encoding: chunked" in head:
        return (status, keeps) if buffer.endswith(b"0\r\n\r\n") else None
    at = head.find(b"content-length:")
    length = 0 if at < 0 else int(head[at + 15 :].split(b"\r\n", 1)[0])
    return (status, keeps) if len(buffer) >= end + 4 + length else None


def summary(generator: Generator) -> dict[str, object]:
    """What the generator saw, as JSON: milliseconds and counts."""
    latencies = sorted(generator.latencies)
    lateness = sorted(generator.lateness)

    def at(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))] * 1000

    return {
        "statuses": {str(status): n for status, n in generator.statuses.items()},
        "lost": generator.lost,
        "answered": len(latencies),
        "p50_ms": at(latencies, 0.5) if latencies else 0.0,
        "p99_ms": at(latencies, 0.99) if latencies else 0.0,
        "p999_ms": at(latencies, 0.999) if latencies else 0.0,
        "late_p99_ms": at(lateness, 0.99),
    }


def main() -> None:
    """Send the plan on the command line and print what came of it."""
    plan = Plan(**json.loads(sys.argv[1]))
    if plan.rate:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    generator = Generator(plan)
    generator.run()
    sys.stdout.write(json.dumps(summary(generator)) + "\n")


if __name__ == "__main__":
    main()
