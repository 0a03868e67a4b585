"""The floor: a bare uvicorn application that reads the body and answers 204.

It has the options that the relay gives uvicorn, written out here: should the relay one
day run something else, the floor stays what it is.
"""

import socket
import sys

import uvicorn
from starlette.types import Receive, Scope, Send


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


def config() -> uvicorn.Config:
    """Uvicorn with its fast parser and loop, and nothing that costs beside."""
    return uvicorn.Config(
        app,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        backlog=2048,
    )


def main() -> None:
    """Serve it on the port that the command line names."""
    sock = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=2048)
    uvicorn.Server(config()).run(sockets=[sock])


if __name__ == "__main__":
    main()
