"""Checks of a setting's text: addresses, folders, names. Each raises ValueError with the problem and a way out.

The message does not name the variable; `app.settings` puts that, and the value without its secrets, before it.
"""

import base64
import pwd
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from pydantic import SecretStr

from app.domain.webhooks.addresses import network_of
from bitwright.addresses import check_host, is_host, scheme_of, split_address, web_address

MOST_USERS = (1 << 32) - 1
LONGEST_SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""
TOKEN_KEY_BYTES = 32
ACCELERATED = re.compile(r"(/[A-Za-z0-9_-]{1,64}){1,8}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,159}")

DATABASES = ("sqlite", "sqlite+pysqlite", "postgresql", "postgres", "postgresql+psycopg")
DATABASE_WAY = "give sqlite:////folder/file.db or postgresql+psycopg://user:password@host:5432/name"
BROKERS: Mapping[str, str] = MappingProxyType(
    {
        **{"redis": "redis", "valkey": "redis", "rediss": "rediss", "valkeys": "rediss"},
        **{"redis+socket": "redis+socket", "valkey+socket": "redis+socket", "unix": "redis+socket"},
    }
)
"""Scheme -> the one that Celery knows."""
BROKER_WAY = (
    "give redis://host:6379/0 or valkey://host:6379/0, rediss:// or valkeys:// with TLS, or "
    "redis+socket:///folder/socket; unset, `bitwright serve` starts a broker itself"
)
TLS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
CERTIFICATES = ("required", "optional", "none", "CERT_REQUIRED", "CERT_OPTIONAL", "CERT_NONE")
BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
BLOB_WAY = "give file:///folder, or a bucket: s3://bucket/prefix"


def user(value: str) -> str:
    """A user of this machine, as its number.

    Raises:
        ValueError: there is none of this name, or it is root.
    """
    if value.isdigit():
        number = int(value)
    else:
        try:
            number = pwd.getpwnam(value).pw_uid
        except KeyError:
            raise ValueError("there is no such user; give the name or the number of one") from None
    if not 0 < number < MOST_USERS:
        raise ValueError(f"give a user that is not root, a number from 1 to {MOST_USERS - 1}")
    return str(number)


def database_url(value: str) -> str:
    """A database that the store knows, as it was given."""
    parts = split_address(value, DATABASE_WAY)
    if parts.scheme not in DATABASES:
        raise ValueError(f"{scheme_of(parts)} is no database that Bitwright works with; {DATABASE_WAY}")
    if parts.scheme.startswith("sqlite"):
        path = unquote(parts.path)
        if parts.netloc or not path.startswith("//") or path == "//":
            reason = "a file of SQLite needs its whole path, with four slashes: each process has its own working folder"
            raise ValueError(f"{reason}; {DATABASE_WAY}")
        if Path(path[1:]).is_dir():
            raise ValueError(f"this is a folder; name a file in it; {DATABASE_WAY}")
        return value
    has_socket = any(name == "host" for name, _ in parse_qsl(parts.query))
    check_host(parts, DATABASE_WAY, needed=not has_socket)
    return value


def with_password(url: str, password: SecretStr) -> str:
    """The address with a password that was given apart from it; whatever signs it has are quoted.

    An address that names no server, such as a file, stays as it is.
    """
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    user, _, given = parts.netloc.rpartition("@")[0].partition(":")
    if given:
        raise ValueError("it has a password of its own, and another one is given apart; leave one of them out")
    secret = quote(password.get_secret_value(), safe="")
    return parts._replace(netloc=f"{user}:{secret}@{parts.netloc.rpartition('@')[2]}").geturl()


