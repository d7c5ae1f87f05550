"""The load on a server: every valid request is answered once, and whatever goes wrong is counted."""

import pytest

from kangaroo_jax.bench import load
from kangaroo_jax.bench.serve import bench_serve, line
from kangaroo_jax.cli import main as cli
from kangaroo_jax.errors import UserError
from kangaroo_jax.serving.limits import Limits

pytest.importorskip("openai")
pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def _few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load.made_up, "__defaults__", (12,))


def test_a_round_counts_what_became_of_its_requests(start) -> None:
    server = start(Limits(max_body_mb=1, max_requests=3))
    said: list[str] = []
    (row,) = bench_serve(url=server.url, clients=6, requests=40, rounds=1, body_mb=1, tell=said.append)
    assert (row["valid"], row["lost"], row["doubled"], row["wrong"]) == (30, 0, 0, 0)
    assert row["statuses"]["streamed: answered"] == 12 and row["statuses"]["oversize: 413 too_large"] == 2
    assert row["tokens_per_second"] > 0 and row["first_piece_p50"] > 0 and row["health_p99"] < 30
    assert (row["slots"], row["programs_compiled"]) == (0, 13) and said == [line(row)]
    assert sum(not ticket.cancelled for ticket in server.engine.tickets) >= 30


def test_what_is_lost_or_different_is_told(start) -> None:
    server = start(Limits(max_body_mb=1))
    server.engine.error = UserError("nothing")
    (row,) = bench_serve(url=server.url, clients=2, requests=20, rounds=1, body_mb=1, tell=lambda _: None)
    assert row["lost"] == row["valid"] == 15 and row["statuses"]["whole: 400 invalid_request_error"] == 9
    assert "queue_p50" not in row and "queue -/-/-" in line(row)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give --checkpoint=DIR, or --url="),
        (["--checkpoint=a", "--url=b"], "give --checkpoint=DIR, or --url="),
        (["--url=http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer"),
        (["--url=nothing"], "nothing does not answer"),
        (["--checkpoint=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], says: str, capsys) -> None:
    assert cli.main(["bench", "serve", "--json", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
