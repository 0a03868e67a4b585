"""Tokens: what a key of ours signed, and nothing that only looks like it."""

import base64
import gc
import hashlib
import hmac
import itertools
import json
import re
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import itsdangerous
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from relay import signing
from relay.signing import (
    CACHE,
    DEFAULT_TTL_S,
    LEEWAY_S,
    MAX_CLAIMS_BYTES,
    MAX_TOKEN_BYTES,
    MAX_TTL_S,
    MAX_USES,
    PURPOSE,
    Claims,
    Identity,
    InvalidClaim,
    Signer,
    TokenRefused,
)
from tests.programs import find, needs

DOCS = Path(__file__).parents[1] / "docs"
NOW = 1_760_000_000
OLD, KEY, NEW = (f"{name}-key-of-the-tests-0123456789abcdef" for name in "abc")
SIGNER = Signer([OLD, KEY])

MANY = [f"event_number_{number}" for number in range(40)]  # it pays to compress them
PLAIN, _ = SIGNER.sign(source_id="user-12345", now=NOW)
CLAIMING, _ = SIGNER.sign(
    source_id="zoë",
    events=["signed_up", "überprüft"],
    origin="https://shop.example",
    ttl_s=3600,
    uses=3,
    now=NOW,
)
DEFLATED, _ = SIGNER.sign(source_id="user-12345", events=MANY, now=NOW)
OLDER, _ = Signer([OLD]).sign(source_id="user-12345", now=NOW)
TOKENS = pytest.mark.parametrize(
    "token",
    [
        pytest.param(PLAIN, id="plain"),
        pytest.param(CLAIMING, id="claiming"),
        pytest.param(DEFLATED, id="deflated"),
        pytest.param(OLDER, id="older-key"),
    ],
)


def by_the_book(payload: bytes, *, stamp: bytes | None = None, key: str = KEY) -> str:
    """Sign any payload as docs/tokens.md says, with the standard library alone."""
    stamp = NOW.to_bytes(4, "big") if stamp is None else stamp
    return resigned(f"{base64url(payload)}.{base64url(stamp)}", key=key)


def resigned(signed: str, *, key: str = KEY, purpose: str = PURPOSE) -> str:
    derived = hmac.digest(key.encode(), purpose.encode(), "sha256")
    return f"{signed}.{base64url(hmac.digest(derived, signed.encode(), 'sha256'))}"


def base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims(**more: object) -> bytes:
    return json.dumps({"source_id": "u1", **more}).encode()


def reference(key: str | list[str]) -> itsdangerous.URLSafeTimedSerializer:
    return itsdangerous.URLSafeTimedSerializer(
        key,
        salt=PURPOSE,
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )


def refusal(token: str, *, now: float = NOW, signer: Signer = SIGNER) -> TokenRefused:
    with pytest.raises(TokenRefused) as caught:
        signer.read(token, now=now)
    assert caught.value.detail == str(caught.value) != ""
    return caught.value


def tampered(token: str) -> str:
    """The reason why a changed token is refused: never one of those about time."""
    reason = refusal(token).reason
    assert reason in ("token_malformed", "token_forged")
    return reason


# --- what is signed is read -----------------------------------------------------------


def test_a_token_says_what_was_signed() -> None:
    identity = SIGNER.read(CLAIMING, now=NOW + 1.5)
    assert identity == Identity(
        source_id="zoë",
        events=frozenset({"signed_up", "überprüft"}),
        origin="https://shop.example",
        uses=3,
        issued_at=NOW,
        expires_at=NOW + 3600,
        digest=hashlib.sha256(CLAIMING.encode()).hexdigest()[:24],
    )


def test_a_claim_that_is_not_made_restricts_nothing() -> None:
    identity = SIGNER.read(PLAIN, now=NOW)
    assert (identity.events, identity.origin, identity.uses) == (None, None, None)
    assert identity.expires_at == NOW + DEFAULT_TTL_S


_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)


@given(
    source_id=_text,
    events=st.none() | st.lists(_text, min_size=1, max_size=5),
    ttl_s=st.none() | st.integers(1, MAX_TTL_S),
    uses=st.none() | st.integers(1, MAX_USES),
)
def test_whatever_can_be_signed_is_read_as_it_was_meant(
    source_id: str, events: list[str] | None, ttl_s: int | None, uses: int | None
) -> None:
    try:
        token, expires_at = SIGNER.sign(
            source_id=source_id, events=events, ttl_s=ttl_s, uses=uses, now=NOW + 0.9
        )
    except InvalidClaim as fault:
        assert (fault.field, events is None) == ("events", False)  # noqa: PT017  # long
        return
    identity = SIGNER.read(token, now=NOW)
    assert identity.source_id == source_id
    assert identity.events == (None if events is None else frozenset(events))
    assert identity.uses == uses
    assert identity.issued_at == NOW
    assert identity.expires_at == expires_at == NOW + (ttl_s or DEFAULT_TTL_S)


