"""Media of requests: what becomes a local file, what is refused, and that nothing of them stays."""

import base64
import contextlib
import fcntl
import http.server
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.media import addresses
from kangaroo_jax.data.media.decode import ProcessDecoder
from kangaroo_jax.data.media.video import MediaRef, probe
from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.folder import WorkFolder
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.media import Cancelled, Hops, RequestMedia
from kangaroo_jax.serving.protocol import MediaPart
from kangaroo_jax.serving.store import MediaStore
from kangaroo_jax.system.memory import Bounded
from tests.data.media import write_video

LIMITS = Limits(max_media_mb=1, max_folder_mb=3, max_named_mb=1, max_listed_frames=4, max_fetch_seconds=2.0)


def png(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(address: str, uuid: str = "") -> MediaPart:
    return MediaPart("image", "messages[0].content[0]", (address,) if address else (), uuid=uuid)


def video(*listed: str, is_frames: bool = False, uuid: str = "") -> MediaPart:
    return MediaPart("video", "messages[0].content[0]", listed, is_frames, uuid=uuid)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A media root with a.mp4, b.png, `my film.mp4`, frames/, links in and out, a pipe; secret.mp4 is beside it."""
    outer = tmp_path_factory.mktemp("outer")
    folder = outer / "root"
    (folder / "frames").mkdir(parents=True)
    write_video(folder / "a.mp4", 8)
    (folder / "my film.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (outer / "secret.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "b.png").write_bytes(png())
    for number in (2, 10, 1):
        (folder / "frames" / f"{number}.png").write_bytes(png(number))
    (folder / "inside.mp4").symlink_to(folder / "a.mp4")
    (folder / "outside.mp4").symlink_to(outer / "secret.mp4")
    (folder / "nowhere.mp4").symlink_to(outer / "missing.mp4")
    (folder / "up").symlink_to(outer)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "large.mp4").write_bytes((folder / "a.mp4").read_bytes() + bytes(1 << 20))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[WorkFolder]:
    with WorkFolder(tmp_path / "work") as made:
        yield made


@pytest.fixture
def store(folder: WorkFolder, root: Path) -> Iterator[MediaStore]:
    made = MediaStore(folder, LIMITS, root, ("media.test", "other.test:8080"))
    yield made
    made.close()
    assert made.written == 0 and [path.name for path in folder.path.iterdir()] == ["lock"]


def refused(store: MediaStore, part: MediaPart) -> ApiError:
    with contextlib.closing(RequestMedia(store)) as media, pytest.raises(ApiError) as caught:
        media.fetch(part)
    assert str(store.folder.path) not in str(caught.value)
    return caught.value


def written(store: MediaStore) -> list[bytes]:
    return sorted(path.read_bytes() for path in store.folder.path.iterdir() if path.name != "lock")


# ---------------------------------------------------------------------------------- data:


def test_bytes_of_an_address_become_a_file_that_goes_with_the_request(store: MediaStore) -> None:
    with contextlib.closing(RequestMedia(store)) as media:
        found, times = media.fetch(image(data(png(5))))
        assert Path(found.path).read_bytes() == png(5) and found.kind == "image" and times == ()
        assert media.names == {found.path: "messages[0].content[0]"} and store.written == len(png(5))
    assert not os.path.exists(found.path) and store.written == 0


def test_equal_bytes_are_one_file_as_long_as_anybody_uses_it(store: MediaStore) -> None:
    first, second = RequestMedia(store), RequestMedia(store, b"other")
    one, two = (media.fetch(image(data(png(5))))[0].path for media in (first, second))
    assert one == two and written(store) == [png(5)]
    first.close()
    assert Path(two).read_bytes() == png(5)
    second.close()


def test_frames_keep_their_order_and_times(store: MediaStore) -> None:
    part = MediaPart("video", "here", tuple(data(png(level)) for level in (3, 1, 3)), True, (0.0, 1.0, 5.0))
    with contextlib.closing(RequestMedia(store)) as media:
        found, times = media.fetch(part)
        assert [Path(path).read_bytes() for path in found.frames] == [png(3), png(1), png(3)]
        assert times == (0.0, 1.0, 5.0) and found.frames[0] == found.frames[2]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,AA=A", "damaged"),
        ("data:image/png;base64,AAA", "damaged"),
        ("data:image/png;base64,AA\n==", "damaged"),
        ("data:image/png;base64," + "A" * (1 << 20) + "é", "damaged"),
        ("data:image/png;base64," + "A" * ((1 << 20) - 4) + "AA==" + "AAAA", "damaged"),
        ("data:image/png,abc", "base64"),
        ("data:" + ";a=b" * 1_000_000 + ";base64,AAAA", "base64"),
        (data(b"no image"), "declared as image/png"),
        (data(b"\x1aE\xdf\xa3 a video"), "declared as image/png"),
        (data(b"\x1aE\xdf\xa3 a video", "application/octet-stream"), "give it as video_url"),
        ("ftp://h/a.png", "data:, https:// or file://"),
        ("a.png", "data:, https:// or file://"),
        ("etc/passwd", "data:, https:// or file://"),
        ("gs://bucket/a.png", "data:, https:// or file://"),
        ("shard.tar::a@0+100", "data:, https:// or file://"),
        ("a.parquet::0/images/0", "data:, https:// or file://"),
        ("subfile,,start,0,end,9,,:/etc/passwd", "data:, https:// or file://"),
    ],
)
def test_what_is_no_image_of_base64_is_refused(store: MediaStore, address: str, says: str) -> None:
    begun = time.process_time()
    assert says in str(refused(store, image(address))) and time.process_time() - begun < 1


def test_a_still_image_is_no_video(store: MediaStore) -> None:
    assert "declared as video/mp4" in str(refused(store, video(data(png(), "video/mp4"))))
    assert "give it as image_url" in str(refused(store, video(data(b"\xff\xd8\xff jpeg", "application/x"))))


def test_sizes_are_bounded_one_by_one_and_together(store: MediaStore) -> None:
    large = refused(store, image(data(png() + bytes(1 << 20))))
    assert (large.status, large.code) == (413, "too_large") and "--max-media-mb" in str(large)
    with contextlib.closing(RequestMedia(store)) as media:
        for level in range(3):
            media.fetch(image(data(png(level) + bytes(1_000_000))))
        full = refused(store, image(data(png(4) + bytes(1_000_000))))
    assert (full.status, full.retry_after) == (429, 5) and "--max-folder-mb" in str(full)


def test_a_full_disk_is_an_error_of_one_request(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kangaroo_jax.serving.media.open", full, raising=False)
    assert refused(store, image(data(png()))).status == 507


def test_a_request_that_is_closed_writes_no_more(store: MediaStore) -> None:
    media = RequestMedia(store)
    media.close()
    with pytest.raises(Cancelled):
        media.fetch(image(data(png())))
    assert store.written == 0


# ---------------------------------------------------------------------------------- uuid


def test_a_medium_is_sent_once_and_then_named(store: MediaStore) -> None:
    with contextlib.closing(RequestMedia(store, b"key")) as media:
        media.fetch(image(data(png(7)), "photo"))
    with contextlib.closing(RequestMedia(store, b"key")) as media:
        assert Path(media.fetch(image("", "photo"))[0].path).read_bytes() == png(7)
        with pytest.raises(ApiError, match="name of a image"):
            media.fetch(video(uuid="photo"))
    assert refused(store, image("", "photo")).code == "unknown_uuid"  # of another key


def test_names_are_kept_within_a_bound_of_bytes(store: MediaStore) -> None:
    for level in range(3):
        with contextlib.closing(RequestMedia(store)) as media:
            media.fetch(image(data(png(level) + bytes(500_000)), f"photo {level}"))
    assert store.written < 1_048_576 < 1_500_000
    assert refused(store, image("", "photo 0")).code == "unknown_uuid"


def test_names_hold_few_files_of_the_root_open(store: MediaStore, root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(150):
        place = root / f"named-{number}.png"
        place.write_bytes(png(number))
        with contextlib.closing(RequestMedia(store)) as media:
            media.fetch(image(f"file://{place}", f"name {number}"))
        place.unlink()
    assert len(os.listdir("/proc/self/fd")) - before <= 128
    assert refused(store, image("", "name 0")).code == "unknown_uuid"


# ---------------------------------------------------------------------------------- file://


@pytest.mark.parametrize("name", ["a.mp4", "my%20film.mp4", "inside.mp4", "frames/../a.mp4", "./a.mp4"])
def test_files_below_the_root_are_read_and_not_copied(store: MediaStore, root: Path, name: str) -> None:
    with contextlib.closing(RequestMedia(store)) as media:
        found, _ = media.fetch(video(f"file://{root}/{name}"))
        assert probe(found.path, "video").seconds == pytest.approx(1.0) and store.written == 0
        assert found.path.startswith(str(store.folder.path))


def test_a_path_is_a_file_below_the_root(store: MediaStore, root: Path) -> None:
    with contextlib.closing(RequestMedia(store)) as media:
        assert media.fetch(video(f"{root}/my film.mp4"))[0].path.startswith(str(store.folder.path))
    refused(store, video(f"{root}/my%20film.mp4"))


def test_what_was_opened_is_read_whatever_becomes_of_its_name(store: MediaStore, root: Path) -> None:
    place = root / "moving.mp4"
    place.write_bytes((root / "a.mp4").read_bytes())
    with contextlib.closing(RequestMedia(store)) as media:
        found, _ = media.fetch(video(f"file://{place}"))
        place.unlink()
        place.symlink_to("/etc/passwd")
        assert Path(found.path).read_bytes() == (root / "a.mp4").read_bytes()
    place.unlink()


def test_a_file_that_changed_is_another_file(store: MediaStore, root: Path) -> None:
    place = root / "changing.png"
    place.write_bytes(png(1))
    with contextlib.closing(RequestMedia(store)) as first, contextlib.closing(RequestMedia(store)) as second:
        one, _ = first.fetch(image(f"file://{place}"))
        place.write_bytes(png(2) + b"longer")
        two, _ = second.fetch(image(data(png(1))))
        assert one.path != two.path and Path(two.path).read_bytes() == png(1)
    place.unlink()


def test_a_folder_of_frames(store: MediaStore, root: Path) -> None:
    with contextlib.closing(RequestMedia(store)) as media:
        found, _ = media.fetch(video(f"file://{root}/frames"))
        assert [Path(path).read_bytes() for path in found.frames] == [png(1), png(2), png(10)]
    assert "not a media file" in str(refused(store, image(f"file://{root}/frames")))
    (root / "empty").mkdir()
    assert "without images" in str(refused(store, video(f"file://{root}/empty")))


def test_nothing_outside_the_root_is_read_or_told_of(store: MediaStore, root: Path) -> None:
    names = [
        "/etc/passwd",
        "//etc/passwd",
        f"{root}/../secret.mp4",
        f"{root}/up/secret.mp4",
        "file:///etc/passwd",
        "file:///no/such/file",
        f"file://{root.parent}/secret.mp4",
        f"file://{root}/../secret.mp4",
        f"file://{root}/%2e%2e/secret.mp4",
        f"file://{root}/outside.mp4",
        f"file://{root}/nowhere.mp4",
        f"file://{root}/up/secret.mp4",
        f"file://{root}/up/missing.mp4",
        f"file://{root}x/a.mp4",
        "file:///proc/self/environ",
        "file:///dev/stdin",
    ]
    said = {str(refused(store, video(name))) for name in names}
    assert len(said) == 1 and "not below this server's media root" in said.pop()


@pytest.mark.parametrize(
    "name", ["pipe.mp4", "missing.mp4", "a.mp4/x", "%252e%252e/secret.mp4", "a%00.mp4", "large.mp4"]
)
def test_what_is_no_file_below_the_root_is_refused_at_once(store: MediaStore, root: Path, name: str) -> None:
    begun = time.perf_counter()
    refused(store, video(f"file://{root}/{name}"))
    assert time.perf_counter() - begun < 20  # nobody ever writes into the pipe


@pytest.mark.parametrize("host", ["localhost", "example.com", "."])
def test_an_address_of_a_file_has_no_host(store: MediaStore, root: Path, host: str) -> None:
    assert "without a host" in str(refused(store, video(f"file://{host}{root}/a.mp4")))


def test_without_a_root_no_file_is_read(folder: WorkFolder, root: Path) -> None:
    error = refused(MediaStore(folder, LIMITS), video(f"file://{root}/a.mp4"))
    assert error.status == 403 and "--allowed-media-root" in str(error)


# ---------------------------------------------------------------------------------- http(s)


class _Handler(http.server.BaseHTTPRequestHandler):
    """`/image`, `/large`, `/slow`, `/to?ADDRESS`, `/hops/N`; what it was asked is noted with its Host."""

    asked: list[tuple[str, str]] = []

    def do_GET(self) -> None:  # noqa: N802
        self.asked.append((self.headers["Host"], self.path))
        kind, _, rest = self.path[1:].partition("/")
        if self.path.startswith("/to?") or kind == "hops":
            self.send_response(302)
            self.send_header(
                "Location",
                self.path[4:] if kind[:3] == "to?" else f"/hops/{int(rest) - 1}" if rest != "1" else "/image",
            )
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if kind == "image":
                self.wfile.write(png(9))
            elif kind == "large":
                while True:
                    self.wfile.write(bytes(1 << 16))
            while kind == "slow":
                self.wfile.write(b"x")
                time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def web(folder: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MediaStore, str]]:
    """A store that may read from media.test:PORT, which is a server here, and the address of that."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        _Handler.asked.clear()
        real = addresses.socket.getaddrinfo
        names = {"media.test": "127.0.0.1", "inner.test": "10.0.0.1"}
        monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda host, *a, **k: real(names.get(host, host), *a, **k))
        monkeypatch.setattr(addresses, "is_public", lambda host: host == "127.0.0.1")
        store = MediaStore(folder, LIMITS, None, (f"media.test:{port}", "inner.test"))
        yield store, f"http://media.test:{port}"
        assert store.written == 0
        server.shutdown()


