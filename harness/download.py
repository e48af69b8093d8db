"""Fetch a file, whole or not at all, over a network that breaks, by one of several processes."""

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request

CHUNK = 2**18  # bytes


@contextlib.contextmanager
def alone(path):
    """Within it no other process that asks for the same path is; who comes later waits. Where no
    such file can be written, nobody else can do the work either, and nothing is waited for."""
    import fcntl  # not on Windows

    try:
        file = open(path, "ab")
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waits for another process, which has {path}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems know no locks
            pass
        yield


def fetch(url, path, sha256, stall):
    """Download to `path`, where the file is only once it is whole and its SHA-256 is right. What an
    attempt that broke off has left, in `path`.part, is gone on with.

    Args:
        sha256: hexadecimal.
        stall: seconds without a byte after which the download has failed.

    Raises:
        OSError: it broke off, or is another file; the next call goes on.
    """
    part = f"{path}.part"
    has = os.path.getsize(part) if os.path.exists(part) else 0
    try:
        receive(url, part, has, stall)
    except urllib.error.HTTPError as error:
        if not (has and error.code == 416):  # nothing is missing, or what is there is not it
            raise
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == sha256:
        os.replace(part, path)
        return
    os.remove(part)
    if not has:
        raise OSError(f"{url} sent a file of SHA-256 {digest[:12]}..., expected {sha256[:12]}...")
    fetch(url, path, sha256, stall)  # what was there may have been to blame


def receive(url, part, has, stall):
    """Append to `part` what is missing after `has` bytes of it; raises OSError, HTTPException."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={has}-"} if has else {})
    with urllib.request.urlopen(request, timeout=stall) as answer:
        if answer.status != 206:  # not every server knows how to send a part
            has = 0
        missing = answer.headers.get("Content-Length")
        total = has + int(missing) if missing else None
        shown = f" of {total / 1e6:.0f}" if total else ""
        with open(part, "ab" if has else "wb") as file:
            while piece := answer.read1(CHUNK):
                file.write(piece)
                has += len(piece)
                if sys.stderr.isatty():
                    line = f"downloading {url}: {has / 1e6:.0f}{shown} MB"
                    print(line, end="\033[K\r", file=sys.stderr, flush=True)
    if total and has < total:  # http.client passes over this
        raise OSError(f"the connection ended after {has:,} of {total:,} bytes")
