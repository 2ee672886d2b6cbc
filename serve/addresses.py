"""Hosts and ports, for every front door."""

import logging
import socket

log = logging.getLogger(__name__)


def join(host: str, port: int) -> str:
    """127.0.0.1:8001, or [::1]:8001."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that holds the address; port 0 takes a free one.

    Raises:
        OSError: somebody else has it, or it is not ours.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # without it a restart would wait a minute
        listener.bind(address)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def warn_if_open(endpoint: str, host: str) -> None:
    if host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("%s can be reached from other machines, and asks nobody for a key", endpoint)
