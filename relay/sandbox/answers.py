"""Voucherify's answers, byte for byte where the documentation shows them.

There are two error shapes: Voucherify's own `{code, key, message, …}`, and the one
of its HTTP framework, `{statusCode, error, message}`, for what fails before the API.
"""

from dataclasses import dataclass, replace
from http import HTTPStatus

import msgspec

JSON = "application/json; charset=utf-8"

# Documented for the client-side limit, without `key` and without `request_id`.
TOO_MANY = b'{"code":429,"message":"Too many requests hit the API too quickly."}'

_KEYS = {
    400: ("invalid_payload", "Invalid payload"),
    401: ("unauthorized", "Unauthorized"),
    402: ("missing_required_feature", "Payment required"),
    403: ("missing_required_permission", "Missing permission"),
    404: ("not_found", "Resource not found"),
    500: ("internal_error", "Internal error"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer, and in `verdict` the sandbox's own word for it."""

    verdict: str
    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    details: str | None = None
    request_id: str | None = None

    def with_headers(self, headers: tuple[tuple[str, str], ...]) -> "Answer":
        """Return the answer with more headers; a name given again replaces."""
        if not headers:
            return self
        names = {name.lower() for name, _ in headers}
        kept = tuple(pair for pair in self.headers if pair[0].lower() not in names)
        return replace(self, headers=kept + headers)


def ok(verdict: str, body: object, *, status: int = 200) -> Answer:
    """Answer with JSON."""
    return Answer(verdict=verdict, status=status, body=msgspec.json.encode(body))


def error(
    verdict: str,
    status: int,
    request_id: str,
    *,
    key: str | None = None,
    message: str | None = None,
    details: str | None = None,
    resource: tuple[str, str] | None = None,
) -> Answer:
    """Answer in Voucherify's error shape; `resource` is its id and type."""
    usual_key, usual_message = _KEYS.get(status, ("error", HTTPStatus(status).phrase))
    body: dict[str, object] = {
        "code": status,
        "key": key or usual_key,
        "message": message or usual_message,
    }
    if details is not None:
        body["details"] = details
    body["request_id"] = request_id
    if resource is not None:
        body["resource_id"], body["resource_type"] = resource
    return Answer(
        verdict=verdict,
        status=status,
        body=msgspec.json.encode(body),
        details=details,
        request_id=request_id,
    )


def framework_error(verdict: str, status: int, message: str | None = None) -> Answer:
    """Answer in the HTTP framework's error shape."""
    # The framework's own phrase, which newer HTTP libraries have renamed.
    phrase = {413: "Request Entity Too Large"}.get(status, HTTPStatus(status).phrase)
    body = {"statusCode": status, "error": phrase, "message": message or phrase}
    return Answer(
        verdict=verdict,
        status=status,
        body=msgspec.json.encode(body),
        details=message,
    )


def too_many(verdict: str, headers: tuple[tuple[str, str], ...]) -> Answer:
    """Answer 429."""
    return Answer(verdict=verdict, status=429, body=TOO_MANY, headers=headers)


def usual_error(status: int, request_id: str) -> Answer:
    """Answer as `status` looks when nothing more is known of its cause."""
    if status == 429:
        return too_many("fault", ())
    if status in (502, 503, 504):
        # These come from the load balancer, and load balancers speak HTML.
        return html_error(status)
    if status in (405, 406, 413, 415):
        return framework_error("fault", status)
    return error("fault", status, request_id)


def html_error(status: int) -> Answer:
    """Answer as a load balancer does."""
    title = f"{status} {HTTPStatus(status).phrase}"
    page = (
        f"<html>\r\n<head><title>{title}</title></head>\r\n"
        f"<body>\r\n<center><h1>{title}</h1></center>\r\n</body>\r\n</html>\r\n"
    )
    return Answer(
        verdict="fault", status=status, body=page.encode(), content_type="text/html"
    )
