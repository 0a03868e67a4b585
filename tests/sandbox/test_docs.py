"""The sandbox's document names everything there is, as it is."""

from pathlib import Path
from typing import get_args

import pytest

from relay.sandbox import Fault, Sandbox, SandboxConfig
from relay.sandbox.config import (
    APPLICATION_ID,
    CLIENT_TOKEN,
    OAUTH_APP_ID,
    OAUTH_APP_SECRET,
    ORIGIN,
    PROJECT_ID,
    SERVER_APP_ID,
    SERVER_APP_TOKEN,
)
from relay.sandbox.control import routes_of
from relay.sandbox.faults import Malformed, Moment
from relay.sandbox.oauth import PATHS
from relay.sandbox.strict import Kind

TEXT = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text("utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *SandboxConfig.__struct_fields__,
        *Fault.__struct_fields__,
        *get_args(Malformed),
        *get_args(Moment),
        *(kind.value for kind in Kind),
        APPLICATION_ID,
        CLIENT_TOKEN,
        ORIGIN,
        PROJECT_ID,
        SERVER_APP_ID,
        SERVER_APP_TOKEN,
        OAUTH_APP_ID,
        OAUTH_APP_SECRET,
        *(f"POST {path}" for path in sorted(PATHS)),
        *(f"{verb} {path}" for verb, path in routes_of(Sandbox()) if "_s" in path),
    ],
)
def test_the_document_names_it(name: str) -> None:
    assert f"`{name}" in TEXT
