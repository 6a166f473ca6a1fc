"""`dashboard`."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from caltech_hpo.cli import INTERRUPTED
from caltech_hpo.cli.options import DEFAULT_HOME, Home, Storage, place_of, say
from caltech_hpo.cli.stopping import SIGNAL_EXIT

if TYPE_CHECKING:
    from socket import socket
    from wsgiref.types import WSGIApplication

    from caltech_hpo.search.request import Place


Host = Annotated[
    str, typer.Option("--host", help="Address to listen on; any but a loopback one needs a token.")
]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
Writable = Annotated[
    bool,
    typer.Option("--writable", help="Allow notes, artifacts and deletes; without it all is read-only."),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", metavar="NAME",
        help="Another name that browsers reach it by, as of a proxy. Repeatable.",
    ),
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(dashboard)


def dashboard(
    host: Host = "127.0.0.1",
    port: Port = 8080,
    writable: Writable = False,
    allow_host: AllowHost = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """Serve optuna-dashboard on the study database until Ctrl-C or SIGTERM.

    Only this machine reaches it, and it only reads. --host lets others in, who need the token in
    CALTECH_HPO_TOKEN (16 or more characters), as the password of any user name or as a bearer token;
    where it is set, browsers on this machine are asked for it too. HTTP is not encrypted: put a TLS
    proxy in front, or use ssh -L. A trial's value can never be changed here.

    Example: caltech-hpo dashboard --port 8080
    """
    from caltech_hpo.results.dashboard import serve

    application, listening = open_dashboard(
        place_of(home, storage), host, port, allow_host, writable=writable
    )
    code = INTERRUPTED

    def end(number: int, _: object) -> None:
        nonlocal code
        code = SIGNAL_EXIT + number
        sys.exit(code)  # the server takes it for Ctrl-C

    signal.signal(signal.SIGTERM, end)
    say("Ctrl-C ends it")
    serve(application, listening, writable=writable)  # returns on either
    raise typer.Exit(code)


def open_dashboard(
    place: Place, host: str, port: int, names: list[str] | None, *, writable: bool
) -> tuple[WSGIApplication, socket]:
    """The guarded application and its listening socket; says where it is."""
    from caltech_hpo.results.dashboard import bind, make_app, resolve
    from caltech_hpo.results.guard import TOKEN_VARIABLE, access_to

    address = resolve(host, port)
    token = os.environ.get(TOKEN_VARIABLE)
    access = access_to(host, address.where[0], token, names or (), writable=writable)
    application = make_app(place, access)
    listening = bind(address)
    bound = address._replace(where=listening.getsockname())
    if not access.loopback:
        say(
            f"warning: HTTP on {host} is not encrypted: others on the network can read token and studies; "
            "put a TLS proxy in front, or use ssh -L"
        )
    asks = f", asks for {TOKEN_VARIABLE} as the password" if token else ""
    say(f"dashboard: http://{bound}/  ({'writable' if writable else 'read-only'}{asks})")
    return application, listening