@TOKENS
def test_itsdangerous_reads_our_tokens(token: str) -> None:
    payload = reference([OLD, KEY]).loads(token)
    assert payload["source_id"] == SIGNER.read(token, now=NOW).source_id


@pytest.mark.parametrize(
    "more", [{}, {"events": ["a"], "ttl": 60, "uses": 1, "id": "x"}, {"events": MANY}]
)
def test_tokens_of_itsdangerous_are_read(more: dict[str, object]) -> None:
    token = reference(KEY).dumps({"source_id": "zoë", **more})
    assert token.startswith(".") == (more.get("events") == MANY)
    assert SIGNER.read(token, now=time.time()).source_id == "zoë"


def test_the_long_form_of_many_events_is_deflated() -> None:
    assert DEFLATED.startswith(".")
    assert not PLAIN.startswith(".")
    assert SIGNER.read(DEFLATED, now=NOW).events == frozenset(MANY)


def test_tokens_with_uses_differ_even_when_made_in_the_same_second() -> None:
    pair = [SIGNER.sign(source_id="u1", uses=1, now=NOW)[0] for _ in range(2)]
    digests = {SIGNER.read(token, now=NOW).digest for token in pair}
    assert len(digests) == 2
    assert SIGNER.sign(source_id="user-12345", now=NOW)[0] == PLAIN


def test_an_origin_is_signed_as_browsers_write_it() -> None:
    token, _ = SIGNER.sign(source_id="u1", origin="https://Shop.example:443", now=NOW)
    assert SIGNER.read(token, now=NOW).origin == "https://shop.example"


def test_a_token_may_be_as_long_as_it_says_and_no_longer() -> None:
    spare = (MAX_TOKEN_BYTES - len(by_the_book(b""))) * 3 // 4 - len(claims())
    longest, longer = (by_the_book(claims() + b" " * (spare + n)) for n in (0, 1))
    assert len(longest) <= MAX_TOKEN_BYTES < len(longer)
    assert SIGNER.read(longest, now=NOW).source_id == "u1"
    assert refusal(longer).reason == "token_malformed"


# --- what only looks like it is not ---------------------------------------------------


@TOKENS
def test_no_bit_of_a_token_can_be_turned(token: str) -> None:
    raw = token.encode()
    for at, bit in itertools.product(range(len(raw)), range(8)):
        turned = bytearray(raw)
        turned[at] ^= 1 << bit
        tampered(turned.decode("latin-1"))


@TOKENS
def test_no_piece_of_a_token_will_do(token: str) -> None:
    for at in range(len(token)):
        tampered(token[:at])
        tampered(token[at + 1 :])
        tampered(token[:at] + token[at + 1 :])


ODD = [
    *map(chr, range(256)),
    *("\ud800", "\udc41", "\ud83d\ude00", "\u2024", "\uff0e", "\uff21", "\u0410"),
    *(
        "\u200b",
        "\u00ad",
        "\ufeff",
        "\u2028",
        "\u3000",
        "==",
        "\r\n",
        "..",
        "%3D",
        "+/",
    ),
]


@TOKENS
def test_nothing_can_be_put_into_a_token(token: str) -> None:
    places = {0, 1, len(token) - 1, len(token)}
    for dot in re.finditer(r"\.", token):
        places |= {dot.start(), dot.end()}
    for odd, at in itertools.product(ODD, places):
        tampered(token[:at] + odd + token[at:])


@TOKENS
def test_no_letter_can_change_its_case_or_its_script(token: str) -> None:
    alike = str.maketrans(
        "AEIOXaeiox", "\u0410\u0415\u0406\u041e\u0425\u0430\u0435\u0456\u043e\u0445"
    )
    for at, letter in enumerate(token):
        fullwidth = chr(ord(letter) + 0xFEE0)
        for other in {letter.swapcase(), letter.translate(alike), fullwidth} - {letter}:
            tampered(token[:at] + other + token[at + 1 :])
    for changed in (token.swapcase(), token.upper(), token.lower()):
        tampered(changed)
    tampered(token.replace("-", "+").replace("_", "/") + "=")


