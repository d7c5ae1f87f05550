"""A run after a run: curation reads nothing that it wrote, replaces nothing silently, and explains what was chosen."""

import functools
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from kangaroo_jax.cli import main as cli
from kangaroo_jax.curation.curate import Options, curate
from kangaroo_jax.curation.engine.manifest import read_inputs
from kangaroo_jax.errors import UserError

OFF = [f"--config.{stage}.enabled=False" for stage in ("text", "face", "caption_language")]


@pytest.fixture(scope="module")
def project(clips, tmp_path_factory) -> Path:
    """A folder with clips, one of a name that is no UTF-8, and below it what curation made of them."""
    folder = tmp_path_factory.mktemp("project")
    for k in (0, 1):
        shutil.copy(clips / f"clip_{k}.mp4", folder)
    shutil.copy(clips / "clip_2.mp4", folder / os.fsdecode(b"caf\xe9\x1b[2J.mp4"))
    (folder / os.fsdecode(b"empty\xe9\x1b.mp4")).touch()
    shutil.copy(clips / "clip_2.mp4", folder / "._clip_2.mp4")
    assert run(folder) == 0
    return folder


def run(project: Path, *more: str) -> int:
    """`kangaroo curate` with the output below the input; a job in `more` needs no input."""
    inputs = [] if more and not more[0].startswith("-") else [f"--input={project}"]
    return cli.main(["curate", *more, *inputs, f"--output={project / 'curated'}", "--config.engine.workers=1", *OFF])


def test_what_was_written_is_not_read(project, tree, config):
    before = tree(project / "curated")
    assert len(before["selected.jsonl"].splitlines()) == 3 and b"\\udce9" in before["selected.jsonl"]
    page = (project / "curated/report.html").read_text(encoding="utf-8")
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in page)
    assert run(project) == 0 and tree(project / "curated") == before
    assert len(read_inputs([str(project)], output=project / "other")) == 4  # of another run, neither
    for path in ("curated", "curated/keyframes"):
        with pytest.raises(UserError, match="was written by kangaroo curate"):
            read_inputs([str(project / path)], output=project / "curated")
    with pytest.raises(UserError, match="is the --output, too; give another"):
        read_inputs([str(project)], output=project)


def test_folders_of_others_are_not_written_into(clips, config, tmp_path):
    (tmp_path / "keyframes").mkdir()
    with pytest.raises(UserError, match="has a folder 'keyframes' that is not of kangaroo curate"):
        curate(Options(str(tmp_path), (str(clips),)), config)
    assert os.listdir(tmp_path) == ["keyframes"]


def test_another_input_is_refused_and_a_smaller_one_told(clips, config, tmp_path, capsys):
    media, output = tmp_path / "media", str(tmp_path / "out")
    media.mkdir()
    for k in (0, 1):
        shutil.copy(clips / f"clip_{k}.mp4", media)
    curate(Options(output, (str(media),)), config)
    before = (tmp_path / "out/selected.jsonl").read_bytes()
    with pytest.raises(UserError, match="has the scores of 2 items, of which none is in this input"):
        curate(Options(output, (str(clips / "clip_3.mp4"),)), config)
    assert (tmp_path / "out/selected.jsonl").read_bytes() == before
    (media / "clip_0.mp4").unlink()
    curate(Options(output, (str(media),)), config)
    assert "1 items of the last run are no longer in the input" in capsys.readouterr().out


def test_all_broken_is_no_success(config, tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(UserError, match="all 1 clips are broken, the first because of probe: .*the file is empty"):
        curate(Options(str(tmp_path / "out"), (str(tmp_path / "a.mp4"),)), config)
    assert (tmp_path / "out/report.html").exists()


def test_explain_judges_by_what_the_last_select_used(project, capsys):
    def explained(*more: str) -> str:
        assert run(project, "explain", "clip_0.mp4", *more) == 0
        return capsys.readouterr().out

    assert run(project, "select", "--config.select.min_short_side=300") == 0
    assert "dropped by the rule size: 240x180 pixels, under min_short_side 300" in explained()
    other = explained("--config.select.min_short_side=100")
    assert "as if select.min_short_side were 100; the last choice was made with 300" in other and ": kept" in other
    assert run(project, "report", "--config.select.min_short_side=100") == 2
    assert "run kangaroo curate select" in capsys.readouterr().err
    assert run(project, "select") == 0 and ": kept" in explained()


def test_explain_takes_a_whole_name_before_an_ending(tmp_path, capsys, monkeypatch):
    for name in ("bikes.mp4", "four bikes.mp4", "x/four bikes.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path) == 2  # all are empty, which is all that there is to explain
    said = {}
    for name in ("bikes.mp4", "x/four bikes.mp4", "./four bikes.mp4", "bikes.mp", "ikes.mp4"):
        capsys.readouterr()
        said[name] = run(tmp_path, "explain", name), capsys.readouterr().out
    paths = {name: out.partition("path ")[2].split("\n")[0].strip() for name, (_, out) in said.items()}
    assert paths == {
        "bikes.mp4": str(tmp_path / "bikes.mp4"),
        "x/four bikes.mp4": str(tmp_path / "x/four bikes.mp4"),
        "./four bikes.mp4": str(tmp_path / "four bikes.mp4"),
        "bikes.mp": "",
        "ikes.mp4": "",
    }
    assert [code for code, _ in said.values()] == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("job", [["select"], ["explain", "a"], ["report"], ["export"]])
def test_no_job_makes_a_folder_of_nothing(job, tmp_path):
    assert cli.main(["curate", *job, f"--output={tmp_path / 'nowhere'}"]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_private_address_is_read_only_where_that_is_asked_for(clips, config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clips))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        row = {"path": f"http://127.0.0.1:{server.server_address[1]}/clip_0.mp4"}
        (tmp_path / "list.jsonl").write_text(json.dumps(row))
        config.input.fetch = True
        run_of = Options(str(tmp_path / "out"), (str(tmp_path / "list.jsonl"),), retry=True)
        with pytest.raises(UserError, match="all 1 clips are broken.*private network.*config.input.allow_private=True"):
            curate(run_of, config)
        config.input.allow_private = True
        curate(run_of, config)
        assert len((tmp_path / "out/selected.jsonl").read_text().splitlines()) == 1
        server.shutdown()
