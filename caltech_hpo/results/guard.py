"""Who may do what through the dashboard, and what a browser may do with its replies.

optuna-dashboard itself asks for no password, and whoever reaches it can write a trial's value. This is WSGI
middleware in front of it: `guarded` puts it there, `refusal` lists its checks.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from caltech_hpo.errors import UsageError

TOKEN_VARIABLE = "CALTECH_HPO_TOKEN"
SHORTEST_TOKEN = 16  # characters
TOKEN_FIX = f"export {TOKEN_VARIABLE}=$(openssl rand -hex 24)"
READS = ("GET", "HEAD", "OPTIONS")
# What --writable allows. No other route: a trial's value and attributes are the search's alone, and a renamed
# study would leave its test scores behind.
WRITES = {
    "PUT": re.compile(r"/api/studies/[0-9]+(/[0-9]+)?/note"),
    "POST": re.compile(r"/api/artifacts/[0-9]+(/[0-9]+)?"),
    "DELETE": re.compile(r"/api/(studies/[0-9]+|artifacts/[0-9]+(/[0-9]+)?/[0-9a-fA-F-]+)"),
}
HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f.]*:[0-9a-f:.]*)\]|(?P<name>[a-z0-9_.-]+))(?::[0-9]{1,5})?")

# For every reply without a policy of its own, so that no artifact can miss it; optuna-dashboard gives one to
# its page alone. An uploaded HTML or SVG file then runs no script and has no origin.
SANDBOX = "sandbox; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'"
PAGE = "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"  # added to the page's own
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# optuna-dashboard lets every web site read artifacts (Access-Control-Allow-Origin: *).
DROPPED = {name.lower() for name in ALWAYS} | {"access-control-allow-origin"}
Refusal = tuple[str, str]  # status and reason of a reply to a request that does not reach the dashboard


@dataclass(frozen=True)
class Access:
    """What the dashboard allows: host names as `host_name` gives them, the SHA-256 of the token."""

    hosts: frozenset[str]
    loopback: bool = True  # only this machine reaches it
    any_address: bool = False  # literal IP addresses are hosts too
    token: bytes | None = field(default=None, repr=False)
    writable: bool = False


def access_to(host: str, address: str, token: str | None, names: Iterable[str], *, writable: bool) -> Access:
    """The access to a dashboard that listens on `address`, the IP address of `host`.

    Loopback names, `host`, `address` and `names` are its hosts; on 0.0.0.0 or :: every literal address too
    (a rebound DNS name is never one). Raises UsageError: no token for an address that others reach, a token
    that is too short or cannot be typed, something in `names` that is no host name.
    """
    where = ip_address(address.partition("%")[0])
    if token is not None:
        _check_token(token)
    elif not where.is_loopback:
        raise UsageError(
            f"--host {host} lets other machines in: that needs a token in {TOKEN_VARIABLE}",
            f"{TOKEN_FIX}; or leave --host out, and use ssh -L from the other machine",
        )
    hosts = {"localhost", "127.0.0.1", "::1", host.lower(), str(where), *map(_allowed_name, names)}
    secret = None if token is None else hashlib.sha256(token.encode()).digest()
    return Access(frozenset(hosts), where.is_loopback, where.is_unspecified, secret, writable)


def _check_token(token: str) -> None:
    faults = {
        "is empty": not token,
        f"is too short: it needs {SHORTEST_TOKEN} characters": len(token) < SHORTEST_TOKEN,
        "may have only ASCII characters, and no spaces": not re.fullmatch("[!-~]*", token),
    }
    for fault, found in faults.items():
        if found:
            raise UsageError(f"{TOKEN_VARIABLE} {fault}", TOKEN_FIX)


def _allowed_name(text: str) -> str:
    name = host_name(f"[{text}]") or host_name(text)  # an IPv6 address has brackets in a header only
    if name is None:
        raise UsageError(f"--allow-host {text}: is no host name", "as in --allow-host gpu.example.org")
    return name


def host_name(text: str) -> str | None:
    """The host of a Host header: lower case, no port, brackets or trailing dot; None if it is malformed."""
    match = HOST.fullmatch(text.strip().lower())
    if match is None:
        return None
    return _address(match["v6"]) if match["v6"] else match["name"].removesuffix(".") or None


def _address(name: str) -> str | None:
    with contextlib.suppress(ValueError):
        return str(ip_address(name))
    return None


def guarded(app: WSGIApplication, access: Access) -> WSGIApplication:
    """The application behind the checks of `refusal`, its replies with headers that bind browsers."""

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start, refused = _protecting(start_response), refusal(environ, access)
        return app(environ, start) if refused is None else _refuse(refused, environ, start)

    return application


def refusal(environ: WSGIEnvironment, access: Access) -> Refusal | None:
    """Why a request must not reach the dashboard, or None. First the host: a rebound page learns nothing."""
    return _wrong_host(environ, access) or _no_token(environ, access) or _no_right(environ, access)


def _wrong_host(environ: WSGIEnvironment, access: Access) -> Refusal | None:
    name = host_name(environ.get("HTTP_HOST", ""))
    if name is None:
        return "400 Bad Request", "the Host header is missing or malformed (names: --allow-host)"
    if name in access.hosts or (access.any_address and _address(name)):
        return None
    return "421 Misdirected Request", f"'{name}' is no name of this dashboard (--allow-host makes it one)"


def _no_token(environ: WSGIEnvironment, access: Access) -> Refusal | None:
    given = hashlib.sha256(_given_token(environ.get("HTTP_AUTHORIZATION", ""))).digest()
    # Hashes have one length: the time says nothing of the token's, either.
    if access.token is None or hmac.compare_digest(given, access.token):
        return None
    return "401 Unauthorized", f"log in: any user name, with {TOKEN_VARIABLE} as the password"


def _given_token(header: str) -> bytes:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):  # not base64
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


def _no_right(environ: WSGIEnvironment, access: Access) -> Refusal | None:
    method, forbidden = environ["REQUEST_METHOD"], "403 Forbidden"
    if method in READS:
        return None
    if not access.writable:
        return forbidden, "this dashboard only reads; start it with --writable for notes and deletes"
    if not _same_site(environ):
        return forbidden, "sent by another site (a proxy in front must pass the Host header on)"
    if method not in WRITES or not WRITES[method].fullmatch(environ.get("PATH_INFO", "")):
        return forbidden, "--writable allows notes, artifacts and deletes, and nothing else"
    return None


def _same_site(environ: WSGIEnvironment) -> bool:
    """False where a browser says that another site's page sent it; what is no browser says nothing."""
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
        return False
    origin, host = environ.get("HTTP_ORIGIN"), environ["HTTP_HOST"]
    return origin is None or origin.partition("://")[2].lower() == host.strip().lower()


def _refuse(refused: Refusal, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
    status, reason = refused
    body = json.dumps({"reason": reason}).encode() + b"\n"  # optuna-dashboard's page shows such reasons
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    asked = ("WWW-Authenticate", 'Basic realm="caltech-hpo", charset="UTF-8"')
    start(status, [*headers, asked] if status.startswith("401") else headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _protecting(start_response: StartResponse) -> StartResponse:
    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None, /) -> Any:
        own = any(name.lower() == "content-security-policy" for name, _ in headers)
        kept = [(name, _here(name, value)) for name, value in headers if name.lower() not in DROPPED]
        policy = ("Content-Security-Policy", PAGE if own else SANDBOX)
        return start_response(status, [*kept, *ALWAYS.items(), policy], exc_info)

    return start


def _here(name: str, value: str) -> str:
    """A header's value; a redirect without scheme and host, which a TLS proxy in front has changed."""
    return urlsplit(value)._replace(scheme="", netloc="").geturl() if name.lower() == "location" else value
