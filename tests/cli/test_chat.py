"""A conversation that is typed, in a terminal and out of one."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kangaroo_jax.cli.chat import talk
from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from tests.inference.conftest import media, random_model  # noqa: F401


@pytest.fixture
def loaded(monkeypatch, make_micro_config, media, random_model):  # noqa: F811
    """What `Kangaroo.load` gives in place of a checkpoint."""
    config = make_micro_config()
    config.model.llm.vocab_size = 300
    tokenizer = load_tokenizer(media / "tokenizer.model")
    monkeypatch.setattr(
        Kangaroo, "load", lambda path: Kangaroo(random_model, StageConfig.from_config(config), tokenizer)
    )


def test_commands(loaded, media, tmp_path, capsys):  # noqa: F811
    saved = tmp_path / "said.json"
    lines = [f"/video {media / 'a.mp4'}", f"/image {media / 'c.jpg'}", "Is <image> in <video>?", f"/save {saved}"]
    talk("x", iter([*lines, "/reset", "Who?", f"/save {tmp_path / 'two.json'}", "/help", "", "no"]), max_new_tokens=4)
    said, out = json.loads(saved.read_text()), capsys.readouterr().out
    assert [m["kind"] for m in said[0]["media"]] == ["image", "video"] and said[1]["role"] == "assistant"
    assert len(json.loads((tmp_path / "two.json").read_text())) == 2
    assert f"The next question is about {media / 'a.mp4'}." in out and "/save FILE" in out and "Saved 1 rounds." in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/what", "/what: no such command; there are /video, /image"),
        ("/save", "/save: FILE: write the conversation"),
        ("/reset now", "/reset: forget"),
        ("/video none.mp4", "none.mp4: no such file"),
        ("/save {}", "exists already"),
        ("<video> what?", "has the tags video, but 0 files"),
    ],
)
def test_what_is_typed_wrongly_is_said_and_the_conversation_goes_on(loaded, media, tmp_path, capsys, line, words):  # noqa: F811
    line = line.format(media / "notes.txt")
    talk("x", iter([line, "And?"]), max_new_tokens=4, forgiving=True)
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out
    with pytest.raises(UserError):
        talk("x", iter([line]), max_new_tokens=4)


DRIVER = """
import dataclasses, fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal whose Ctrl-C reaches this process
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.cli.main import main
from tests.conftest import _micro_config
from kangaroo_jax.config import StageConfig
from kangaroo_jax.models.kangaroo import KangarooModel
from flax import nnx
config = _micro_config()
config.model.llm.vocab_size = 300
config.data.tokens_per_pack = 8192
config = StageConfig.from_config(config)
tokenizer = dataclasses.replace(load_tokenizer(sys.argv[1]), stop_ids=())
model = KangarooModel(config.model, rngs=nnx.Rngs(0))
Kangaroo.load = classmethod(lambda cls, path, **held: cls(model, config, tokenizer))
main(["chat", "--checkpoint=x", "--max-new-tokens=8000", "--temperature=1"])
"""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_program(media):  # noqa: F811
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(media / "tokenizer.model")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    os.close(theirs)
    screen = ""

    def until(words: str, seconds: float = 240) -> None:
        nonlocal screen
        deadline = time.monotonic() + seconds
        while words not in screen:
            assert time.monotonic() < deadline, screen
            if select.select([ours], [], [], 1)[0]:
                screen += os.read(ours, 65536).decode("utf-8", "replace")

    try:
        until("> ")
        os.write(ours, b"Go on\n")
        until("Go on\r\n")
        screen = ""
        until("a")  # some of the answer
        os.write(ours, b"\x03")
        until("[stopped]\r\n> ", 30)
        screen = ""
        os.write(ours, b"/reset\n")
        until("Forgotten.\r\n> ")
        os.write(ours, b"half a line")
        until("half a line")
        time.sleep(0.5)  # a signal between the prompt and the wait for keys is seen with the next key
        os.write(ours, b"\x03")
        until("^C\r\n> ")
        os.write(ours, b"\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