def test_an_address_of_a_listed_host_is_fetched_under_its_name(web: tuple[MediaStore, str]) -> None:
    store, at = web
    with contextlib.closing(RequestMedia(store)) as media:
        assert Path(media.fetch(image(f"{at}/image"))[0].path).read_bytes() == png(9)
        media.fetch(image(f"{at}/hops/2"))
    assert {host for host, _ in _Handler.asked} == {at.removeprefix("http://")}


def test_hosts_are_listed_exactly(web: tuple[MediaStore, str]) -> None:
    store, at = web
    port = at.rpartition(":")[2]
    for address in (
        f"http://127.0.0.1:{port}/image",
        f"http://2130706433:{port}/image",
        f"http://0x7f000001:{port}/image",
        f"http://[::ffff:127.0.0.1]:{port}/image",
        f"http://sub.media.test:{port}/image",
        f"http://media.test.:{port}/image",
        f"http://media.test:{port}@evil.test/image",
        f"http://user:word@media.test:{port}/image",
        "http://media.test/image",
        "http://media.test:22/image",
        "http://inner.test:8080/image",
        f"http://evil.test\\@media.test:{port}/image",
        "https:///image",
    ):
        assert refused(store, image(address)).status == 403, address
    assert not _Handler.asked


def test_a_listed_host_that_leads_into_the_private_network_is_not_asked(web: tuple[MediaStore, str]) -> None:
    store, _ = web
    error = refused(store, image("http://inner.test/image"))
    assert "cannot be fetched" in str(error) and "10.0.0.1" not in str(error)