@TOKENS
def test_the_parts_of_tokens_cannot_be_mixed(token: str) -> None:
    later, _ = SIGNER.sign(source_id="user-12346", now=NOW + 1)
    mine, others = token.rsplit(".", 2), later.rsplit(".", 2)
    whole = {tuple(mine), tuple(others)}
    for parts in itertools.permutations([*mine, *others], 3):
        if parts not in whole:
            tampered(".".join(parts))
    for count in (0, 1, 2, 4):
        tampered(".".join((mine * 2)[:count]))
    tampered(token + token)
    tampered(f"{token}.{mine[2]}")


@TOKENS
def test_a_signature_counts_in_one_form_only(token: str) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    place = alphabet.index(token[-1])
    twins = [token[:-1] + alphabet[place ^ spare] for spare in (1, 2, 3)]
    for twin in [*twins, token + "=", token + "!!!!", token[:-1] + "%%%%" + token[-1]]:
        assert reference([OLD, KEY]).loads(twin)  # itsdangerous takes them all
        assert refusal(twin).reason == "token_malformed"


def test_a_token_of_another_make_is_forged() -> None:
    signed = PLAIN.rpartition(".")[0]
    derived = hmac.digest(KEY.encode(), PURPOSE.encode(), "sha256")
    concat = hashlib.sha256(PURPOSE.encode() + b"signer" + KEY.encode()).digest()
    for made in (
        resigned(signed, key="guessed"),
        resigned(signed, purpose="relay.ops"),
        resigned(signed, purpose=""),
        f"{signed}.{base64url(hmac.digest(KEY.encode(), signed.encode(), 'sha256'))}",
        f"{signed}.{base64url(hmac.digest(concat, signed.encode(), 'sha256'))}",
        f"{signed}.{base64url(hmac.digest(derived, signed.encode(), 'sha3_256'))}",
        f"{signed}.{base64url(bytes(32))}",
    ):
        assert refusal(made).reason == "token_forged"
    sha1 = itsdangerous.URLSafeTimedSerializer(KEY, salt=PURPOSE).dumps({})
    assert refusal(sha1).reason == "token_malformed"


def test_a_token_for_one_purpose_is_none_for_another() -> None:
    login = Signer([OLD, KEY], purpose="relay.ops")
    token, _ = login.sign(source_id="u1", now=NOW)
    assert login.read(token, now=NOW).source_id == "u1"
    assert refusal(token).reason == "token_forged"
    assert refusal(PLAIN, signer=login).reason == "token_forged"


@given(st.text() | st.from_regex(r"\.?[A-Za-z0-9_-]+\.[\w-]{6}\.[\w-]{43}"))
def test_no_text_is_a_token(text: str) -> None:
    tampered(text)


# --- the signature comes first --------------------------------------------------------


def calls(token: str, signer: Signer) -> tuple[str, list[str]]:
    """Why a token is refused, and each function that was called to find out."""
    seen: list[str] = []

    def note(frame: object, what: str, called: object) -> None:
        if what == "call":
            seen.append(frame.f_code.co_qualname)  # type: ignore[attr-defined]  # a frame
        elif what == "c_call":
            seen.append(called.__qualname__)  # type: ignore[attr-defined]  # a function

    refused: TokenRefused | None = None
    gc.disable()  # others may have callbacks there
    sys.setprofile(note)
    try:
        signer.read(token, now=NOW)
    except TokenRefused as error:
        refused = error
    finally:
        sys.setprofile(None)
        gc.enable()
    assert refused is not None
    return refused.reason, seen


def test_a_wrong_signature_takes_the_same_way_wherever_it_is_wrong() -> None:
    signer = Signer([OLD, KEY, NEW])
    signed, _, signature = PLAIN.rpartition(".")
    wrong = [
        signature[:at] + ("Q" if signature[at] != "Q" else "A") + signature[at + 1 :]
        for at in range(len(signature))
    ]
    ways = [calls(f"{signed}.{other}", signer) for other in [*wrong, "A" * 43]]
    assert all(way == ways[0] for way in ways)
    reason, called = ways[0]
    assert reason == "token_forged"
    assert called.count("compare_digest") == 3  # with each key, in constant time


def test_what_nobody_signed_is_not_even_decoded() -> None:
    bomb = "." + base64url(zlib.compress(bytes(2_000_000)))
    for payload in (bomb, "!", "AAAAA", base64url(b"{"), base64url(claims())):
        _, called = calls(f"{payload}.{base64url(b'time')}.{'A' * 43}", SIGNER)
        assert not {"_read_payload", "_read_stamp", "_decode", "decompress"} & {*called}


