"""Who reaches an address, and what a request calls the server that it is for."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def named_hosts(host: str, key: str | None, allowed: Sequence[str]) -> frozenset[str] | None:
    """The names beside this machine's own that requests to a server at `host` may be for; None where any will do.

    A page in a browser can make its own name mean 127.0.0.1 (DNS rebinding) and then talk to a server there as to its own; what it
    cannot do is send another `Host` than its name. With a key it has nothing to say, and a server that others reach anyway is
    asked by names that it does not know. Names in `allowed` bind in every case.
    """
    if not allowed and (key is not None or not is_loopback(host)):
        return None
    return frozenset({_name(host), *map(_name, allowed)})


def is_for(header: str, hosts: frozenset[str]) -> bool:
    """Whether a request with this `Host` is for a server of these names, or for this machine by a name of its own."""
    host, colon, port = header.rpartition(":")
    name = _name(host if colon and port.isdecimal() and (host.endswith("]") or ":" not in host) else header)
    return name in hosts or is_loopback(name)


def _name(host: str) -> str:
    return host.strip().lower().removeprefix("[").removesuffix("]").removesuffix(".")