def test_each_redirect_is_checked_and_there_are_three(web: tuple[MediaStore, str]) -> None:
    store, at = web
    assert refused(store, image(f"{at}/to?http://127.0.0.1:1/a")).status == 403
    assert refused(store, image(f"{at}/to?file:///etc/passwd")).code == "media_unavailable"
    assert refused(store, image(f"{at}/hops/4")).code == "media_unavailable"


def test_a_redirect_leads_to_the_same_scheme_or_a_safer_one() -> None:
    hops = Hops(frozenset({"a.test", "b.test"}), "here")
    for address in ("http://a.test/x", "http://b.test:80/", "https://a.test", "https://b.test:443/"):
        hops.check(address)
    with pytest.raises(ApiError, match="from https to http"):
        hops.check("http://a.test/x")
    with pytest.raises(ApiError, match="none of those"):
        Hops(frozenset({"a.test"}), "here").check("https://a.test:80/")


def test_a_fetch_has_bounds_of_bytes_and_time(web: tuple[MediaStore, str]) -> None:
    store, at = web
    begun = time.perf_counter()
    assert refused(store, image(f"{at}/large")).status == 413
    assert "--max-fetch-seconds" in str(refused(store, image(f"{at}/slow")))
    assert time.perf_counter() - begun < 20  # it sends for ever


