"""A rehearsal reaches this machine alone, in a network of its own or by the hook that stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools.gpu.needs import ROOT

HOOK = ROOT / "tools" / "gpu" / "no_network"

LOOPBACK = """
import socket
server = socket.socket(); server.bind(("127.0.0.1", 0)); server.listen()
client = socket.create_connection(server.getsockname()); client.sendall(b"x")
a, b = socket.socketpair(); a.sendall(b"x")
assert socket.getaddrinfo("localhost", 80)
"""


def run(code: str, *before: str, path: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, path))}
    return subprocess.run([*before, sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        'socket.socket().connect(("192.0.2.1", 9))',
        'socket.create_connection(("192.0.2.1", 9))',
        'socket.socket(socket.AF_INET6).connect(("2001:db8::1", 9))',
        'socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9))',
        'socket.getaddrinfo("example.invalid", 80)',
    ],
)
def test_the_hook_refuses_addresses_and_names_elsewhere(code: str) -> None:
    ended = run(f"import socket; {code}", path=(HOOK, ROOT))
    assert ended.returncode == 1
    assert "the rehearsal has no network" in ended.stderr


def test_the_hook_lets_this_machine_through_and_the_interpreter_s_own_customisation(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.customised = True\n")
    ended = run(LOOPBACK + "assert customised\n", path=(HOOK, tmp_path, ROOT))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run(LOOPBACK, path=(HOOK, ROOT)).stderr == ""


def test_the_check_sees_whether_a_route_leads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.gpu import network

    monkeypatch.setattr(network, "ELSEWHERE", ("127.0.0.1", 9))
    assert not network.blocked()
    ended = run("from tools.gpu.network import blocked; assert blocked()", path=(HOOK, ROOT))
    assert ended.returncode == 0, ended.stderr


def test_a_network_of_its_own_has_a_loopback_and_no_way_out() -> None:
    alone = next((way for way in ("-n", "-rn") if run("", "unshare", way).returncode == 0), None)
    if alone is None:
        pytest.skip("unshare is not permitted here")
    check = "import tools.gpu.network as network; assert network.main() == 0"
    ended = run(f"{check}\n{LOOPBACK}\nassert network.blocked()", "unshare", alone, path=(ROOT,))
    assert ended.returncode == 0, ended.stderr