def broker_url(value: str) -> str:
    """A broker's URL as Celery understands it; "" stays.

    `valkey` is `redis`, `valkeys` is `rediss`, and with TLS the server's certificate is checked unless the URL says
    otherwise: the library itself would check nothing.
    """
    if not value:
        return value
    parts = split_address(value, BROKER_WAY)
    if parts.scheme not in BROKERS:
        raise ValueError(f"{scheme_of(parts)} is no broker that Bitwright works with; {BROKER_WAY}")
    scheme, query = BROKERS[parts.scheme], dict(parse_qsl(parts.query, keep_blank_values=True))
    if scheme == "redis+socket":
        return _socket_url(parts, query)
    check_host(parts, BROKER_WAY)
    _check_number(parts.path.removeprefix("/"))
    allowed = TLS if scheme == "rediss" else ()
    for name in query:
        if name not in allowed:
            known = f"known are {', '.join(allowed)}" if allowed else "this kind of address takes none"
            raise ValueError(f"the parameter {name} is not known; {known}")
    if scheme == "rediss" and query.setdefault("ssl_cert_reqs", "required") not in CERTIFICATES:
        raise ValueError("ssl_cert_reqs is one of required, optional, none")
    return urlunsplit((scheme, parts.netloc, parts.path, urlencode(query), ""))


def _socket_url(parts: SplitResult, query: Mapping[str, str]) -> str:
    path = unquote(parts.path)
    host = parts.netloc.rpartition("@")[2]
    if host or not path.startswith("/") or path == "/":
        raise ValueError(f"a socket needs its whole path, after three slashes; {BROKER_WAY}")
    if len(path.encode()) > LONGEST_SOCKET_PATH:
        raise ValueError(f"the path of a socket has at most {LONGEST_SOCKET_PATH} bytes; choose a shorter one")
    for name in query:
        if name not in ("virtual_host", "db"):
            raise ValueError(f"the parameter {name} is not known; a socket takes virtual_host, the database's number")
    number = query.get("virtual_host", query.get("db", ""))
    _check_number(number)
    # A socket's path is taken as it is written: nothing is unquoted.
    return f"redis+socket://{parts.netloc}{path}" + (f"?virtual_host={quote(number)}" if number else "")


def _check_number(text: str) -> None:
    if text and not re.fullmatch(r"[0-9]{1,5}", text):
        raise ValueError(f"what follows the address is the number of a database, e.g. 0; {BROKER_WAY}")


def blob_url(value: str) -> str:
    """A folder or a bucket, as it was given."""
    if not value.strip() or "\0" in value:
        raise ValueError(f"this is no place; {BLOB_WAY}")
    if "://" not in value and not value.startswith("file:"):
        path = Path(value).expanduser()
        if not path.is_absolute():
            raise ValueError(f"a folder needs its whole path: each process has its own working folder; {BLOB_WAY}")
        _check_folder(path)
        return value
    parts = split_address(value, BLOB_WAY)
    if parts.scheme == "file":
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not path.is_absolute() or parts.query:
            raise ValueError(f"a folder needs its whole path, after three slashes; {BLOB_WAY}")
        _check_folder(path)
    elif parts.scheme not in BUCKETS:
        raise ValueError(f"{scheme_of(parts)} is no store that Bitwright works with; {BLOB_WAY}")
    elif not parts.netloc:
        raise ValueError(f"the bucket's name is missing; {BLOB_WAY}")
    return value


def folder(path: Path) -> Path:
    """The absolute form of a folder's path, which need not exist."""
    if "\0" in str(path):
        raise ValueError("a path holds no NUL")
    try:
        absolute = path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{error}: there is no such user; give the whole path") from error
    _check_folder(absolute)
    return absolute


def program(path: Path) -> Path:
    """The absolute path of a program; where it is missing, the worker that wants it says so."""
    if "\0" in str(path):
        raise ValueError("a path holds no NUL")
    try:
        absolute = path.expanduser().absolute()
        if absolute.is_dir():
            raise ValueError(f"{absolute} is a folder; name the program in it, e.g. {absolute}/bin/python")
    except RuntimeError as error:
        raise ValueError(f"{error}: there is no such user; give the whole path") from error
    except OSError as error:
        raise ValueError(f"this cannot be a program ({error.strerror}); name another one") from error
    return absolute