def test_proxies_of_the_environment_are_not_asked(web: tuple[MediaStore, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, at = web
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with contextlib.closing(RequestMedia(store)) as media:
        media.fetch(image(f"{at}/image"))


def test_without_hosts_no_address_is_fetched(store: MediaStore, folder: WorkFolder) -> None:
    assert "--allowed-media-hosts" in str(refused(MediaStore(folder, LIMITS), image("https://media.test/a.png")))


# ---------------------------------------------------------------------------------- decoding


@pytest.mark.slow
def test_a_decoding_process_has_a_bound_of_memory(tmp_path: Path) -> None:
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    (tmp_path / "small.png").write_bytes(png())
    decoder = ProcessDecoder(1, 60.0, prepare=Bounded(48 << 20).begin)
    with contextlib.closing(decoder):
        large, small = (
            decoder.submit(MediaRef("image", str(tmp_path / name), (0.0,)), 16).result()
            for name in ("large.png", "small.png")
        )
    assert isinstance(large, UserError) and "large.png" in str(large)
    assert not isinstance(small, UserError) and small.pixels.shape == (1, 16, 16, 3)


# ---------------------------------------------------------------------------------- the folder


def test_what_killed_servers_left_is_removed_and_that_of_living_ones_stays(tmp_path: Path) -> None:
    left, strange = tmp_path / "kangaroo-serve-old", tmp_path / "kangaroo-serve-nothing"
    for path in (left, strange):
        path.mkdir()
    (left / "lock").touch()
    (left / "film").write_bytes(b"x")
    with WorkFolder(tmp_path) as living, WorkFolder(tmp_path) as other:
        assert not left.exists() and strange.exists()
        assert living.path.exists() and living.path.stat().st_mode & 0o777 == 0o700 and other.path != living.path
        with open(living.path / "lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not living.path.exists()
