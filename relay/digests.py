"""What stands for people in keys: digests that are bounded, keyed, and one-way.

All relays of a shop have the same key, so that their limits count together; nobody
without it can turn a digest back, or try names until one fits. Pure.
"""

from hashlib import blake2b


class Digests:
    """The digests of one shop: 18 hexadecimal characters each."""

    def __init__(self, key: bytes) -> None:
        key = blake2b(key, digest_size=32).digest()
        self._keyed = blake2b(key=key, digest_size=9)  # to be copied

    def address(self, address: str) -> str:
        """Of a client's address, as limits count it."""
        return self._digest(b"a", address)

    # The letter keeps the same text apart when it names different things.
    def customer(
        self,
        *,
        id: str | None = None,  # noqa: A002  # Voucherify's name
        source_id: str | None = None,
        signed: bool = False,
    ) -> str:
        """Of a customer; `id` wins over `source_id`, as it does at Voucherify.

        Whom a token names (`signed`) is another than whom anybody may name: else a
        stranger could use up a customer's limits, and take ids before it does.
        """
        if id:
            return self._digest(b"i", id)
        return self._digest(b"t" if signed else b"s", source_id or "")

    def _digest(self, kind: bytes, value: str) -> str:
        digest = self._keyed.copy()
        digest.update(kind + value.encode())
        return digest.hexdigest()
