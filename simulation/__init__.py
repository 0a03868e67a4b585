"""Days of traffic in seconds: the real queue and its scripts, in simulated time.

A scenario makes events, which the real edge, catalogue and commit script take; the
real scripts on a real server hand them to simulated forwarders, which decide with the
relay's own delivery table; and a sandbox cluster answers by Voucherify's rules. A
referee who trusts none of them watches every call. The same seed gives the same result.

Not part of the wheel. `make simulate` runs it; docs/delivery.md shows what it found.
"""
