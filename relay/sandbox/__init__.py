"""A fake Voucherify cluster, as strict as the published documentation.

It takes custom events as Voucherify does, answers with its bodies, limits and
headers, keeps what it received for inspection, and fails on demand. It is an
independent reading of the documentation: it shares no code with the relay, so that
a misreading on one side shows as a failing test. It is not Voucherify: it computes
no points and sends no messages. State lives in one process and ends with it.
"""

from relay.sandbox.app import Sandbox
from relay.sandbox.config import (
    APPLICATION_ID,
    CLIENT_TOKEN,
    OAUTH_APP_ID,
    OAUTH_APP_SECRET,
    ORIGIN,
    PROJECT_ID,
    SERVER_APP_ID,
    SERVER_APP_TOKEN,
    Property,
    SandboxConfig,
)
from relay.sandbox.faults import Fault
from relay.sandbox.server import (
    PROTOCOL,
    RunningSandbox,
    SandboxServer,
    serve_sandbox,
    server_config,
)
from relay.sandbox.strict import UnexpectedTraffic

__all__ = [
    "Sandbox",
    "SandboxConfig",
    "Property",
    "Fault",
    "UnexpectedTraffic",
    "PROTOCOL",
    "RunningSandbox",
    "SandboxServer",
    "serve_sandbox",
    "server_config",
    "APPLICATION_ID",
    "CLIENT_TOKEN",
    "SERVER_APP_ID",
    "SERVER_APP_TOKEN",
    "OAUTH_APP_ID",
    "OAUTH_APP_SECRET",
    "PROJECT_ID",
    "ORIGIN",
]
