"""`kangaroo web` as a process: it says where it is, goes when it is told to, and leaves nothing."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kangaroo_jax.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "web: give either --checkpoint=DIR or --server=http://..."),
        (["--checkpoint=x", "--server=http://y"], "give either"),
        (["--checkpoint=x", "--max-files=0"], "--max-files=0: is no whole number of 1 or more"),
        (["--checkpoint=x", "--shares"], "no flag --shares"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(["web", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_packages_that_are_missing_are_named_with_what_installs_them(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["web", "--checkpoint=x"]) == 2
    assert "web: packages are missing: pip install" in capsys.readouterr().err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    running = []

    def begin(**options: object) -> subprocess.Popen:
        told = {"port": 0, "port_file": str(tmp_path / "port"), "folder": str(tmp_path / "media")} | options
        words = [json.dumps(word) for word in (told, {}, ["Hel", "lo"])]
        with open(tmp_path / "log", "w") as log:
            command = [sys.executable, "-m", "tests.web.process", *words]
            running.append(subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_goes_when_it_is_told_to_with_pages_open(start, tmp_path, number, code):
    pytest.importorskip("gradio")
    process, end = start(), time.monotonic() + 120
    while not (tmp_path / "port").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    log = tmp_path / "log"
    port = int((tmp_path / "port").read_text())
    connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=20) for _ in range(2)]
    connections[0].request("GET", "/gradio_api/heartbeat/abc")  # an open page
    assert connections[0].getresponse().readline() == b"data: ALIVE\n"
    connections[1].request("GET", "/")
    assert connections[1].getresponse().status == 200
    assert f"open http://127.0.0.1:{port} in a browser" in log.read_text()
    (folder,) = (tmp_path / "media").iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    process.send_signal(number)
    assert process.wait(20) == code
    assert "Traceback" not in log.read_text() and list((tmp_path / "media").iterdir()) == []


@pytest.mark.slow
def test_an_address_that_is_taken_is_one_line(start, tmp_path):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(port=taken.getsockname()[1])
        assert process.wait(120) == 2
    assert "cannot listen there" in (tmp_path / "log").read_text().splitlines()[-1]
