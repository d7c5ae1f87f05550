"""Addresses of records: which are read, from which machines, and within which limits."""

import contextlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kangaroo_jax.data.media import addresses
from kangaroo_jax.data.media.addresses import check_address, is_public, is_remote
from kangaroo_jax.data.media.download import Limits
from kangaroo_jax.data.media.storage import MediaCache, absolute, join, local
from kangaroo_jax.errors import UserError

pytestmark = pytest.mark.alone


class _Handler(http.server.BaseHTTPRequestHandler):
    """`/size/N` N bytes, `/endless`, `/slow`, `/short`, `/to?ADDRESS` a redirect, `/loop`."""

    asked: list[str] = []

    def do_GET(self) -> None:  # noqa: N802
        self.asked.append(self.path)
        kind, _, rest = self.path[1:].partition("/")
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif kind in ("size", "short"):
            self.send_response(200)
            self.send_header("Content-Length", str(int(rest) + (kind == "short")))
            self.end_headers()
            self.wfile.write(b"x" * int(rest))
        elif kind in ("endless", "slow"):
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(2000):
                    self.wfile.write(b"x" * (1 if kind == "slow" else 100_000))
                    self.wfile.flush()
                    time.sleep(0.05 if kind == "slow" else 0)
            except OSError:
                pass
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """`http://127.0.0.1:PORT`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as one:
        one.daemon_threads = True
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


def cache(folder: Path, most: int = 1 << 20, seconds: float = 20.0, private: bool = True) -> MediaCache:
    return MediaCache(folder, 4 << 20, Limits(most, seconds, private))


@pytest.mark.parametrize(
    "address",
    [
        "reference://x.png::file://d/index.json",
        "zip://a.png::http://127.0.0.1:1/a.zip",
        "https://example.com/a.zip::b",
        "s3://bucket/a::b",
        "local:///etc/passwd",
        "memory://a",
        "ssh://host/a",
        "ftp://host/a.mp4",
        "github://a:b@main/x",
        "filecache::https://example.com/a.mp4://x",
    ],
)
def test_only_five_kinds_of_addresses_and_no_chains(address: str, tmp_path: Path) -> None:
    for call in (check_address, cache(tmp_path).fetch):
        with pytest.raises(UserError) as error:
            call(address)
        assert "addresses are https://" in str(error.value) or "'::'" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "host",
    "127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 localhost 10.0.0.1 192.168.1.1 172.16.0.1 169.254.169.254 "
    "0.0.0.0 100.64.0.1 224.0.0.1 255.255.255.255 [::1] [::] [fe80::1] [fd00::1] [ff02::1] [::ffff:127.0.0.1] "
    "[2002:7f00:1::] [64:ff9b::7f00:1] [64:ff9b:1::7f00:1] [::127.0.0.1] [::ffff:0:127.0.0.1] [fec0::1]".split(),
)
def test_machines_that_are_not_public_are_refused(host: str) -> None:
    with pytest.raises(UserError, match="this machine or a private network|cannot be fetched"):
        check_address(f"http://{host}:8931/internal?delete=1")


def test_public_hosts_and_private_ones_that_were_asked_for() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111") and not is_public("::ffff:10.0.0.1")
    check_address("https://8.8.8.8/a.mp4")
    check_address("http://127.0.0.1/a", allow_private=True)
    check_address("s3://bucket/a b.mp4")
    check_address("data:image/png;base64,AAAA")


def test_what_is_an_address() -> None:
    remote = ["https://a/b", "HTTP://a/b", "data:,x", "data:image/png;base64,AA", "zip://a::b", "s3://b/k"]
    plain = ["data:1.mp4", "http:x.mp4", "file:///a", "a::b.mp4", "a:b.mp4", "C:\\a.mp4", "/a://b", "日://x"]
    assert [is_remote(text) for text in remote + plain] == [True] * len(remote) + [False] * len(plain)


def test_nothing_is_asked_of_this_machine_by_name_or_by_redirect(server: str, tmp_path: Path) -> None:
    _Handler.asked.clear()
    with pytest.raises(UserError, match="leads to 127.0.0.1, which is this machine"):
        cache(tmp_path, private=False).fetch(f"{server}/size/5")
    assert not _Handler.asked and not list(tmp_path.iterdir())


def test_each_redirect_is_checked_and_the_name_is_looked_up_once(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(server.rpartition(":")[2])
    asked: list[str] = []

    look_up = socket.getaddrinfo

    def found(host: str, number: int, *more: int, **options: int) -> list:
        if not host.endswith(".test"):
            return look_up(host, number, *more, **options)
        asked.append(host)  # a name that is public when it is looked up first, and this machine ever after
        ip = "8.8.8.8" if asked.count(host) > 1 and host == "rebinds.test" else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, number))]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", found)
    monkeypatch.setattr(addresses, "is_public", lambda ip: ip == "127.0.0.1" and asked[-1] != "inner.test")
    kept = cache(tmp_path, private=False)
    assert kept.fetch(f"http://rebinds.test:{port}/size/5").read_bytes() == b"xxxxx"
    assert asked == ["rebinds.test"]
    with pytest.raises(UserError, match="leads to 127.0.0.1"):
        kept.fetch(f"http://outer.test:{port}/to?http://inner.test:{port}/size/5")
    assert asked[1:] == ["outer.test", "inner.test"] and _Handler.asked[-1].startswith("/to?")
    with pytest.raises(UserError, match="no address of the web"):
        kept.fetch(f"http://outer.test:{port}/to?file:///etc/passwd")


def test_redirects_are_followed_but_not_for_ever(server: str, tmp_path: Path) -> None:
    assert cache(tmp_path).fetch(f"{server}/to?/size/7").stat().st_size == 7
    with pytest.raises(UserError, match="more than 10 times"):
        cache(tmp_path).fetch(f"{server}/to?" + "/to?" * 20 + "/size/7")
    with pytest.raises(UserError, match="404"):
        cache(tmp_path).fetch(f"{server}/nothing")


def test_bytes_and_time_are_bounded(server: str, tmp_path: Path) -> None:
    for path in ("size/2000000", "endless"):
        with pytest.raises(UserError, match="larger than .*fetch_gib"):
            cache(tmp_path).fetch(f"{server}/{path}")
    start = time.monotonic()
    with pytest.raises(UserError, match="not here after 0.3 s"):
        cache(tmp_path, seconds=0.3).fetch(f"{server}/slow")
    assert time.monotonic() - start < 20  # it sends for ever
    with pytest.raises(UserError, match="ended at 9 of 10 bytes"):
        cache(tmp_path).fetch(f"{server}/short/9")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"X: a\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["size of a chunk", "trailers", "head", "continue"],
)
def test_a_server_that_trickles_is_cut_off_wherever_it_is(head: bytes, piece: bytes, tmp_path: Path) -> None:
    """Also where the connection is to be closed after the answer; no part of it is taken for a file."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            wire, _ = listening.accept()
            with wire:
                wire.recv(65536)
                with contextlib.suppress(OSError):
                    wire.sendall(head)
                    for _ in range(800):  # 40 s
                        wire.sendall(piece)
                        time.sleep(0.05)

        threading.Thread(target=serve, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(UserError, match="not here after 0.3 s"):
            cache(tmp_path, seconds=0.3).fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/a.png")
    assert time.monotonic() - start < 20 and not list(tmp_path.iterdir())


def test_leftovers_of_lost_processes_are_removed(server: str, tmp_path: Path) -> None:
    old, new = tmp_path / ".part-old", tmp_path / ".part-new"
    old.write_bytes(b"x"), new.write_bytes(b"x" * (3 << 20))
    os.utime(old, (time.time() - 4000,) * 2)
    kept = cache(tmp_path, most=4 << 20)
    first = kept.fetch(f"{server}/size/600000")
    second = kept.fetch(f"{server}/size/600001")  # beside the other's part there is no room for both
    assert not old.exists() and new.exists() and second.exists() and not first.exists()


def test_names_that_no_file_can_have() -> None:
    for name in ("half\ud83d.mp4", "nul\0.mp4"):
        with pytest.raises(UserError, match="no file can have such a name"):
            local(name)


def test_dots_after_a_link_lead_where_the_kernel_goes(tmp_path: Path) -> None:
    (tmp_path / "real" / "ann").mkdir(parents=True)
    (tmp_path / "real" / "v.mp4").write_bytes(b"x")
    (tmp_path / "ann").symlink_to("real/ann")
    assert Path(join(str(tmp_path / "ann"), "../v.mp4")).read_bytes() == b"x"
    assert absolute(tmp_path / "ann/../v.mp4") == absolute("../v.mp4", tmp_path / "ann") == str(tmp_path / "real/v.mp4")
    assert absolute(tmp_path / "real/../ann/x") == str(tmp_path / "ann/x") and absolute("/../..") == "/"
    assert [join(*p) for p in (("a", "./b//c"), ("../a", "b"), (".", "b"), ("/a/", "b"))] == [
        "a/b/c", "../a/b", "b", "/a/b",
    ]  # fmt: skip
