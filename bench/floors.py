"""The floor: a bare uvicorn application that reads the body and answers 204.

Run with the relay's own uvicorn configuration, so that only the application differs.
"""

import socket
import sys

import uvicorn
from starlette.types import Receive, Scope, Send

from relay.serving import server_config


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body and answer 204."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def main() -> None:
    """Serve it on the port that the command line names."""
    sock = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=2048)
    uvicorn.Server(server_config(app)).run(sockets=[sock])


if __name__ == "__main__":
    main()
