"""What origin, content type and encoding come to, and how much of it is kept."""

from relay.answers import Beacons, Official
from relay.forms import KEPT, KEPT_CHARS, Forms
from relay.origins import AllowedOrigins

SHOP = b"https://shop.example"
JSON = b"application/json"


def make(*, anyone: bool = False, official: bool = False) -> Forms:
    return Forms(
        origins=AllowedOrigins(["*" if anyone else SHOP.decode()]),
        allow_no_origin=False,
        takes=Official() if official else Beacons(),
        accepted=[(b"content-type", JSON)],
    )


def test_what_a_page_repeats_is_judged_once() -> None:
    forms = make()
    assert forms.read(SHOP, JSON, None) is forms.read(SHOP, JSON, None)
    assert forms.read(SHOP, JSON, b"gzip").gzip
    assert not forms.read(SHOP, JSON, None).gzip
    accepted = forms.read(SHOP, JSON, None).accepted
    assert accepted.wire.endswith(b"vary: Origin\r\ncontent-type: application/json\r\n")


def test_what_is_refused_is_never_kept() -> None:
    forms = make()
    for n in range(3 * KEPT):
        assert not forms.read(b"https://evil%d.example" % n, JSON, None).allowed
        assert forms.read(SHOP, b"text/html;n=%d" % n, None).fault
        assert forms.read(SHOP, JSON, b"br%d" % n).fault
    assert forms._kept == {}


def test_no_sender_fills_the_memory() -> None:
    forms = make(anyone=True)
    for n in range(3 * KEPT):
        assert forms.read(b"https://a%d.example" % n, JSON, None).allowed
        long = JSON + b";x=" + b"y" * KEPT_CHARS + b"%d" % n
        assert forms.read(SHOP, long, None).fault is None
    assert len(forms._kept) <= KEPT
    assert all(len(kind) <= KEPT_CHARS for _, kind, _ in forms._kept)


def test_a_route_keeps_to_what_it_takes() -> None:
    assert make().read(SHOP, b"text/plain;charset=UTF-8", None).fault is None
    assert make(official=True).read(SHOP, b"text/plain", None).fault is not None