def test_what_is_too_long_is_not_even_hashed() -> None:
    for token in ("A" * 10_000_000, by_the_book(b" " * 5000), PLAIN + "." * 4096):
        reason, called = calls(token, SIGNER)
        assert reason == "token_malformed"
        assert not {"Signer._verify", "Pattern.fullmatch"} & set(called)


def test_a_signed_bomb_does_not_go_off() -> None:
    def bomb(size: int) -> str:
        raw = claims() + b" " * (size - len(claims()))
        return resigned(f".{base64url(zlib.compress(raw, 9))}.{PLAIN.split('.')[1]}")

    assert SIGNER.read(bomb(MAX_CLAIMS_BYTES), now=NOW).source_id == "u1"
    for large in (bomb(MAX_CLAIMS_BYTES + 1), bomb(2_000_000)):
        tracemalloc.start()
        assert refusal(large).reason == "token_malformed"
        assert tracemalloc.get_traced_memory()[1] < 500_000
        tracemalloc.stop()


# --- signed, but not what we sign -----------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"{", "not JSON in UTF-8"),
        (claims() + b"x", "not JSON in UTF-8"),
        (b'{"source_id":"\xff"}', "not JSON in UTF-8"),
        (b'{"source_id":"\xed\xa0\x80"}', "not JSON in UTF-8"),
        (b'{"source_id":"\\ud800"}', "not JSON in UTF-8"),
        (b"\xef\xbb\xbf" + claims(), "not JSON in UTF-8"),
        (b"[" * 3000, "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'"u1"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "source_id is required"),
        (b'{"source_id":null}', "source_id is required"),
        (b'{"source_id":1}', "source_id is required"),
        (claims(source_id=""), "source_id is required"),
        (claims(source_id="x" * 513), "1 to 512 characters"),
        (claims(event="signed_up"), "'event' is not a claim: there are source_id, ev"),
        (claims(Events=["signed_up"]), "'Events' is not a claim"),
        (b'{"source_id":"u1","x":' + b"[" * 2000, "'x' is not a claim"),
        (claims(**{"n\n" * 99: 1}), "is not a claim"),
        (claims(events=None), "events must be a list of names"),
        (claims(events=[]), "events must be a list of names"),
        (claims(events=[""]), "events must be a list of names"),
        (claims(events=["x" * 301]), "events must be a list of names"),
        (claims(events="signed_up"), "events must be a list of names"),
        (claims(events=["signed_up", 1]), "events must be a list of names"),
        (claims(origin=None), "origin must be one origin"),
        (claims(origin=""), "origin must be one origin"),
        (claims(origin="null"), "origin must be one origin"),
        (claims(origin="*"), "origin must be one origin"),
        (claims(origin="https://*.shop.example"), "origin must be one origin"),
        (claims(origin="https://shop.example/"), "origin must be one origin"),
        (claims(origin="https://Shop.example"), "origin must be one origin"),
        (claims(origin="https://shop.example:443"), "origin must be one origin"),
        (claims(origin="shop.example"), "origin must be one origin"),
        (claims(origin="https://" + "a" * 2000), "origin must be one origin"),
        (claims(ttl=None), "ttl must be a whole number of seconds"),
        (claims(ttl=0), "ttl must be a whole number of seconds"),
        (claims(ttl=-1), "ttl must be a whole number of seconds"),
        (claims(ttl=MAX_TTL_S + 1), "ttl must be a whole number of seconds"),
        (claims(ttl=60.0), "ttl must be a whole number of seconds"),
        (claims(ttl="60"), "ttl must be a whole number of seconds"),
        (claims(ttl=True), "ttl must be a whole number of seconds"),
        (b'{"source_id":"u1","ttl":1e400}', "ttl must be a whole number of seconds"),
        (b'{"source_id":"u1","ttl":' + b"9" * 3000 + b"}", "ttl must be a whole"),
        (claims(uses=0), "uses must be a whole number"),
        (claims(uses=MAX_USES + 1), "uses must be a whole number"),
        (claims(uses=None), "uses must be a whole number"),
        (claims(uses=1.5), "uses must be a whole number"),
        (claims(id=7), "id must be a string"),
        (claims(id="x" * 65), "id must be a string"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else "",
)
def test_a_signed_payload_of_another_form_is_refused(payload: bytes, said: str) -> None:
    refused = refusal(by_the_book(payload))
    assert refused.reason == "token_malformed"
    assert said in refused.detail
    assert refused.detail.isprintable()
    assert len(refused.detail) < 300


@pytest.mark.parametrize(
    ("payload", "stamp"),
    [
        (base64url(claims())[:-1] + "B", "aOd4AA"),  # spare bits in the last letter
        ("AAAAA", "aOd4AA"),
        ("." + base64url(b"no zlib"), "aOd4AA"),
        ("." + base64url(zlib.compress(claims())[:-1]), "aOd4AA"),
        ("." + base64url(zlib.compress(claims()) + b"x"), "aOd4AA"),
        ("." + base64url(zlib.compress(b"")), "aOd4AA"),
        (base64url(claims()), "AAAA"),
        (base64url(claims()), "AGjneAA"),
        (base64url(claims()), "aOd4AB"),
        (base64url(claims()), "aOd4A"),
    ],
)
def test_signed_parts_have_one_form_only(payload: str, stamp: str) -> None:
    assert refusal(resigned(f"{payload}.{stamp}")).reason == "token_malformed"


@given(st.binary(max_size=100) | st.from_regex(r'\{"source_id":"u1"(,".*":.*)?\}'))
def test_no_signed_bytes_are_an_error_of_another_kind(payload: bytes | str) -> None:
    raw = payload if isinstance(payload, bytes) else payload.encode(errors="replace")
    for token in (
        by_the_book(raw or b"x"),
        resigned(f".{base64url(raw or b'x')}.aOd4AA"),
        resigned(f".{base64url(zlib.compress(raw))}.aOd4AA"),
        by_the_book(claims(), stamp=raw[:8] or b"x"),
    ):
        try:
            assert SIGNER.read(token, now=NOW).source_id
        except TokenRefused as refused:
            assert refused.reason != "token_forged"  # noqa: PT017  # few are tokens


# --- time -----------------------------------------------------------------------------


def test_a_token_ends_on_the_second() -> None:
    for token, ttl_s in ((PLAIN, DEFAULT_TTL_S), (CLAIMING, 3600)):
        end = NOW + ttl_s
        assert SIGNER.read(token, now=end - 0.001).expires_at == end
        assert refusal(token, now=end).reason == "token_expired"
        assert SIGNER.read(token, now=end - 1)  # and that is asked each time


def test_a_token_may_come_from_a_clock_that_is_a_little_ahead() -> None:
    assert SIGNER.read(PLAIN, now=NOW - LEEWAY_S)
    refused = refusal(PLAIN, now=NOW - LEEWAY_S - 0.001)
    assert refused.reason == "token_not_yet_valid"
    assert "60 s in the future: set the clock" in refused.detail


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        (b"\x01", "token_expired"),
        ((NOW + LEEWAY_S + 1).to_bytes(4, "big"), "token_not_yet_valid"),
        ((NOW * 1000).to_bytes(6, "big"), "token_not_yet_valid"),  # milliseconds
        (b"\xff" * 8, "token_not_yet_valid"),
        (b"\xff" * 9, "token_malformed"),
        (b"\x00" * 4, "token_malformed"),
        (b"\x00" + NOW.to_bytes(4, "big"), "token_malformed"),
        (str(NOW).encode(), "token_malformed"),
    ],
)
def test_a_time_that_cannot_be_is_refused(stamp: bytes, reason: str) -> None:
    assert refusal(by_the_book(claims(), stamp=stamp)).reason == reason


