"""Python imports this at its start, where this folder is on its path: the hook in child processes.

An environment of its own, or `python -I`, does without; so does what opens sockets outside Python.
"""

import ipaddress
import os
import socket
import sys

FILE = "MINIDIFF_TEST_SOCKETS"  # environment variable: the file that a line is added to
ASK = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}  # of (host, ...)
SEND = {"socket.connect", "socket.sendto", "socket.sendmsg"}  # of (socket, address)


def is_local(host: object) -> bool:
    host = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def hook(event: str, args: tuple) -> None:
    """Refuse anything but loopback and Unix sockets, and write down what was asked for."""
    if event in ASK and args[0] != socket.gethostname():  # torchrun asks for its own name
        address = args[:2]
    elif event in SEND and isinstance(args[1], tuple) and isinstance(args[1][0], str | bytes):
        address = args[1][:2]
    else:
        return
    if FILE in os.environ and not is_local(address[0]):
        with open(os.environ[FILE], "a", encoding="utf-8") as file:
            file.write(f"{event} {address}\n")
        raise ConnectionError(f"the tests have no network: {event} {address}")


sys.addaudithook(hook)
