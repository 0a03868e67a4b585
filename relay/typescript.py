"""The event catalogue as TypeScript, for the pages that send events.

With it an editor knows the shop's events, and the compiler refuses what the relay
would refuse. It says what a sender may set, not what Voucherify needs; and not who may
set it, for that a page cannot know.

Pure: a catalogue in, text out. Names of the file are quoted and stand in no comment,
so none can end what it stands in. The order is that of the file.
"""

from relay.catalog import CUSTOMER_FIELDS, Catalog, Rule, quoted, span
from relay.events import Address

_NOTHING = "Record<string, never>"  # `{}` would take everything
_ANYTHING = "Record<string, unknown>"
_METADATA = {
    "string": "string",
    "number": "number",
    "boolean": "boolean",
    "date": "string",
    "datetime": "string",
    "any": "unknown",
}
_HINTS = {
    "date": "A date, written YYYY-MM-DD.",
    "datetime": "A time, as `toISOString()` of a Date writes it.",
}
_CUSTOMER = {"address": "RelayAddress | null", "metadata": _ANYTHING}
_CUSTOMER_HINTS = {"birthday": _HINTS["date"], "birthdate": _HINTS["date"]}


def declarations(catalog: Catalog) -> str:
    """Write the types for a catalogue: a module without imports."""
    accepts = catalog.unlisted == "accept"
    lines = [
        "// Written by `relay catalog types`: change the catalogue, not this file.",
        "",
        "export interface RelayAddress {",
        *(f"  {part}?: string | null;" for part in Address.__struct_fields__),
        "}",
        "",
        "export interface RelayCustomer {",
        *_customer_fields(),
        "}",
        "",
        "export interface RelayLoyalty {",
        "  code: string;",
        "}",
        "",
        "export interface RelayReferral {",
        "  code: string;",
        "  referrer_id?: string;",
        "}",
        "",
        "/** The listed events, and what each may carry. */",
        "export interface RelayEvents {",
        *(line for rule in catalog.rules.values() for line in _event(rule)),
        "}",
        "",
        *(_unlisted(catalog.defaults) if accepts else ()),
        "/** The names that the relay takes. */",
        f"export type RelayEventName = keyof RelayEvents{_OTHERS if accepts else ''};",
        "",
        "/** What an event of this name may carry. */",
        "export type RelayEventParts<Name extends RelayEventName> =",
        f"  {_CHOICE if accepts else 'RelayEvents[Name]'};",
    ]
    return "\n".join(lines) + "\n"


# Any other text too; a plain `string` would take the listed names from the editor.
_OTHERS = " | (string & {})"
_CHOICE = "Name extends keyof RelayEvents ? RelayEvents[Name] : RelayUnlistedEvent"


def _customer_fields() -> list[str]:
    lines: list[str] = []
    for name in CUSTOMER_FIELDS:
        if hint := _CUSTOMER_HINTS.get(name):
            lines.append(f"  /** {hint} */")
        lines.append(f"  {name}?: {_CUSTOMER.get(name, 'string')};")
    return lines


def _event(rule: Rule) -> list[str]:
    name = quoted(rule.name or "")
    parts = [f"  {line}" for line in _parts(rule)]
    return [f"  /** {_summary(rule)} */", f"  {name}: {{", *parts, "  };"]


def _unlisted(rule: Rule) -> list[str]:
    return [
        f"/** An event that is not listed. {_summary(rule)} */",
        "export interface RelayUnlistedEvent {",
        *_parts(rule),
        "}",
        "",
    ]


def _summary(rule: Rule) -> str:
    said = [f"Priority {rule.priority}."]
    if rule.token == "required":  # noqa: S105 - the name of a rule
        said.append("Needs a token.")
    if rule.limit and not rule.limit_dry_run:
        window = span(rule.limit.period_ms // 1000)
        said.append(f"At most {rule.limit.quota} a customer in {window}.")
    if rule.coalesce_ms:
        said.append(
            f"One a customer in {span(rule.coalesce_ms // 1000)}: the last one."
        )
    if rule.ttl_s:
        said.append(f"Expires after {span(rule.ttl_s)}.")
    return " ".join(said)


def _parts(rule: Rule) -> list[str]:
    return [
        f"  customer?: {_customer(rule.customer)};",
        f"  loyalty?: {_allowed('RelayLoyalty', rule.loyalty)};",
        f"  referral?: {_allowed('RelayReferral', rule.referral)};",
        *_metadata(rule),
    ]


def _customer(fields: frozenset[str] | None) -> str:
    if fields is None:
        return "RelayCustomer"
    names = [quoted(name) for name in CUSTOMER_FIELDS if name in fields]
    return f"Pick<RelayCustomer, {' | '.join(names)}>" if names else _NOTHING


def _allowed(name: str, allowed: bool | None) -> str:
    return "never" if allowed is False else name


def _metadata(rule: Rule) -> list[str]:
    if rule.metadata is None:
        return [f"  metadata?: {_ANYTHING};"]
    # What the relay sets itself would be overwritten.
    types = {k: v for k, v in rule.metadata.items() if k not in rule.own}
    if not types:
        return [f"  metadata?: {_NOTHING};"]
    lines = ["  metadata?: {"]
    for name, kind in types.items():
        if hint := _HINTS.get(kind):
            lines.append(f"    /** {hint} */")
        lines.append(f"    {quoted(name)}?: {_METADATA[kind]};")
    return [*lines, "  };"]
