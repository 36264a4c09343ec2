"""The tests' own hook: it bites, in child processes too, and lets loopback and Unix sockets pass."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.sockets import attempts

ELSEWHERE = "192.0.2.1"  # reserved for documentation: nobody is there


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: socket.create_connection((ELSEWHERE, 9), 0.1), ELSEWHERE),
        (lambda: socket.socket().connect_ex((ELSEWHERE, 9)), ELSEWHERE),
        (lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", (ELSEWHERE, 9)), ELSEWHERE),
        (lambda: socket.getaddrinfo("example.org", 443), "example.org"),
        (lambda: socket.gethostbyname("example.org"), "example.org"),
    ],
    ids=["create_connection", "connect_ex", "sendto", "getaddrinfo", "gethostbyname"],
)
def test_other_addresses_are_refused_and_written_down(call, name):
    with pytest.raises(ConnectionError, match=name):
        call()
    (line,) = attempts()
    assert name in line


def test_loopback_and_unix_sockets_pass(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
        socket.create_connection(("localhost", server.getsockname()[1])).close()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))


@pytest.mark.parametrize("where", ["here", "in a child process"])
def test_a_test_that_swallows_the_refusal_fails_with_the_address(tmp_path, where):
    ask = f"import socket; socket.create_connection(({ELSEWHERE!r}, 9), 0.1)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ask!r}], check=False)"
    code = f"""
        import contextlib
        def test():
            with contextlib.suppress(OSError):
                exec({ask if where == "here" else child!r})
        """
    (tmp_path / "test_it.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.sockets", tmp_path]
    ended = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "loopback and Unix sockets are allowed" in ended.stdout
    assert f"('{ELSEWHERE}', 9)" in ended.stdout
