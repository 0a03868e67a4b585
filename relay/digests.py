"""What stands for people in keys: digests that are bounded, keyed, and one-way.

All relays of a shop have the same key, so that their limits count together; nobody
without it can turn a digest back, or try names until one fits. Pure.
"""

from hashlib import blake2b


class Digests:
    """The digests of one shop: 18 hexadecimal characters each."""

    def __init__(self, key: bytes) -> None:
        key = blake2b(key, digest_size=32).digest()
        keyed = blake2b(key=key, digest_size=9)
        # To be copied. The letter keeps the same text apart when it names other things.
        self._address, self._id, self._source_id, self._signed = (
            _begun(keyed, letter) for letter in (b"a", b"i", b"s", b"t")
        )

    def address(self, address: str) -> str:
        """Of a client's address, as limits count it."""
        digest = self._address.copy()
        digest.update(address.encode())
        return digest.hexdigest()

    def customer(
        self,
        id: str | None = None,  # noqa: A002  # Voucherify's name
        source_id: str | None = None,
        signed: bool = False,
    ) -> str:
        """Of a customer; `id` wins over `source_id`, as it does at Voucherify.

        Whom a token names (`signed`) is another than whom anybody may name: else a
        stranger could use up a customer's limits, and take ids before it does.
        """
        name = id or source_id or ""
        begun = self._id if id else self._signed if signed else self._source_id
        digest = begun.copy()
        digest.update(name.encode())
        return digest.hexdigest()


def _begun(keyed: blake2b, letter: bytes) -> blake2b:
    digest = keyed.copy()
    digest.update(letter)
    return digest
