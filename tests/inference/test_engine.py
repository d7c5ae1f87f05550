"""The engine against the plain forward: whoever asks beside whom, in whichever slot, read in whatever pieces."""

import dataclasses
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.errors import UserError
from kangaroo_jax.inference import functions, memories
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.requests import EngineError, Event
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.sharding import make_mesh
from tests.inference.asked import Letters, Seen, V, assert_plain, logits_after, request

SIZES = Sizes(((256, 3), (512, 2)), chunks=(32,), visible=(), rows=(1, 2, 4), frames=4)


@pytest.fixture(scope="module")
def model(make_micro_config, make_random_model):
    return make_random_model(make_micro_config().model)


whole = functions._logits


@pytest.fixture(scope="module")
def unstacked(model):
    return nnx.clone(model).unstack()


def make_engine(unstacked, sizes=SIZES, vision=None, **options) -> Engine:
    return Engine(unstacked, sizes, vision=lambda programs: vision or Seen(), **options)


@pytest.fixture
def engine(unstacked):
    with make_engine(unstacked) as engine:
        yield engine


@pytest.mark.parametrize("chunk", [1, 7, 128, 512])
def test_however_a_prompt_is_cut_the_answer_is_the_plain_one(model, unstacked, chunk):
    sizes = Sizes(((320 + max(chunk, 64), 2),), chunks=(chunk,), visible=(32,), rows=(1, 2), frames=4)
    asked = [request(1, 5, [("a", 30), ("b", 6)], new=70), request(2, 1), request(3, chunk % 200 + 1)]
    with make_engine(unstacked, sizes, Seen(at_a_time=9)) as engine:
        tickets = [engine.submit(one) for one in asked]
        for one, ticket in zip(asked, tickets, strict=True):
            assert_plain(model, one, ticket.result(60))
        assert engine.stats()["tokens_prefilled"] == sum(len(one.tokens) - 1 for one in asked)


