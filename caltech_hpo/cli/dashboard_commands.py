"""`dashboard`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from caltech_hpo.cli import INTERRUPTED
from caltech_hpo.cli.options import DEFAULT_HOME, Home, Storage, place_of, say


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(dashboard)


def dashboard(
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but a loopback one needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    writable: Annotated[
        bool,
        typer.Option("--writable", help="Allow notes, artifacts and deletes; without it all is read-only."),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another name that browsers reach it by, as of a proxy. Repeatable."
        ),
    ] = None,
    home: Home = DEFAULT_HOME,
    storage: Storage = None,
) -> None:
    """Serve optuna-dashboard on the study database until Ctrl-C.

    Only this machine reaches it, and it only reads. --host lets others in, who need the token in
    CALTECH_HPO_TOKEN (16 or more characters), as the password of any user name or as a bearer token;
    where it is set, browsers on this machine are asked for it too. HTTP is not encrypted: put a TLS
    proxy in front, or use ssh -L. A trial's value can never be changed here.

    Example: caltech-hpo dashboard --port 8080
    """
    from caltech_hpo.results.dashboard import bind, make_app, resolve, serve
    from caltech_hpo.results.guard import TOKEN_VARIABLE, access_to

    address = resolve(host, port)
    token = os.environ.get(TOKEN_VARIABLE)
    access = access_to(host, address.where[0], token, allow_host or (), writable=writable)
    place = place_of(home, storage)
    application = make_app(place.storage, place.home / "artifacts", access)
    listening = bind(address)
    bound = address._replace(where=listening.getsockname())
    if not access.loopback:
        say(
            f"warning: HTTP on {host} is not encrypted: others on the network can read token and studies; "
            "put a TLS proxy in front, or use ssh -L"
        )
    asks = f", asks for {TOKEN_VARIABLE} as the password" if token else ""
    say(f"dashboard: http://{bound}/  ({'writable' if writable else 'read-only'}{asks}; Ctrl-C ends it)")
    serve(application, listening, writable=writable)  # returns on Ctrl-C
    raise typer.Exit(INTERRUPTED)
