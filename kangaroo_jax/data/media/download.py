"""Downloads of addresses into files, within limits of size and time.

Web addresses are read by `http.client`, so that the connection goes to the host that was checked: a name is looked up
once, and each redirect is checked anew. Buckets are read by fsspec.
"""

import base64
import dataclasses
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from kangaroo_jax.data.media.addresses import WEB, check_scheme, public_hosts, scheme_of, short
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.installing import install_line

_BLOCK = 1 << 20  # bytes
_SILENCE = 60.0  # seconds without a byte after which a download fails


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of fetching one address: size, time, redirects, and where it may lead."""

    bytes: int = 4 << 30
    seconds: float = 600.0
    allow_private: bool = False  # this machine, and private networks
    redirects: int = 10
    check: Callable[[str], None] | None = None  # raises UserError for an address, or a redirect, that may not be read


def download(address: str, file: BinaryIO, limits: Limits) -> None:
    """Write the bytes of an address to `file`. Raises UserError, or what a library raises."""
    check_scheme(address)
    if address.startswith("data:"):
        head, _, body = address.partition(",")
        file.write(base64.b64decode(body) if head.endswith(";base64") else urllib.parse.unquote_to_bytes(body))
        return
    web = scheme_of(address) in WEB
    end = time.monotonic() + limits.seconds
    written = 0
    for block in _web_blocks(address, limits) if web else _store_blocks(address, limits):
        written += len(block)
        if written > limits.bytes:
            raise _too_large(address, limits)
        if time.monotonic() > end:
            raise _too_slow(address, limits)
        file.write(block)


def _too_large(address: str, limits: Limits) -> UserError:
    most = limits.bytes / (1 << 30)
    return UserError(f"{short(address)}: larger than {most:g} GiB, the limit of config.data.fetch_gib")


def _too_slow(address: str, limits: Limits) -> UserError:
    return UserError(f"{short(address)}: not here after {limits.seconds:g} s, the limit of config.data.fetch_seconds")


def _store_blocks(address: str, limits: Limits) -> Iterator[bytes]:
    try:
        import fsspec

        with fsspec.open(address, "rb") as source:
            if (getattr(source, "size", None) or 0) > limits.bytes:
                raise _too_large(address, limits)
            while block := source.read(_BLOCK):
                yield block
    except ImportError:
        raise UserError(f"{short(address)}: packages to read it are missing: {install_line('remote')}") from None


# ------------------------------------------------------------------------------------ web


def _web_blocks(address: str, limits: Limits) -> Iterator[bytes]:
    """The body of a web address; redirects are followed."""
    end = time.monotonic() + limits.seconds
    target = address
    for _ in range(limits.redirects + 1):
        if limits.check is not None:
            limits.check(target)
        connection = _connection(target, limits)
        timer = threading.Timer(max(end - time.monotonic(), 0.0), connection.cut)
        timer.daemon = True
        timer.start()
        try:
            response = _asked(connection, target)
            moved = response.getheader("Location") if response.status in (301, 302, 303, 307, 308) else None
            if moved is None:
                yield from _body(address, response, limits)
            if connection.late:  # a cut connection may look like the end of the headers or of a body without a length
                raise _too_slow(address, limits)
            if moved is None:
                return
        except (OSError, http.client.HTTPException):
            if connection.late:
                raise _too_slow(address, limits) from None
            raise
        finally:
            timer.cancel()
            connection.close()
        target = urllib.parse.urljoin(target, moved)
        if scheme_of(target) not in WEB:
            raise UserError(f"{short(address)}: leads to {short(target)}, which is no address of the web")
        check_scheme(target)
    raise UserError(f"{short(address)}: is redirected more than {limits.redirects} times")


def _connection(address: str, limits: Limits) -> "_Plain":
    """An unopened connection to a host that was checked."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise UserError(f"{short(address)}: not an address ({error})") from None
    secure = parts.scheme.lower() == "https"
    port = port or (443 if secure else 80)
    hosts = public_hosts(address, host, port, allow_private=limits.allow_private)
    silence = min(_SILENCE, limits.seconds)
    if secure:
        return _Secure(hosts, host, port, silence)
    return _Plain(hosts, host, port, silence)


def _opened(hosts: list[str], port: int, seconds: float) -> socket.socket:
    """A socket to the first of a host's IP addresses that answers, within `seconds` for all. Raises OSError."""
    failure, end = OSError("no address"), time.monotonic() + seconds
    for left, host in zip(range(len(hosts), 0, -1), hosts, strict=True):
        try:
            opened = socket.create_connection((host, port), max((end - time.monotonic()) / left, 0.01))
            opened.settimeout(seconds)
            return opened
        except OSError as error:
            failure = error
    raise failure


class _Plain(http.client.HTTPConnection):
    """A connection to one of a host's given IP addresses; another thread can cut it at any time."""

    def __init__(self, hosts: list[str], host: str, port: int, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self._hosts = hosts
        self._wire: socket.socket | None = None  # kept because `sock` is None while a response without a length is read
        self.late = False

    def connect(self) -> None:
        """See `HTTPConnection`."""
        self._use(_opened(self._hosts, self.port, self.timeout or _SILENCE))

    def _use(self, wire: socket.socket) -> None:
        self.sock = self._wire = wire
        if self.late:
            self.cut()

    def cut(self) -> None:
        """End the connection because its time is over."""
        self.late = True
        if self._wire is not None:
            try:
                self._wire.shutdown(socket.SHUT_RDWR)
            except OSError:
                self._wire.close()


class _Secure(_Plain):
    """The same with TLS; the certificate is checked against the host's name."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        """See `HTTPConnection`."""
        super().connect()
        self._use(ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host))


def _asked(connection: http.client.HTTPConnection, address: str) -> http.client.HTTPResponse:
    """The response to a GET request for an address; its body is not yet read."""
    parts = urllib.parse.urlsplit(address)
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    headers = {"User-Agent": "kangaroo-jax", "Accept": "*/*", "Accept-Encoding": "identity"}
    if parts.username is not None:
        name, word = (urllib.parse.unquote(text or "") for text in (parts.username, parts.password))
        headers["Authorization"] = "Basic " + base64.b64encode(f"{name}:{word}".encode()).decode()
    connection.request("GET", path + (f"?{query}" if query else ""), headers=headers)
    return connection.getresponse()


def _body(address: str, response: http.client.HTTPResponse, limits: Limits) -> Iterator[bytes]:
    if response.status != 200:
        raise UserError(f"{short(address)}: cannot be fetched ({response.status} {response.reason[:80]})")
    stated = response.length  # bytes; None if the server does not state it
    if (stated or 0) > limits.bytes:
        raise _too_large(address, limits)
    read: Callable[[int], Any] = response.read1  # at most one wait for the network
    got = 0
    while block := read(_BLOCK):
        got += len(block)
        yield block
    if stated is not None and got < stated:
        raise UserError(f"{short(address)}: cannot be fetched (the connection ended at {got:,} of {stated:,} bytes)")
