"""The loader's bench compares like with like: all readers give the same frames."""

import numpy as np
import pytest

from kangaroo_jax.bench import data as bench_data
from kangaroo_jax.cli import main as cli
from kangaroo_jax.data.media.decode import ProcessDecoder

pytestmark = pytest.mark.alone


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_every_reader_gives_the_same_frames(tmp_path, own):
    peers = [name for name in bench_data.READERS if bench_data._installed(name)]
    if not peers:
        pytest.skip("none of torchcodec, decord and OpenCV is installed")
    jobs = [(str(bench_data.make_video(tmp_path / f"{i}.mp4", 1, i)), (3, 15, 27)) for i in range(2)]
    decoder = ProcessDecoder(1, 120.0)
    ours = bench_data.run_ours(decoder, jobs).astype(int)
    decoder.close()
    apart = np.abs(ours[:, 0] - ours[:, 1]).mean()  # frames 12 apart, for comparison
    for name in peers:
        peer = bench_data.Peer(name, jobs, 1, own)
        for _ in range(2):  # the workers go on to the next epoch
            theirs = peer.run().astype(int)
            assert theirs.shape == ours.shape and np.abs(theirs - ours).mean() < min(5.0 if own else 3.0, apart / 4), (
                name
            )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--folder=file"], "file: cannot be made a working folder"),
        (["--frames=8,x"], "--frames=8,x must be numbers of frames"),
        (["--lengths=10s,1h"], "--lengths=10s,1h: must be of 10s, 3min, 20min"),
        (["--workers=-1"], "--workers=-1: is no whole number of 1 or more"),
    ],
)
def test_bad_arguments_are_one_line(flags, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(["bench", "data", *flags]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