def test_the_reader_decides_how_long_a_token_counts_that_does_not_say() -> None:
    token = by_the_book(claims())
    assert SIGNER.read(token, now=NOW).expires_at == NOW + DEFAULT_TTL_S
    hour = Signer([KEY], ttl_s=3600)
    assert hour.read(token, now=NOW).expires_at == NOW + 3600
    assert hour.read(CLAIMING, now=NOW).expires_at == NOW + 3600
    # What we sign always says so itself: its end was told to somebody.
    told = hour.sign(source_id="u1", now=NOW)
    assert SIGNER.read(told[0], now=NOW).expires_at == told[1] == NOW + 3600


# --- what is remembered ---------------------------------------------------------------


def test_a_token_is_verified_once_while_it_is_remembered() -> None:
    signer = Signer([KEY])
    first = signer.read(PLAIN, now=NOW)
    assert signer.read(PLAIN, now=NOW + 1) is first
    assert signer._known.cache_info()[:2] == (1, 1)


def test_what_is_refused_takes_no_room() -> None:
    signer = Signer([KEY])
    for token in (OLDER, "no token", by_the_book(b"{}")):
        refusal(token, signer=signer)
        refusal(token, signer=signer)
    assert signer._known.cache_info().currsize == 0


def test_tokens_are_remembered_within_bounds() -> None:
    signer = Signer([KEY])
    for number in range(CACHE + 10):
        token, _ = signer.sign(source_id=f"user-{number}", now=NOW)
        assert signer.read(token, now=NOW).source_id == f"user-{number}"
    assert signer._known.cache_info().currsize == CACHE


