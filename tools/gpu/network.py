"""The rehearsal's network: only this machine itself answers.

python -m tools.gpu.network          in a network of its own (``unshare -n``), makes the loopback usable; then checks
                                     that nothing else can be reached, without sending anything
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from typing import Any

__all__ = ["block", "blocked", "main"]

ELSEWHERE = ("192.0.2.1", 9)
"""An address that no machine has: it is kept for documentation."""


def main() -> int:
    """0 if the loopback answers and nothing else can be reached."""
    raise_loopback()
    if not blocked():
        print("the network is not blocked: a route leads out of this machine", flush=True)
        return 1
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    return 0


def blocked() -> bool:
    """Whether nothing outside this machine can be reached. Connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
        except OSError:
            return True
    return False


def raise_loopback() -> None:
    """Switch the interface ``lo`` on; it is off in a new network. Nothing happens where that is not permitted."""
    read, write, up = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            asked = fcntl.ioctl(any_socket, read, struct.pack("16sh22x", b"lo", 0))
            (flags,) = struct.unpack("16xh22x", asked)
            fcntl.ioctl(any_socket, write, struct.pack("16sh22x", b"lo", flags | up))
        except OSError:
            pass


def block() -> None:
    """From now on, sockets of this process that Python opens reach this machine alone."""
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple) and not _here(str(address[0])):
            raise OSError(f"the rehearsal has no network: {address[0]} cannot be reached")
    elif event == "socket.getaddrinfo" and isinstance(arguments[0], str) and not _here(arguments[0]):
        raise socket.gaierror(f"the rehearsal has no network: the name {arguments[0]} is not looked up")


def _here(host: str) -> bool:
    return host in ("", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()) or host.startswith("127.")


if __name__ == "__main__":
    sys.exit(main())
