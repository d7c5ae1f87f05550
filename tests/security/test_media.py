"""Media and archives from elsewhere open nothing but themselves: no other file, no address, no place to write to."""

import http.server
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.media.image import load_image
from kangaroo_jax.data.media.storage import MediaCache
from kangaroo_jax.data.media.video import FramePolicy, load_media, load_video, probe
from kangaroo_jax.errors import UserError
from tests.data.media import write_video

POLICY = FramePolicy(min_frames=2)


class Counting(http.server.BaseHTTPRequestHandler):
    """Answers everything with a video, and counts."""

    asked: list[str] = []
    body = b""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    Counting.body = write_video(tmp_path_factory.mktemp("served") / "a.mp4", 4).read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


# What a demuxer could follow: {u} is a server, {p} the path of a readable video beside the file.
CONTAINERS: dict[str, str] = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{u}/a.ts\n#EXT-X-ENDLIST\n",
    "hls-file": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{p}\n#EXT-X-ENDLIST\n",
    "hls-key": '#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXT-X-KEY:METHOD=AES-128,URI="{u}/k"\n#EXTINF:5,\na.ts\n'
    "#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{u}/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "concat": "ffconcat version 1.0\nfile '{p}'\n",
    "concat-address": "ffconcat version 1.0\nfile '{u}/a.mp4'\n",
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{u}/a.png"/></svg>',
    "xspf": '<playlist version="1"><trackList><track><location>{u}/a.mp4</location></track></trackList></playlist>',
    "html": '<html><video src="{u}/a.mp4"></video></html>',
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_medium_that_names_another_opens_neither_file_nor_address(kind: str, server: str, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.mp4", 8)
    path = tmp_path / "clip.mp4"
    path.write_text(CONTAINERS[kind].format(u=server, p=other))
    Counting.asked.clear()
    for read in (probe, lambda name: load_video(name, image_size=16, policy=POLICY)):
        with pytest.raises(UserError, match=r"clip\.mp4: "):
            read(str(path))
    path.rename(tmp_path / "clip.png")
    with pytest.raises(UserError, match=r"clip\.png: "):
        load_image(str(tmp_path / "clip.png"), image_size=16)
    assert not Counting.asked


def test_a_link_to_a_file_that_is_no_medium_shows_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("root:x:0:0:SECRET:/:/bin/sh\n" * 40)
    for name, kind in (("a.mp4", "video"), ("a.png", "image")):
        (tmp_path / name).symlink_to(tmp_path / "secret.txt")
        with pytest.raises(UserError) as error:
            load_media(str(tmp_path / name), kind, image_size=16, times=[0.0], start=None)
        assert "SECRET" not in str(error.value)


def picture() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_members_of_an_archive_are_names_and_are_written_nowhere(tmp_path: Path) -> None:
    """`..` and absolute names; links are test_outsiders'."""
    folder = tmp_path / "set"
    folder.mkdir()
    record = json.dumps({"conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "."}]})
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in ("../../out", str(tmp_path / "absolute"), "plain"):
            member(archive, f"{name}.png", picture())
            member(archive, f"{name}.json", record.encode())
    before = sorted(tmp_path.rglob("*"))
    file = AnnotationFile(folder / "a.tar")
    assert len(file) == 3
    for i in range(3):
        assert load_media(
            file[i].media[0].path, "image", image_size=16, times=[0.0], start=None
        ).pixels.mean() == pytest.approx(90, abs=1)
    assert sorted(tmp_path.rglob("*")) == before


HOSTILE_NAMES: list[Callable[[str], str]] = [
    lambda end: f"data:image/../../../{end};base64,AAAA",
    lambda end: f"data:image/{'x' * 300}{end};base64,AAAA",
    lambda end: f"data:image/png%00/../{end};base64,AAAA",
    lambda end: f"data:image/png;{end}/../../x;base64,AAAA",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_what_an_address_is_called_decides_no_place_in_the_cache(name: Callable[[str], str], tmp_path: Path) -> None:
    cache = MediaCache(tmp_path / "deep" / "cache", 1 << 20)
    try:
        path = cache.fetch(name("evil"))
    except UserError:
        pass
    else:
        assert path.parent == cache.folder and os.path.realpath(path) == str(path)
    assert [p.name for p in tmp_path.iterdir()] in ([], ["deep"])
    assert [p.name for p in (tmp_path / "deep").glob("*")] in ([], ["cache"])
