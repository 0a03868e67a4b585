"""Beacons as the generator sends them: those of beacon.lua, in Python."""

PEOPLE = 1_000_000  # as in beacon.lua: no limit refuses, and each is checked
ORIGIN = "https://shop.example"


def body(n: int, *, nonce: str) -> bytes:
    """One event of its own id and, up to `PEOPLE` of them, its own customer."""
    return (
        f'{{"event":"cart_abandoned","id":"{nonce}-{n:010}",'
        f'"customer":{{"source_id":"shopper-{n % PEOPLE}"}},'
        '"metadata":{"value":49.9,"currency":"EUR","items":3,'
        '"page":"/cart/checkout/step-2","sku":"TSHIRT-GREEN-XL",'
        '"coupon":"SUMMER-2026"}}'
    ).encode()


def address(n: int) -> str:
    person = n % PEOPLE
    return f"10.{person >> 16}.{person >> 8 & 255}.{person & 255}"


def request(n: int, *, nonce: str, path: str, port: int) -> bytes:
    """The whole request, as a browser behind a proxy sends it."""
    content = body(n, nonce=nonce)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: {ORIGIN}\r\n"
        "Content-Type: application/json\r\nReferer: https://shop.example/cart\r\n"
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 "
        "Firefox/140.0\r\nAccept: */*\r\nAccept-Language: en-GB,en;q=0.5\r\n"
        f"X-Forwarded-For: {address(n)}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
