"""Requests to the dashboard without a server."""

from __future__ import annotations

import io
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

from caltech_hpo.results import dashboard
from caltech_hpo.results.guard import access_to
from caltech_hpo.search.request import Place
from caltech_hpo.search.urls import default_url


def app_of(made, *, host="127.0.0.1", token=None, names=(), writable=False):
    """The guarded application on a home."""
    access = access_to(host, host, token, names, writable=writable)
    return dashboard.make_app(Place(made.home, default_url(made.home)), access)


def call(app, method="GET", path="/api/studies", body=b"", **environment):
    """A request without a server: status, headers in lower case, body. None leaves a variable out."""
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "HTTP_HOST": "localhost:8080",
        "HTTP_ACCEPT_ENCODING": "identity", "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body), "wsgi.errors": io.StringIO(),
    }  # fmt: skip
    setup_testing_defaults(environ)
    environ |= environment
    started = []
    reply = app(
        {name: value for name, value in environ.items() if value is not None},
        lambda *all: started.append(all),
    )
    content = b"".join(reply)
    status, headers, *_ = started[-1]
    return SimpleNamespace(
        status=int(status.split()[0]), headers=[(name.lower(), value) for name, value in headers],
        header={name.lower(): value for name, value in headers}, body=content,
    )  # fmt: skip
