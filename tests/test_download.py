"""harness/download.py: a file over a network that breaks, from a server on loopback that does"""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from harness import download

CONTENT = os.urandom(1_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Sends CONTENT, or the part that is asked for; what else, the server's `faults` say, one for
    each request that comes: "break" ends in the middle, "stall" waits there, "whole" knows no
    parts, "other" sends another file, a number is a status."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        fault = server.faults.pop(0) if server.faults else None
        content = b"<html>please log in</html>" if fault == "other" else CONTENT
        first = int(asked[6:-1]) if asked and fault != "whole" else 0
        is_beyond = first >= len(content)
        status = fault if isinstance(fault, int) else 416 if is_beyond else 206 if first else 200
        self.send_response(status)
        self.send_header("Content-Length", "0" if status > 400 else str(len(content) - first))
        self.end_headers()
        if status > 400:
            return
        if fault in ("break", "stall"):
            self.wfile.write(content[first : first + 600_000])
            self.wfile.flush()
            server.half.set()
            if fault == "stall":
                server.ended.wait(30)
            self.close_connection = True
            return
        time.sleep(server.delay)
        self.wfile.write(content[first:])

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.asked, server.delay = [], [], 0
    server.half, server.ended = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(server, tmp_path):
    """Ask for the file once; whether it came, else the reason."""

    def fetch(stall=20):
        try:
            download.fetch(server.url, str(tmp_path / "file"), SHA256, stall)
        except OSError as error:
            assert not (tmp_path / "file").exists()
            return str(error)
        assert (tmp_path / "file").read_bytes() == CONTENT
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        return True

    return fetch


def test_what_broke_off_is_gone_on_with(server, fetch):
    server.faults += ["break", 503, "stall"]
    assert "600,000 of 1,500,000 bytes" in fetch()
    assert "503" in fetch()
    assert "timed out" in fetch(stall=0.5)
    assert fetch() is True
    assert server.asked == [None, "bytes=600000-", "bytes=600000-", "bytes=1200000-"]


def test_a_server_that_sends_no_parts(server, fetch):
    server.faults += ["break", "whole"]
    fetch()
    assert fetch() is True


@pytest.mark.parametrize("length", [10, len(CONTENT), len(CONTENT) + 7])
def test_what_was_left_is_another_file(server, fetch, tmp_path, length):
    (tmp_path / "file.part").write_bytes(b"x" * length)
    assert fetch() is True and server.asked[-1] is None


def test_another_file_is_sent(server, fetch, tmp_path):
    server.faults += ["other"]
    assert f"expected {SHA256[:12]}" in fetch()
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_in_the_middle(server, fetch, tmp_path):
    server.faults += ["stall"]
    code = "import sys; from harness import download; download.fetch(*sys.argv[1:], 60)"
    words = [sys.executable, "-c", code, server.url, str(tmp_path / "file"), SHA256]
    child = subprocess.Popen(words, cwd=ROOT)
    assert server.half.wait(60)
    part = tmp_path / "file.part"
    while not (part.exists() and part.stat().st_size):  # pytest-timeout's limit holds
        time.sleep(0.01)
    child.kill()
    child.wait()
    has = part.stat().st_size
    assert 0 < has < len(CONTENT)
    assert fetch() is True and server.asked[-1] == f"bytes={has}-"


def test_a_file_system_without_locks_does_not_wait(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with download.alone(tmp_path / "lock"):
        pass


def test_of_processes_that_start_at_once_one_downloads(server, tmp_path):
    """load_cifar100 as it is, but for the address, the hash, and Keras' unpacking."""
    server.delay = 1
    code = f"""
import numpy as np
from harness import data
data.CIFAR100_URL, data.CIFAR100_SHA256 = {server.url!r}, {SHA256!r}
pair = np.full((2, 32, 32, 3), 7, np.uint8), np.zeros(2, np.int32)
data.unpack_cifar100 = lambda archive, folder: (pair, pair)
print(data.load_cifar100()[1][0].sum())
"""
    environment = os.environ | {"KERAS_HOME": str(tmp_path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ended = [child.communicate() for child in children]
    assert [told for told, _ in ended] == [f"{2 * 32 * 32 * 3 * 7}\n"] * 4, ended
    assert server.asked == [None]
    names = {path.name.removeprefix("cifar-100-python-target") for path in tmp_path.glob("*/*")}
    assert names == {".npz", "_archive", "_archive.lock"}
