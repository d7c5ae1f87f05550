"""Addresses in records: which may be read, and which hosts may be contacted.

Records come from strangers. An address must begin with `https://`, `http://`, `gs://`, `gcs://`, `s3://` or `data:`
and lead to a host on the public internet, unless the user allows others. Otherwise a record could read what only the
training machine can reach.
"""

import ipaddress
import re
import socket
from pathlib import Path

from kangaroo_jax.errors import UserError, printable

WEB = ("http", "https")
STORES = ("s3", "gs", "gcs")
_ADDRESS = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+)://")
_DATA = re.compile(r"^data:[\w.+/;=-]*,", re.ASCII)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that the public internet uses


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address that has to be fetched, with any scheme."""
    text = str(path)
    return bool(_DATA.match(text)) or scheme_of(text) not in ("", "file")


def scheme_of(path: str | Path) -> str:
    """The scheme of an address `x://...` in lower case, "" for anything else."""
    match = _ADDRESS.match(str(path))
    return match[1].lower() if match else ""


def short(path: str | Path, longest: int = 200) -> str:
    """A path for messages, without the bytes of a `data:` address and with terminal control characters escaped."""
    text = str(path)
    if text.startswith("data:"):
        return printable(f"{text.partition(',')[0][: longest // 2]},...")
    return printable(text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 4 :]}")


def check_address(address: str, *, allow_private: bool = False) -> None:
    """Raise a UserError unless a record may name this address. The host of a web address is looked up.

    Args:
        address: an address, see `is_remote`.
        allow_private: whether it may lead to this machine or its own network.
    """
    check_scheme(address)
    if scheme_of(address) in WEB:
        import urllib.parse

        try:
            parts = urllib.parse.urlsplit(address)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"{short(address)}: not an address ({error})") from None
        public_hosts(address, host or "", port or 443, allow_private=allow_private)


def check_scheme(address: str) -> None:
    """Raise a UserError if an address has an unknown scheme, or is a chain of several."""
    if _DATA.match(address):
        return
    if scheme_of(address) not in (*WEB, *STORES):
        known = ", ".join(f"{scheme}://" for scheme in ("https", "http", "gs", "s3"))
        raise UserError(f"{short(address)}: addresses are {known} or data:, not {scheme_of(address)}://")
    if "::" in re.sub(r"\[[0-9a-fA-F:.]*\]", "", address):  # without the brackets of an IPv6 host
        raise UserError(f"{short(address)}: an address with '::' (a chain of file systems) is not read")


def public_hosts(address: str, host: str, port: int, *, allow_private: bool) -> list[str]:
    """The IP addresses of a host, looked up once.

    Raises:
        UserError: there are none, or one is not of the public internet and `allow_private` is not set.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name of a host"
        raise UserError(f"{short(address)}: cannot be fetched ({printable(host)!r}: {reason})") from None
    hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    private = next((one for one in hosts if not is_public(one)), None)
    if private is not None and not allow_private:
        raise UserError(
            f"{short(address)}: leads to {private}, which is this machine or a private network; "
            "--config.data.allow_private=True (kangaroo data: --allow-private, "
            "kangaroo curate: --config.input.allow_private=True) reads such addresses"
        )
    return hosts


def is_public(host: str) -> bool:
    """Whether an IP address, in its usual spelling, and any IPv4 address embedded in it are on the public internet."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    inner = None
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    if inner is not None:
        return is_public(str(inner))
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast
