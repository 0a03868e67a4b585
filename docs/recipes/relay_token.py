"""Sign a token for the relay in a shop's own backend.

Needs itsdangerous 2 (pip install itsdangerous). In a program:

    from relay_token import relay_token
    relay_token(key, "u1", events=["signed_up"], uses=1, ttl=3600)

By hand, with the newest key, which is the last one in the file:

    python relay_token.py KEYFILE SOURCE_ID ['{"events": ["signed_up"], "uses": 1}']
"""

import hashlib
import json
import secrets
import sys
from pathlib import Path

from itsdangerous import URLSafeTimedSerializer


def relay_token(key: str, source_id: str, **claims: object) -> str:
    """A token for the customer; claims are events, origin, ttl (seconds) and uses."""
    if "uses" in claims:
        # Two such tokens made in one second would else be the same, and share uses.
        claims.setdefault("id", secrets.token_urlsafe(9))
    serializer = URLSafeTimedSerializer(
        key,
        salt="relay.identity",
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )
    return serializer.dumps({"source_id": source_id, **claims})


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python relay_token.py KEYFILE SOURCE_ID [CLAIMS]")
    keys = Path(sys.argv[1]).read_text("ascii").replace(",", " ").split()
    if not keys:
        sys.exit("the key file is empty")
    claims = json.loads(sys.argv[3]) if len(sys.argv) == 4 else {}
    sys.stdout.write(relay_token(keys[-1], sys.argv[2], **claims) + "\n")