def test_every_slot_and_any_neighbours_give_the_plain_answer(model, engine):
    asked = [request(i, 3 + 7 * i, [("a", 5 * i)] if i % 2 else (), new=10 + i) for i in range(10)]
    asked.append(request(99, 300, new=5))
    alone = engine.submit(asked[4]).result(60)
    tickets = [engine.submit(one) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert_plain(model, one, ticket.result(60))
    assert tickets[4].result().ids == alone.ids
    stats = engine.stats()
    assert stats["requests_length"] == 12 and stats["slots_busy"] == 0 and stats["running"] == 0


@pytest.mark.slow
def test_fifteen_neighbours_in_a_step_change_no_answer(model, unstacked, monkeypatch):
    sizes = Sizes(((256, 16),), chunks=(32,), visible=(), rows=(1, 16), frames=4)
    drawn = Sampling(temperature=2.0, top_p=0.9, seed=5)
    asked = [request(1, 9, [("a", 20)], new=40), request(2, 30, new=40, sampling=drawn)]
    asked += [request(i, 3 + i, [("b", i)] if i % 2 else (), new=60) for i in range(3, 17)]
    with make_engine(unstacked, sizes) as engine:
        alone = [engine.submit(one).result(60).ids for one in asked[:2]]
        rows, decode = set(), engine.programs.decode

        def counted(larges, *others):
            rows.add(len(set(map(id, larges))))
            return decode(larges, *others)

        monkeypatch.setattr(engine.programs, "decode", counted)
        tickets = [engine.submit(dataclasses.replace(one, namespace=b"other")) for one in asked]
        assert [ticket.result(120).ids for ticket in tickets[:2]] == alone
        assert_plain(model, asked[0], tickets[0].result())
        assert 16 in rows


def test_conversations_of_all_classes_are_in_one_step(model, engine, monkeypatch):
    steps: list[list[int]] = []
    decode = engine.programs.decode

    def counted(larges, *rest):
        steps.append([large[0].tokens for large in larges])
        return decode(larges, *rest)

    monkeypatch.setattr(engine.programs, "decode", counted)
    asked = [request(1, 9, new=30), request(2, 9, [("a", 200)], new=30), request(3, 9, new=30)]
    for one, ticket in zip(asked, [engine.submit(one) for one in asked], strict=True):
        assert_plain(model, one, ticket.result(60))
    assert len(steps) < 60 and [256] * 4 + [512] in steps
    assert {tuple(step) for step in steps} <= {tuple(c for c, n in rows for _ in range(n)) for rows in SIZES.steps()}


@pytest.mark.parametrize("context", [64, 256, 384, 22_656])
def test_programs_are_compiled_for_the_chunks_that_a_slot_holds(context):
    sizes = Sizes.for_context(context)
    compiled = {key[1:3] for key in sizes.keys(16) if key[0] == "extend"}
    assert all(size <= capacity for capacity, size in compiled)
    reached = {
        (capacity, sizes.chunk(rest, start, capacity))
        for capacity, _ in sizes.classes
        for start in (0, 100, capacity - sizes.spare - 1)
        for rest in range(1, capacity - sizes.spare - start)
    }
    assert reached <= compiled


def test_the_programs_of_a_step_are_few_and_fit_any_conversations():
    sizes = Sizes(((256, 4), (512, 16), (1024, 3)))
    steps = sizes.steps()
    assert len(steps) == len(set(steps)) and sizes.most_rows == 4 + 16 + 4
    for counts in itertools.product(range(5), range(17), range(4)):
        rows = sizes.step(dict(zip((256, 512, 1024), counts, strict=True)))
        assert not any(counts) or rows in steps
        there = {capacity: count for capacity, count in zip((256, 512, 1024), counts, strict=True) if count}
        assert list(dict(rows)) == list(there) and all(there[c] <= n <= 4 * there[c] for c, n in rows)
    pairs = Sizes.for_context(22_656).steps()
    assert len(pairs) == 12 and [rows for rows in pairs if len(rows) == 1] == [
        ((capacity, count),) for capacity in (3072, 22_784) for count in (1, 2, 4)
    ]


def test_on_a_tpu_a_row_that_fills_up_changes_no_answer(model, unstacked, monkeypatch):
    monkeypatch.setattr(memories, "platform", lambda: "tpu")
    sizes = dataclasses.replace(SIZES, frames=6)  # no other test's programs
    widths: list[int] = []
    monkeypatch.setattr(functions, "_logits", lambda model, x: widths.append(len(x)) or whole(model, x))
    with make_engine(unstacked, sizes) as engine:
        alone = request(1, 9, [("a", 20)])
        assert_plain(model, alone, engine.submit(alone).result(60))
        asked = [request(seed, 9, new=20) for seed in (2, 3)]
        for one, ticket in zip(asked, [engine.submit(one) for one in asked], strict=True):
            assert_plain(model, one, ticket.result(60))
    assert widths == [2, 2]  # of one conversation, and of two


def test_a_second_round_reads_only_what_is_new(model, engine):
    first = request(1, 20, [("a", 60)], new=70)
    answer = engine.submit(first).result(60)
    second = request(2, 9, before=first, answer=answer.ids)
    again = engine.submit(second).result(60)
    assert_plain(model, second, again)
    assert again.usage.cached_tokens == len(first.tokens) + 69  # the answer's last token was never read
    other = request(3, 9, before=first, answer=answer.ids[:5])  # from within a conversation of another
    assert_plain(model, other, shared := engine.submit(other).result(60))
    assert shared.usage.cached_tokens == len(first.tokens) + 5
    assert engine.submit(second).result(60).ids == again.ids


def test_what_is_forgotten_is_read_again_and_counts_no_more(model, unstacked):
    asked = [request(seed, 40, [("a", 60)], new=5) for seed in range(8)]  # more than there are slots
    with make_engine(unstacked, host_bytes=1 << 24) as engine:
        fresh = engine.stats()
        tickets = [engine.submit(one) for one in asked]
        engine.forget()  # after they are answered
        assert all(ticket.done for ticket in tickets)
        assert engine.stats() == fresh | {"programs_compiled": engine.programs.compiled}
        for one in asked:
            assert_plain(model, one, again := engine.submit(one).result(60))
            assert again.usage.cached_tokens < 3  # the first tokens of a prompt may be alike
    with pytest.raises(EngineError, match="closed"):
        engine.forget()


def test_one_film_for_many_is_read_once(model, engine):
    film = request(1, 0, [("a", 100)])
    asked = [request(i, 4, before=film) for i in range(6)]
    tickets = [engine.submit(one) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert_plain(model, one, ticket.result(60))
    assert engine.stats()["tokens_prefilled"] < len(film.tokens) + 6 * 8


def test_films_of_equal_length_and_text_are_never_taken_for_each_other(model, engine):
    asked = [request(1, 5, [(name, 80)]) for name in "abababab"]
    tickets = [engine.submit(one) for one in asked]
    for one, ticket in zip(asked, tickets, strict=True):
        assert_plain(model, one, ticket.result(60))
    assert tickets[0].result().ids != tickets[1].result().ids
    apart = engine.submit(dataclasses.replace(asked[0], namespace=b"other")).result(60)
    assert apart.usage.cached_tokens == 0 and apart.ids == tickets[0].result().ids


def test_what_gave_way_comes_back_from_the_host(model, unstacked):
    with make_engine(unstacked, Sizes(((256, 1),), chunks=(32,), visible=(), rows=(1,)), host_bytes=1 << 20) as engine:
        asked = [request(i, 90, new=20) for i in range(2)]
        first = engine.submit(asked[0]).result(60)
        engine.submit(asked[1]).result(60)
        assert engine.stats()["host_conversations"] == 1
        more = request(7, 5, before=asked[0], answer=first.ids)
        again = engine.submit(more).result(60)
        assert_plain(model, more, again)
        assert again.usage.cached_tokens == len(asked[0].tokens) + 19


def test_int8_keys_and_values_are_rounded_alike_wherever_they_are(model, unstacked):
    """In a chunk, a tail, a part that is flushed, shared, copied to a larger slot, or comes back from the host."""
    sizes = Sizes(((256, 2), (384, 1)), chunks=(7, 32), visible=(64,), rows=(1, 2), frames=4)
    with make_engine(unstacked, sizes, host_bytes=1 << 20, kv_dtype="int8") as engine:

        def ask(asked, cached):
            answer = engine.submit(asked).result(60)
            assert_plain(model, asked, answer, rounded=True)
            assert answer.usage.cached_tokens in (cached, cached + 1)
            return answer.ids

        first = request(1, 30, [("a", 40)], new=70)
        answer = ask(first, 0)
        known = len(first.tokens) + 69
        ask(request(2, 9, before=first, answer=answer), known)
        ask(request(3, 90, before=first, answer=answer), known)  # needs the larger slot
        for seed in (4, 5, 6):
            ask(request(seed, 150, new=5), 0)
        assert engine.stats()["host_conversations"] > 0
        ask(request(7, 5, before=first, answer=answer), known)
        empty = engine.programs.empty(256)[0]
        assert empty.keys.dtype == empty.values.dtype == jnp.int8
        assert engine.programs.size(256) == sum(x.nbytes for x in jax.tree.leaves(engine.programs.empty(256)))


def test_int8_keys_and_values_change_little(model):
    asked = request(1, 60, [("a", 60)])
    answer = np.random.default_rng(0).integers(11, V, 100)
    plain, rounded = (jax.nn.log_softmax(logits_after(model, asked, answer, r)) for r in (False, True))
    divergence = np.asarray((jnp.exp(plain) * (plain - rounded)).sum(-1))
    assert 0 < divergence.mean() < 5e-3


def test_a_dtype_that_keys_and_values_cannot_have_is_refused_in_one_line(unstacked):
    with pytest.raises(UserError, match="kv_dtype 'int4': use int8, or none"):
        make_engine(unstacked, kv_dtype="int4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2, 2, 2), (1, 1, 4, 2)])
def test_a_mesh_changes_no_answer(model, mesh):
    mesh = make_mesh(mesh)
    with make_engine(nnx.clone(model).unstack(), mesh=mesh) as engine:
        asked = [request(1, 40, [("a", 20)], new=70), request(2, 3), request(3, 70)]
        tickets = [engine.submit(one) for one in asked]
        for one, ticket in zip(asked, tickets, strict=True):
            assert_plain(model, one, ticket.result(300))
        before = engine.programs.compiled
        more = request(4, 5, before=asked[0], answer=tickets[0].result().ids)
        assert_plain(model, more, engine.submit(more).result(300))
        assert engine.programs.compiled - before <= 2


def test_the_seed_decides_whatever_the_slot_and_the_neighbours(engine):
    sampling = Sampling(temperature=3.0, top_p=0.95, top_k=300, presence=0.5, repetition=1.1, seed=7)
    asked = request(1, 9, new=20, sampling=sampling)
    alone = engine.submit(asked).result(60).ids
    crowd = [request(i, 20, new=25, sampling=Sampling(temperature=2.0, seed=i)) for i in range(4)]
    tickets = [engine.submit(one) for one in [*crowd, asked]]
    assert tickets[-1].result(60).ids == alone
    other = engine.submit(dataclasses.replace(asked, sampling=dataclasses.replace(sampling, seed=8)))
    assert other.result(60).ids != alone


def test_answers_end_at_stop_ids_and_events_tell_them(engine):
    free = engine.submit(request(1, 9, new=10)).result(60).ids
    last = max(free, key=free.index)  # the one that comes latest
    ticket = engine.submit(request(1, 9, new=10, stop_ids=(last,), logprobs=2))
    events = list(ticket)
    answer = ticket.result()
    first = free.index(last)
    assert answer.finish_reason == "stop" and answer.ids == free[:first] == tuple(i for e in events for i in e.ids)
    assert [lp.token for lp in answer.logprobs] == list(answer.ids) and len(answer.logprobs[0].best) == 2
    assert answer.logprobs[0].best[0] == (answer.ids[0], answer.logprobs[0].logprob)
    heard: list = []
    ticket.add_listener(heard.append)
    assert heard == [*events, answer] and answer.usage.completion_tokens == first


def test_an_answer_that_was_begun_is_told_what_stands_before_it(unstacked):
    with make_engine(unstacked, detokenizer=Letters) as engine:
        asked = request(1, 9, new=3)
        texts = [engine.submit(dataclasses.replace(asked, begun=begun)).result(60).text for begun in (False, True)]
        assert texts[1] == f"{texts[0][:-1]}[{asked.tokens[-1]}]."


def test_stop_strings_end_an_answer_and_the_rest_of_its_text_comes_last(unstacked):
    with make_engine(unstacked, detokenizer=Letters) as engine:
        free = engine.submit(request(1, 9)).result(60)
        assert free.text == "".join(map(chr, free.ids)) + "."
        ticket = engine.submit(request(1, 9, stop=(chr(free.ids[3]),)))
        assert ticket.result(60).finish_reason == "stop"
        assert "".join(event.text for event in ticket) == ticket.result().text


def test_a_continuation_is_scored_as_the_plain_forward_does(model, engine):
    asked = request(1, 30, [("a", 20)])
    continuation = np.random.default_rng(0).integers(11, V, 50).astype(np.int32)
    plain = np.asarray(jax.nn.log_softmax(logits_after(model, asked, continuation), axis=-1))
    for _ in range(2):  # the second time the prompt is remembered
        answer = engine.submit(dataclasses.replace(asked, continuation=continuation)).result(60)
        found = np.array([one.logprob for one in answer.logprobs])
        np.testing.assert_allclose(found, plain[np.arange(50), continuation], atol=1e-4)
        assert [one.best[0][0] for one in answer.logprobs] == plain.argmax(-1).tolist()
    assert answer.usage.cached_tokens == len(asked.tokens) - 1


def test_who_waits_for_programs_is_told_how_far_it_is(unstacked, monkeypatch):
    monkeypatch.setattr("kangaroo_jax.system.progress._EVERY", 0.0)
    told: list[str] = []
    with make_engine(unstacked) as engine:
        engine.warm_up(16, told.append)
    count = len(SIZES.keys(16))
    assert [line.split(" programs")[0] for line in told] == [f"compiling: {i} of {count}" for i in range(1, count + 1)]


@pytest.mark.parametrize("slow", [False, True])
def test_no_value_of_a_request_means_another_program(unstacked, slow, request):
    if slow and not request.config.getoption("--slow"):
        pytest.skip("slow: run with --slow")
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    rng, ask = np.random.default_rng(0), globals()["request"]
    with make_engine(unstacked, host_bytes=1 << 20) as engine:
        assert engine.warm_up(16) >= len(SIZES.keys(16))
        compiled.clear()
        tickets = []
        for i in range(500 if slow else 60):
            new, films = (
                int(rng.integers(1, 20)),
                [(str(rng.integers(9)), int(rng.integers(1, 90)))] * int(rng.integers(2)),
            )
            sampling = Sampling(
                float(rng.integers(3)), float(rng.uniform(0.1, 1)), i, int(rng.integers(9)), repetition=1.2
            )
            score = {"continuation": np.arange(20, 20 + new, dtype=np.int32)} if i % 7 == 0 else {}
            asked = ask(
                i, int(rng.integers(1, 90)), films, new, sampling=sampling, logprobs=int(rng.integers(5)), **score
            )
            tickets.append(engine.submit(asked))
            if i % 11 == 0:
                tickets[-1].cancel()
        for ticket in tickets:
            ticket.result(120)
        assert compiled == []
        assert engine.stats()["requests"] == len(tickets) and engine.stats()["slots_busy"] == 0


def test_cancelling_frees_the_slot_at_every_stage(model, unstacked):
    vision = Seen(at_a_time=0)  # the film never comes
    with make_engine(unstacked, Sizes(((256, 1),), chunks=(32,), visible=(), rows=(1,)), vision) as engine:
        reading = engine.submit(request(1, 40, [("a", 40)]))
        waiting = engine.submit(request(2, 9))
        waiting.cancel()
        assert waiting.result(60).finish_reason == "cancelled" and not reading.done
        reading.cancel()
        assert reading.result(60).ids == () and all(w.released for w in vision.watched)
        long = engine.submit(request(3, 9, new=150))
        for _event in long:
            long.cancel()
            break
        assert long.result(60).finish_reason == "cancelled" and 0 < len(long.result().ids) < 150
        asked = request(4, 9)
        assert_plain(model, asked, engine.submit(asked).result(60))
        assert engine.stats()["requests_cancelled"] == 3 and engine.stats()["slots_busy"] == 0


def test_a_ticket_says_how_much_of_its_media_is_seen(unstacked):
    vision = Seen(at_a_time=0)
    with make_engine(unstacked, vision=vision) as engine:
        ticket = engine.submit(request(1, 5, [("a", 30), ("b", 10)]))
        assert ticket.seen == (0.0, 0.0)
        vision.watched[0].ready = 15
        assert ticket.seen == (0.5, 0.0)
        ticket.cancel()
        ticket.result(60)
        assert ticket.seen == (1.0, 1.0) and engine.submit(request(2, 9)).seen == ()


def test_a_film_that_cannot_be_read_costs_its_own_request(model, unstacked):
    vision = Seen(at_a_time=0)
    with make_engine(unstacked, vision=vision) as engine:
        bad = engine.submit(request(1, 5, [("a", 40)]))
        asked = request(2, 9)
        assert_plain(model, asked, engine.submit(asked).result(60))
        vision.watched[0].error = UserError("a: no video")
        vision.listener()
        with pytest.raises(UserError, match="a: no video"):
            bad.result(60)
        with pytest.raises(UserError, match="a: no video"):
            list(bad)


def fail_on(engine, monkeypatch, name: str, times: int, after: threading.Event | None = None) -> threading.Event:
    """Make a program fail so many times, and not before `after` is set."""
    whole, left, failed = getattr(engine.programs, name), [times], threading.Event()

    def broken(*arguments):
        if left[0]:
            if after is not None:
                after.wait(60)
            left[0] -= 1
            failed.set()
            raise RuntimeError("the device has gone")
        return whole(*arguments)

    monkeypatch.setattr(engine.programs, name, broken)
    return failed


@pytest.mark.parametrize("name", ["extend", "decode"])
def test_a_fault_costs_the_requests_of_its_step(model, engine, monkeypatch, name):
    fail_on(engine, monkeypatch, name, 1)
    lost = engine.submit(request(1, 40))
    with pytest.raises(EngineError, match="RuntimeError: the device has gone"):
        lost.result(60)
    asked = request(2, 9)
    assert_plain(model, asked, engine.submit(asked).result(60))
    assert engine.stats()["requests_failed"] == 1 and engine.failed is None


def test_two_faults_one_after_another_end_the_engine(engine, monkeypatch):
    all_taken_in = threading.Event()
    fail_on(engine, monkeypatch, "extend", 9, after=all_taken_in)
    tickets = [engine.submit(request(i, 40)) for i in range(4)]
    all_taken_in.set()
    for ticket in tickets:
        with pytest.raises(EngineError):
            ticket.result(60)
    with pytest.raises(EngineError, match="the engine has ended"):  # as the last two were told
        engine.submit(request(1, 9))


def test_closing_ends_who_waits_or_lets_them_end(model, unstacked):
    engine = make_engine(unstacked)
    asked = request(1, 9, new=30)
    ticket = engine.submit(asked)
    engine.close(drain=60)
    assert_plain(model, asked, ticket.result(0))
    with pytest.raises(EngineError, match="closed"):
        engine.submit(asked)
    engine = make_engine(unstacked, vision=Seen(at_a_time=0))
    ticket = engine.submit(request(1, 9, [("a", 40)]))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        ticket.result(0)


def test_bad_requests_are_refused_in_one_line(unstacked, engine):
    with pytest.raises(UserError, match="the prompt has 504 tokens, but a conversation may have 448 here"):
        engine.submit(request(1, 501))
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        request(1, 5, new=0)
    with pytest.raises(UserError, match="logprobs is 21"):
        request(1, 5, logprobs=21)
    with pytest.raises(UserError, match="bias: ids of tokens must be between 0 and 399"):
        engine.submit(request(1, 5, sampling=Sampling(bias=((400, 1.0),))))
    with Engine(unstacked, SIZES) as blind, pytest.raises(UserError, match="looks at none"):
        blind.submit(request(1, 5, [("a", 4)]))
    long = request(1, 440, new=100)
    assert len(engine.submit(long).result(60).ids) == 448 - len(long.tokens) + 1


def test_events_are_what_a_ticket_yields(engine):
    ticket = engine.submit(request(5, 9, new=3))
    assert all(isinstance(event, Event) for event in ticket)
    with pytest.raises(TimeoutError):
        engine.submit(request(6, 9, new=100)).result(0.0)
