"""Names of the hub's repositories are folders, by a server of the hub's addresses on this machine."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kangaroo_jax import hub
from kangaroo_jax.cli.convert import convert
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo

pytest.importorskip("huggingface_hub")
SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two" * 1000,
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"the same again",
    "optimizer.pt": b"large",
    "README.md": b"words",
    "original/consolidated.00.pth": b"the same again",
}
CHECKPOINT = {
    "params/manifest": b"m",
    "params/d/0": b"0",
    "config/a": b"{}",
    "tokenizer.model": b"t",
    ".gitattributes": b"",
}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"factors", "README.md": b"words"}
REPOSITORIES = {
    "someone/llama": FILES,
    "someone/ours": CHECKPOINT,
    "someone/adapter": ADAPTER,
    "someone/empty": {"README.md": b"words"},
}
FAULTS = {"someone/gated": ("GatedRepo", 403), "someone/none": ("RepoNotFound", 404)}


class Hub(http.server.BaseHTTPRequestHandler):
    """The two addresses that are asked."""

    asked: list[str] = []
    tokens: set[str] = set()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if not api and parts[2:3] != ["resolve"]:  # what else the client of the hub wants to know
            self._fail("RepoNotFound", 404)
            return
        self.asked.append(f"{self.command} {self.path}")
        self.tokens.add(self.headers.get("Authorization", ""))
        repo = "/".join(parts[2:4] if api else parts[:2])
        revision, path = ((*parts, "", "main")[5] if api else parts[3]), "/".join(parts[4:])
        if repo in FAULTS:
            self._fail(*FAULTS[repo])
        elif revision not in ("main", SHA, "v1"):
            self._fail("RevisionNotFound", 404)
        elif api:
            names = [{"rfilename": name} for name in REPOSITORIES[repo]]
            self._send(json.dumps({"id": repo, "sha": SHA, "siblings": names}).encode())
        else:
            self._send(REPOSITORIES[repo][path])

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _fail(self, code: str, status: int) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch) -> Iterator[str]:
    """A hub on this machine, with an empty cache."""
    from huggingface_hub import constants

    Hub.asked.clear(), Hub.tokens.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_word")
    yield address
    server.shutdown()
    server.server_close()


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_model_needs_is_downloaded_and_once(endpoint: str) -> None:
    folder = hub.local("someone/llama@v1")
    wanted = {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        *(n for n in FILES if n.startswith("model-")),
    }
    assert files_below(folder) == {name: FILES[name] for name in wanted}
    assert Hub.tokens == {"Bearer hf_word"}
    Hub.asked.clear()
    assert hub.local("someone/llama@v1") == folder
    assert not [line for line in Hub.asked if line.startswith("GET") and "/resolve/" in line]
    assert files_below(hub.local("someone/ours")) == {n: b for n, b in CHECKPOINT.items() if not n.startswith(".")}


def test_an_adapter_and_a_tokenizer_are_downloaded_without_what_they_do_not_need(endpoint: str) -> None:
    assert set(files_below(hub.local("someone/adapter"))) == {"adapter_config.json", "adapter_model.safetensors"}
    beside = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert set(files_below(hub.local("someone/llama", weights=False))) == beside
    with pytest.raises(UserError, match="someone/adapter: .* has no tokenizer.json or tokenizer.model"):
        hub.local("someone/adapter", weights=False)


@pytest.mark.parametrize("flag", ["lora", "base", "tokenizer"])
def test_flags_of_convert_take_names(endpoint: str, flag: str) -> None:
    words = {"source": "someone/ours", "to": "out", flag: "someone/none"}
    with pytest.raises(UserError, match="someone/none: no such folder, and no http://127.0.0.1:"):
        convert(**words)
    with pytest.raises(UserError, match="someone/none: no such folder"):
        Kangaroo.load("someone/ours", lora="someone/none")


def test_without_a_network_what_was_downloaded_is_used(endpoint: str, monkeypatch) -> None:
    from huggingface_hub import constants

    folder = hub.local("someone/llama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.local("someone/llama") == folder and hub.local(f"someone/llama@{SHA}") == folder
    with pytest.raises(UserError, match="someone/ours: cannot be downloaded from .*, and is not kept here"):
        hub.local("someone/ours")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.local("someone/llama") == folder
    with pytest.raises(UserError, match="someone/ours: cannot be downloaded"):
        hub.local("someone/ours")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("someone/gated", "someone/gated: gated: accept the terms at http://127.0.0.1:"),
        ("someone/none", "someone/none: no such folder, and no http://127.0.0.1:"),
        ("someone/llama@v9", "/someone/llama has no revision v9"),
        ("someone/empty", "/someone/empty has no weights"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(endpoint: str, name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        hub.local(name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_name_is_a_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for name in ("runs/quickstart", "/abs/olute", "one", "a/b/c", "./a/b", "../a/b", "a/b/", ".a/b", "a/b@"):
        assert hub.local(name) == Path(name), name
    assert hub.local(Path("someone/llama")) == Path("someone/llama")
    with pytest.raises(UserError, match="runs/quikstart: no such file or folder"):
        hub.local("runs/quikstart")


def test_weights_of_one_kind() -> None:
    assert hub.needed(["a.bin", "training_args.bin", "config.json"]) == ["a.bin", "config.json"]
    assert hub.needed(["x.gguf", "y.pth", "params.json"]) == ["x.gguf", "params.json"]
    assert hub.needed(["training_args.bin", "config.json"]) == []


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    words = ["convert", "--from=someone/llama", f"--to={tmp_path}/out"]
    command = [sys.executable, "-m", "kangaroo_jax", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "someone/llama: cannot be downloaded from http://127.0.0.1:9" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
