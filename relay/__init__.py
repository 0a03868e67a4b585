"""A browser-facing event relay for Voucherify."""

__version__ = "0.1.0"
