"""What `relay check` finds: the codes, and how they are told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["fault", "warning", "note"]
# Stable; docs/operations.md tells each.
Code = Literal[
    "setting",
    "setting_doubtful",
    "catalog_doubtful",
    "no_catalog",
    "ops_without_token",
    "anonymous_trusted",
    "any_origin",
    "tokens_dry_run",
    "http_origin",
    "origin_elsewhere",
    "redis_unencrypted",
    "same_keys",
    "odd_credentials",
    "budget_above_limit",
    "cannot_verify",
    "look_up_scope",
    "sandbox_cluster",
    "cluster_unreachable",
    "cluster_tls",
    "cluster_failing",
    "not_the_api",
    "clock_skew",
    "no_relay_yet",
    "redis_unreachable",
    "redis_foreign",
    "redis_unfit",
    "redis_evicts_marks",
    "redis_not_persistent",
    "redis_fsync_off",
    "redis_disk",
    "redis_nearly_full",
    "delivery_held",
    "unaccounted",
    "dead_letters",
    "backlog_expires",
    "cycle_runs_out",
    "untrusted_proxy",
    "budget_below_traffic",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found. A fault would lose events or money."""

    level: Level
    code: Code
    about: str  # a setting, or a part of the relay
    detail: str
    cure: str


def lines(findings: Sequence[Finding]) -> list[str]:
    """The same for people."""
    told = [
        line
        for f in findings
        for line in (
            f"{f.level:<8} {f.code}  ({f.about})",
            f"         {f.detail}",
            f"         {f.cure}",
        )
    ]
    faults = sum(f.level == "fault" for f in findings)
    return [
        *told,
        "",
        f"Faults: {faults}. Other findings: {len(findings) - faults}.",
        "No event was sent, so credentials are judged by their shape alone.",
    ]
