"""Every exception this package raises on purpose.

RelayError
  SettingsError           exit 2  a wrong or missing setting; names each and its cure
  CatalogError            exit 1  a faulty catalogue; at a start it is a SettingsError
  EmbeddedError           exit 1  the private Redis server cannot be had
  QueueUnavailable        503     raised by queue.py when Redis is away or full

Beside it: signing.TokenRefused and events.Refused with its Invalid say why one event
is not taken; both are caught in the same decision (policy.py, edge.py). What
Voucherify answers is no exception but a value (verdicts.Answer).
"""


class RelayError(Exception):
    """Any failure this package raises on purpose; the message ends with a cure."""


class SettingsError(RelayError):
    """Settings are wrong or missing. Carries one line for each fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class EmbeddedError(RelayError):
    """The private Redis server cannot be started, adopted or owned."""


class QueueUnavailable(RelayError):
    """Redis cannot take events now. `reason` is the code for answers and logs."""

    def __init__(self, reason: str, detail: str, *, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retry_after = retry_after  # seconds
