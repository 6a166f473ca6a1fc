"""Study database URLs: where they point, and how they are shown without their passwords."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus, unquote

from caltech_hpo.errors import StorageError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import URL

HIDDEN = "***"
SERVER = re.compile(r"(?!sqlite)[^:/]*://(?P<rest>.*)", re.DOTALL)
SECRETS = ("password", "passwd", "pwd", "sslpassword", "passfile")


def default_url(home: Path) -> str:
    """The SQLite database in the home."""
    return f"sqlite:///{(home / 'studies.db').absolute()}"


def parse_url(url: str) -> URL:
    """The URL taken apart. Raises StorageError, without showing it, for anything that is no URL."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    server = SERVER.fullmatch(url)
    if server and server["rest"].partition("?")[0].count("@") > 1:
        raise StorageError(
            "--storage (or CALTECH_HPO_STORAGE): more than one '@' in the URL",
            "write an '@' of the user or the password as %40",
        )
    try:
        parsed = make_url(url)
        if server and "@" in (parsed.host or ""):
            raise ValueError("an unescaped '@'")
        return parsed
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise StorageError(
            "--storage (or CALTECH_HPO_STORAGE) is not a database URL",
            "write sqlite:///FILE or postgresql://USER@HOST/DATABASE",
        ) from error


def sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL; None for another database. Raises StorageError."""
    parsed = parse_url(url)
    if not parsed.drivername.startswith("sqlite"):
        return None
    if parsed.query and not (parsed.database or "").startswith("file:"):
        raise StorageError("--storage: a SQLite URL takes no options ('?...')", "write sqlite:///FILE")
    if not parsed.database or parsed.database == ":memory:":
        raise StorageError("--storage: a SQLite database in memory keeps nothing", "write sqlite:///FILE")
    return Path(parsed.database)


def shown(url: str) -> str:
    """The URL without its password and its options; a SQLite file by its path."""
    path = sqlite_path(url)
    if path is not None:
        return str(path)
    return parse_url(url).set(query={}).render_as_string(hide_password=True)


def passwords(url: str) -> set[str]:
    """The passwords in a URL, as they are and as they are escaped; of an unusable URL, what may be one."""
    try:
        parsed = parse_url(url)
    except StorageError:
        found = [part for part in re.split(r"://|[:/?&=]", url)[2:] if part]
        return {piece for part in found for piece in (part, *part.split("@")) if len(piece) > 3}
    values = [parsed.password, *(parsed.query.get(name) for name in SECRETS)]
    plain = {
        str(part) for value in values if value for part in ([value] if isinstance(value, str) else value)
    }
    return plain | {quote(part, safe="") for part in plain} | {quote_plus(part) for part in plain}


def redact(text: str, url: str | None) -> str:
    """The text, an error of a database driver say, without the URL's passwords."""
    secrets = sorted(passwords(url), key=len, reverse=True) if url else []
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def no_driver(url: str, error: ImportError) -> StorageError:
    """What to raise where the package that speaks to a database server is missing."""
    fix = "install the database's driver: pip install 'caltech-hpo[postgresql]' for PostgreSQL"
    return StorageError(f"{shown(url)}: {error}", fix)


def refuse_password(url: str) -> None:
    """Raises UsageError for a command line's URL with a password: every user of the machine can read it."""
    server = SERVER.fullmatch(url)
    if server is None:
        return
    options = server["rest"].partition("?")[2]
    named = any(unquote(option.partition("=")[0]).lower() in SECRETS for option in re.split("[&;?]", options))
    # The whole of it: a password may hold a question mark.
    if named or ":" in server["rest"].rpartition("@")[0]:
        raise UsageError(
            "--storage: a password on the command line can be read by everybody on this machine (ps)",
            "put the URL into the environment variable CALTECH_HPO_STORAGE, or the password into "
            "PGPASSWORD or ~/.pgpass",
        )
