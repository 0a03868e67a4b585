"""The published schema of a custom event, and the metadata of defined events.

Source: Voucherify OpenAPI, "Track Custom Event (client-side)"; the server-side body
is the same. Wording follows the error examples there, which are those of Ajv 6
(https://github.com/ajv-validator/ajv/tree/v6): one problem at a time, required
properties before the others, then in the order of the schema. Ajv counts the length
of a string in code points, as `len` does.
"""

import datetime
from collections.abc import Iterator

from relay.sandbox.config import Property, SandboxConfig

MAX_EVENT_NAME = 300

_TOP = ("event", "customer", "referral", "loyalty", "metadata")
_NAMES = ("id", "source_id", "name", "description", "email", "phone")
_CUSTOMER = (*_NAMES, "birthday", "birthdate", "address", "metadata")
_ADDRESS = ("city", "state", "line_1", "line_2", "country", "postal_code")
_REFERRAL = ("code", "referrer_id")
_LOYALTY = ("code",)


def problem(body: object, config: SandboxConfig) -> str | None:
    """Return the first thing the schema has against `body`, or None."""
    return next(_payload(body, config), None)


def relaxed(body: object, config: SandboxConfig) -> object:
    """Return `body` as the lenient switches read it, before the schema is applied."""
    if not isinstance(body, dict):
        return body
    if config.null_fields == "accept":
        body = _without_nulls(body)
    customer = body.get("customer")
    if config.source_id_number == "coerce" and isinstance(customer, dict):
        number = customer.get("source_id")
        if isinstance(number, int | float) and not isinstance(number, bool):
            body = {**body, "customer": {**customer, "source_id": f"{number}"}}
    return body


def unknown_fields(body: object) -> list[str]:
    """Return the paths of keys that the schema does not name."""
    if not isinstance(body, dict):
        return []
    found = [f".{key}" for key in body if key not in _TOP]
    for part, known in (
        ("customer", _CUSTOMER),
        ("referral", _REFERRAL),
        ("loyalty", _LOYALTY),
    ):
        inner = body.get(part)
        if isinstance(inner, dict):
            found += [f".{part}.{key}" for key in inner if key not in known]
    return found


def null_fields(body: object) -> list[str]:
    """Return the paths of nulls that the schema does not allow."""
    if not isinstance(body, dict):
        return []
    found = [f".{key}" for key in _TOP if key in body and body[key] is None]
    for part, known in (("customer", _CUSTOMER), ("referral", _REFERRAL)):
        inner = body.get(part)
        if isinstance(inner, dict):
            found += [
                f".{part}.{key}"
                for key in known
                if key != "address" and key in inner and inner[key] is None
            ]
    return found


def metadata_problem(
    metadata: dict[str, object], definition: dict[str, Property]
) -> str | None:
    """Return what the event's definition has against its metadata, or None."""
    for name, expected in definition.items():
        if name not in metadata:
            if expected.optional:
                continue
            actual = "undefined"
        elif _fits(metadata[name], expected):
            continue
        else:
            actual = _shown(metadata[name])
        article = "must be a" + ("n" if expected.type[0] in "aeiou" else "")
        required = "" if expected.optional else ", property is required"
        return f"{name}: {article} {expected.type}{required} (actual value is {actual})"
    return None


def _payload(body: object, config: SandboxConfig) -> Iterator[str]:
    if not isinstance(body, dict):
        yield "Payload should be object"
        return
    for name in ("event", "customer"):
        if name not in body:
            yield f"Payload should have required property '{name}'"
    strict = config.unknown_fields == "reject"
    if strict and any(key not in _TOP for key in body):
        yield "Payload should NOT have additional properties"
    yield from _event_name(body.get("event", ""))
    yield from _customer(body.get("customer"), config)
    if "referral" in body:
        yield from _with_code("referral", body["referral"], _REFERRAL, strict)
    if "loyalty" in body:
        yield from _with_code("loyalty", body["loyalty"], _LOYALTY, strict)
    if "metadata" in body and not isinstance(body["metadata"], dict):
        yield "Property .metadata should be object"


def _event_name(name: object) -> Iterator[str]:
    if not isinstance(name, str):
        yield "Property .event should be string"
        return
    if len(name) > MAX_EVENT_NAME:
        limit = MAX_EVENT_NAME
        yield f"Property .event should NOT be longer than {limit} characters"
    if not name:
        yield "Property .event should NOT be shorter than 1 characters"


def _customer(customer: object, config: SandboxConfig) -> Iterator[str]:
    if not isinstance(customer, dict):
        yield "Property .customer should be object"
        return
    if config.unknown_fields == "reject" and any(k not in _CUSTOMER for k in customer):
        yield "Property .customer should NOT have additional properties"
    for name in _NAMES:
        if name in customer and not isinstance(customer[name], str):
            yield f"Property .customer.{name} should be string"
    for name in ("birthday", "birthdate"):
        if name not in customer:
            continue
        value = customer[name]
        if not isinstance(value, str):
            yield f"Property .customer.{name} should be string"
        elif config.birthdate_format == "reject" and not _is_date(value):
            yield f'Property .customer.{name} should match format "date"'
    yield from _address(customer.get("address"))
    if "metadata" in customer and not isinstance(customer["metadata"], dict):
        yield "Property .customer.metadata should be object"


def _address(address: object) -> Iterator[str]:
    if address is None:  # the one place where the schema says `nullable`
        return
    if not isinstance(address, dict):
        yield "Property .customer.address should be object,null"
        return
    for name in _ADDRESS:
        if name in address and not isinstance(address[name], str):
            yield f"Property .customer.address.{name} should be string"


def _with_code(
    part: str, value: object, known: tuple[str, ...], strict: bool
) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"Property .{part} should be object"
        return
    if "code" not in value:
        yield f"Property .{part} should have required property 'code'"
    if strict and any(key not in known for key in value):
        yield f"Property .{part} should NOT have additional properties"
    for name in known:
        if name in value and not isinstance(value[name], str):
            yield f"Property .{part}.{name} should be string"


def _without_nulls(body: dict[str, object]) -> dict[str, object]:
    kept = {
        key: value
        for key, value in body.items()
        if value is not None or key not in ("referral", "loyalty", "metadata")
    }
    customer = kept.get("customer")
    if isinstance(customer, dict):
        kept["customer"] = {k: v for k, v in customer.items() if v is not None}
    return kept


def _fits(value: object, expected: Property) -> bool:
    if expected.type == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected.type == "boolean":
        return isinstance(value, bool)
    if not isinstance(value, str):
        return False
    if expected.type == "date":
        return _is_date(value)
    return expected.type == "string" or _is_datetime(value)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else f"{value}"


def _is_date(text: str) -> bool:
    # RFC 3339 full-date; Python alone would also take 20240131 and 2024-W05-3.
    return len(text) == 10 and text[4] == text[7] == "-" and _parses(text)


def _is_datetime(text: str) -> bool:
    return len(text) > 10 and _parses(text)


def _parses(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