def _check_folder(path: Path) -> None:
    """A path that is, or leads through, what is no folder."""
    for place in (path, *path.parents):
        try:
            if place.is_dir():
                return
            if place.exists():
                raise ValueError(f"{place} is a file; name a folder")
        except OSError as error:  # a name that is too long, or a folder that is closed to us
            if not isinstance(error, PermissionError):
                raise ValueError(f"this cannot be a folder ({error.strerror}); name another one") from error


def password(value: SecretStr) -> SecretStr:
    """A secret of one line, with whatever signs."""
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in value.get_secret_value()):
        raise ValueError("a password is one line without control characters; does a line end belong to it?")
    return value


def token(value: SecretStr) -> SecretStr:
    """A secret that goes into a header: printable ASCII in one word."""
    if not re.fullmatch(r"[!-~]+", value.get_secret_value()):
        raise ValueError("a token is one word of printable ASCII; copy it anew, without quotes or line ends")
    return value


def optional_web_address(value: str) -> str:
    """An http or https URL, or nothing."""
    return web_address(value) if value else value


def headers(value: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """Headers of HTTP: names as they may be, values of printable ASCII."""
    for name, secret in value.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ValueError('a header has no such name; give {"name": "value"}')
        if not re.fullmatch(r"[ -~]*", secret.get_secret_value()):
            raise ValueError(f"the value of {name} is not printable ASCII; copy it anew, without line ends")
    return value


def token_keys(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    """Keys of Fernet: 32 bytes in URL-safe base 64."""
    for key in keys:
        try:
            size = len(base64.b64decode(key.get_secret_value(), altchars=b"-_", validate=True))
        except (ValueError, UnicodeEncodeError):
            size = 0
        if size != TOKEN_KEY_BYTES:
            raise ValueError("a key is 32 bytes in URL-safe base 64; `bitwright tenants token-key` makes one")
    return keys


def bind_host(value: str) -> str:
    """An IP address or a host's name, without scheme, port or brackets."""
    way = "give an address alone, e.g. 127.0.0.1, 0.0.0.0, :: or a host's name; the port is BITWRIGHT_PORT"
    if not is_host(value):
        raise ValueError(f"this is no address to listen on; {way}")
    return value


def hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    """Names of hosts without scheme or port, in lower case; `*` stands for all."""
    for name in value:
        if name != "*" and not is_host(name):
            raise ValueError(f"{name!r} is no host's name; give names alone, e.g. quantize.example.org, or *")
    return tuple(name.lower() for name in value)


def webhook_places(value: tuple[str, ...]) -> tuple[str, ...]:
    """Names of hosts, addresses and networks, without scheme or port."""
    for word in value:
        if network_of(word) is None and (not is_host(word) or "/" in word):
            way = "give names, addresses or networks alone, e.g. hooks.internal, 10.1.0.0/16"
            raise ValueError(f"{word!r} is neither a host nor a network; {way}")
    return value


def accelerated_path(value: str) -> str:
    """A path of a proxy's own, without a slash at its end; empty: there is none.

    Raises:
        ValueError: it is no path, or one that the service answers itself.
    """
    if value and (not ACCELERATED.fullmatch(value) or value.startswith("/v1")):
        raise ValueError("is no path that a proxy can have for itself; give one like /_bitwright_blobs")
    return value


def process_name(value: str) -> str:
    """A word that may stand in ids and log lines."""
    if not NAME.fullmatch(value):
        raise ValueError("a name has 1 to 160 letters, digits, dots, dashes or underscores, and begins with no sign")
    return value


def as_name(text: str) -> str:
    """Any text, a host's name say, as a `process_name`."""
    word = re.sub(r"[^A-Za-z0-9_.-]", "-", text).lstrip("-._")[:160]
    return word or "worker"