# --- keys -----------------------------------------------------------------------------


def test_a_key_can_be_changed_without_refusing_anyone() -> None:
    before, during, after = Signer([OLD]), Signer([OLD, NEW]), Signer([NEW])
    olds, _ = before.sign(source_id="u1", now=NOW)
    news, _ = during.sign(source_id="u1", now=NOW)
    for token in (olds, news):
        assert during.read(token, now=NOW).source_id == "u1"
    assert refusal(olds, signer=after).reason == "token_forged"
    assert after.read(news, now=NOW).source_id == "u1"
    # Relays that restart one by one: the new key counts before anybody signs with it.
    prepared = Signer([NEW, OLD])
    assert prepared.read(news, now=NOW).source_id == "u1"
    assert before.read(prepared.sign(source_id="u1", now=NOW)[0], now=NOW)


def test_keys_may_come_as_secrets() -> None:
    assert Signer([SecretStr(OLD), SecretStr(KEY)]).read(PLAIN, now=NOW)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([], "a signing key is missing"),
        ((), "a signing key is missing"),
        ([""], "signing key 1 is empty"),
        ([KEY, SecretStr("")], "signing key 2 is empty"),
        ([KEY, "schlüssel", NEW], "signing key 2 must be ASCII"),
        ([KEY, "half\ud83d"], "signing key 2 must be ASCII"),
        (KEY, "must be a list"),
    ],
)
def test_a_faulty_key_is_named_by_its_place(
    keys: list[str | SecretStr], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        Signer(keys)
    said = repr(caught.value)
    assert not any(secret in said for secret in (KEY, NEW, "schl", "half"))


@pytest.mark.parametrize("ttl_s", [0, -1, MAX_TTL_S + 1])
def test_a_faulty_default_ttl_is_refused(ttl_s: int) -> None:
    with pytest.raises(ValueError, match=f"ttl_s must be 1 to {MAX_TTL_S}"):
        Signer([KEY], ttl_s=ttl_s)


# --- what cannot be signed ------------------------------------------------------------


def sign(**more: object) -> tuple[str, int]:
    """Sign claims that may be of any type."""
    given = {"source_id": "u1", "now": NOW} | more
    return SIGNER.sign(**given)  # type: ignore[arg-type]  # wrong ones on purpose


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("source_id", ["", None, 7, "x" * 513]),
        ("events", [[], [""], ["x" * 301], "signed_up", [7], ["a", None], {}]),
        (
            "origin",
            [
                *("", "*", "null", "shop.example", "https://*.shop.example"),
                *("ftp://a.b", "https://shop.example/", "https://" + "a" * 400),
            ],
        ),
        ("ttl_s", [0, -1, MAX_TTL_S + 1, 1.5, "60", True, float("nan")]),
        ("uses", [0, -1, MAX_USES + 1, 1.5, "3", True]),
    ],
)
def test_a_faulty_claim_is_refused_with_its_field(
    field: str, values: list[object]
) -> None:
    key = field.removesuffix("_s")
    for value in values:
        with pytest.raises(
            InvalidClaim, match=f"^{key} (must be|is required)"
        ) as caught:
            sign(**{field: value})
        assert caught.value.field == key


def test_half_a_character_cannot_be_signed() -> None:
    for field, value in (("source_id", "u\ud83d"), ("events", ["a", "\udc00"])):
        with pytest.raises(InvalidClaim, match="half a surrogate pair"):
            sign(**{field: value})


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([f"{n:064x}"[::-1] * 2 for n in range(900)], id="payload"),
        pytest.param(
            [hashlib.sha256(b"%d" % n).hexdigest() for n in range(99)], id="token"
        ),
    ],
)
def test_more_events_than_a_token_holds_are_refused(events: list[str]) -> None:
    with pytest.raises(InvalidClaim, match="too many for a token") as caught:
        sign(events=events)
    assert caught.value.field == "events"


# --- nothing is told ------------------------------------------------------------------


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that stands behind it, shown or not."""
    yield error
    for behind in (error.__cause__, error.__context__):
        if behind is not None:
            yield from chain(behind)


SECRET = "the-value-of-a-claim"


@pytest.mark.parametrize(
    "act",
    [
        lambda: SIGNER.read(PLAIN + "x", now=NOW),
        lambda: SIGNER.read(PLAIN[:-3] + "AAA", now=NOW),
        lambda: SIGNER.read(PLAIN, now=NOW * 2),
        lambda: SIGNER.read(PLAIN, now=0),
        lambda: SIGNER.read(PLAIN * 99, now=NOW),
        lambda: SIGNER.read(by_the_book(claims(source_id=SECRET, ttl=0)), now=NOW),
        lambda: SIGNER.read(by_the_book(claims(source_id=SECRET, x=1)), now=NOW),
        lambda: SIGNER.read(by_the_book(claims(origin=SECRET)), now=NOW),
        lambda: SIGNER.read(by_the_book(claims(events=SECRET)), now=NOW),
        lambda: SIGNER.read(by_the_book(SECRET.encode() + b"\xff"), now=NOW),
        lambda: SIGNER.read(
            by_the_book(b'{"source_id":"%s\xff"}' % SECRET.encode()), now=NOW
        ),
        lambda: SIGNER.read(resigned(f".{base64url(SECRET.encode())}.aOd4AA"), now=NOW),
        lambda: sign(source_id=SECRET + "\ud800"),
        lambda: sign(source_id=SECRET * 99),
        lambda: sign(origin=SECRET),
        lambda: sign(events=[SECRET] * 1000),
        lambda: Signer([KEY, SECRET + "\ud800"]),
    ],
)
def test_no_error_carries_a_key_a_token_or_a_claim(act: Callable[[], object]) -> None:
    with pytest.raises((TokenRefused, ValueError)) as caught:
        act()
    for error in chain(caught.value):
        said = f"{error!s} {error!r} {error.args!r} {vars(error)!r}"
        if isinstance(error, UnicodeError | json.JSONDecodeError):
            pytest.fail(f"{type(error).__name__} carries what it is about")
        payload, _, signature = PLAIN.split(".")
        for secret in (OLD, KEY, payload[:20], signature[:20], SECRET):
            assert secret not in said


def test_no_key_is_shown() -> None:
    signer = Signer([SecretStr(OLD), KEY])
    signer.read(PLAIN, now=NOW)
    shown = f"{signer!r} {signer!s} {vars(signer)!r} {signer.read(PLAIN, now=NOW)!r}"
    assert not any(secret in shown for secret in (OLD, KEY, PLAIN, PLAIN[-20:]))


# --- the recipes ----------------------------------------------------------------------

RECIPES = DOCS / "recipes"
PYTHON = [sys.executable, str(RECIPES / "relay_token.py")]
NODE = [str(find("node")), str(RECIPES / "relay_token.mjs")]
BOTH = pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(PYTHON, id="python"),
        pytest.param(NODE, id="node", marks=needs("node", package="nodejs")),
    ],
)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "relay_signing_keys"
    path.write_text(f"{OLD}, {KEY}\n")
    return path


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )


def made(recipe: list[str], *arguments: object) -> str:
    """The one line that a recipe prints."""
    done = run(*recipe, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    [token] = done.stdout.splitlines()
    return token


@BOTH
def test_a_recipe_signs_for_a_customer(recipe: list[str], key_file: Path) -> None:
    token = made(recipe, key_file, "zoë-顧客-🛒")
    identity = Signer([KEY]).read(token, now=time.time())
    assert identity.source_id == "zoë-顧客-🛒"
    assert (identity.events, identity.origin, identity.uses) == (None, None, None)
    assert identity.expires_at == identity.issued_at + DEFAULT_TTL_S


@BOTH
@pytest.mark.parametrize("events", [["signed_up", "überprüft-注文"], MANY])
def test_a_recipe_signs_claims(
    recipe: list[str], key_file: Path, events: list[str]
) -> None:
    more = {"events": events, "origin": "https://shop.example", "ttl": 60, "uses": 3}
    token = made(recipe, key_file, "u1", json.dumps(more))
    identity = Signer([KEY]).read(token, now=time.time())
    assert identity.events == frozenset(events)
    assert identity.origin == "https://shop.example"
    assert identity.expires_at == identity.issued_at + 60
    assert identity.uses == 3
    assert made(recipe, key_file, "u1", json.dumps(more)) != token  # by their ids


@BOTH
def test_a_slip_in_a_recipe_widens_nothing(recipe: list[str], key_file: Path) -> None:
    for slip in ({"event": ["signed_up"]}, {"events": None}, {"uses": None}):
        token = made(recipe, key_file, "u1", json.dumps(slip))
        refused = refusal(token, signer=Signer([KEY]), now=time.time())
        assert refused.reason == "token_malformed"


@BOTH
def test_a_recipe_says_how_it_is_used(recipe: list[str], tmp_path: Path) -> None:
    done = run(*recipe)
    assert done.returncode != 0
    assert "KEYFILE SOURCE_ID" in done.stderr
    empty = tmp_path / "empty"
    empty.touch()
    done = run(*recipe, empty, "u1")
    assert done.returncode != 0
    assert "the key file is empty" in done.stderr


def node_only(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs("node", package="nodejs"):
        test = mark(test)
    return test


@node_only
def test_an_undefined_claim_is_not_dropped_in_silence() -> None:
    program = (
        f"import {{ relayToken }} from {json.dumps(Path(NODE[1]).as_uri())};"
        "relayToken('key', 'u1', { events: undefined });"
    )
    done = run(NODE[0], "--input-type=module", "--eval", program)
    assert "a claim is undefined" in done.stderr
    assert done.returncode == 1


@node_only
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"events": ["überprüft", 'a "b"/\\\n\x07\u2028🛒'], "ttl": 60},
        {"uses": 2, "id": "one", "origin": "https://shop.example"},
    ],
)
def test_both_recipes_make_the_same_token(
    key_file: Path, more: dict[str, object]
) -> None:
    def pair() -> tuple[str, str]:
        given = key_file, "zoë", json.dumps(more)
        return made(PYTHON, *given), made(NODE, *given)

    # Of one second, which two processes need not meet at once.
    pairs = (pair() for _ in range(20))
    python, node = next(p for p in pairs if p[0].split(".")[1] == p[1].split(".")[1])
    assert python == node


# --- docs/tokens.md -------------------------------------------------------------------

DOCUMENT = (DOCS / "tokens.md").read_text("utf-8")


def rows(head: str) -> dict[str, list[str]]:
    """The rows of the table whose head begins so, by the code in their first cell."""
    table = DOCUMENT.partition(f"\n| {head} |")[2].partition("\n\n")[0]
    cells = [line[1:-1].split("|") for line in table.splitlines()[2:]]
    return {cell[0].strip().strip("`"): [c.strip() for c in cell[1:]] for cell in cells}


def test_the_vector_of_the_document_is_right() -> None:
    part = {name: cells[0].strip("`") for name, cells in rows("part").items()}
    payload, stamp = part["payload"], part["stamp"]
    derived = hmac.digest(part["key"].encode(), PURPOSE.encode(), "sha256")
    assert derived.hex() == part["derived"]
    assert base64url(part["JSON"].encode()) == payload
    at = int(part["Unix time"])
    assert base64url(at.to_bytes(4, "big")) == stamp
    token = f"{payload}.{stamp}.{part['signature']}"
    assert resigned(f"{payload}.{stamp}", key=part["key"]) == token
    assert f"\n    {token}\n" in DOCUMENT
    assert reference(part["key"]).loads(token) == json.loads(part["JSON"])
    identity = Signer([part["key"]]).read(token, now=at)
    assert identity.events == frozenset({"signed_up"})
    assert (identity.source_id, identity.expires_at) == ("u1", at + 3600)


def test_every_claim_is_told() -> None:
    assert list(rows("key")) == [f.name for f in msgspec.structs.fields(Claims)]
    required = {key for key, cells in rows("key").items() if cells[1] == "required"}
    assert required == {
        field.name for field in msgspec.structs.fields(Claims) if field.required
    }
    assert set(signing._RULES) == set(rows("key"))


def test_every_reason_is_told_with_its_status() -> None:
    source = Path(signing.__file__).read_text("utf-8")
    reasons = set(re.findall(r'"(token_\w+)"', source))
    assert len(reasons) == 4
    table = rows("reason")
    assert reasons < set(table)
    assert {table[reason][0] for reason in reasons} == {"401"}


@pytest.mark.parametrize(
    "said",
    [
        f"1 to {MAX_TTL_S:,} ({MAX_TTL_S // 86_400} days)",
        f"events it may send in all: 1 to {MAX_USES:,}",
        f"at most {MAX_TOKEN_BYTES:,} characters",
        f"up to {MAX_CLAIMS_BYTES:,} bytes of JSON",
        f"stamped up to {LEEWAY_S} s in the future",
        f"`RELAY_TOKEN_TTL` ({DEFAULT_TTL_S // 3600}h)",
        f"HMAC(key, `{PURPOSE}`)",
        f"the {len(PURPOSE)} ASCII characters",
    ],
)
def test_a_number_in_the_document_is_that_of_the_code(said: str) -> None:
    assert said in DOCUMENT


def test_the_examples_of_the_document_are_json() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert "token" in json.loads(block)
    [body] = re.findall(r"-d '(\{.*\})'", DOCUMENT)
    request = json.loads(body)
    request["ttl_s"] = request.pop("ttl")
    assert SIGNER.sign(**request, now=NOW)
