"""Generation with the cache against plain argmax over the whole model, alone and among ragged rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.config import ModelConfig, frames_per_group, tokens_per_group
from kangaroo_jax.conventions import PackedBatch
from kangaroo_jax.inference import generate
from kangaroo_jax.inference.generate import Generator, Prompts, bucket
from kangaroo_jax.inference.sampling import Sampling
from kangaroo_jax.models.kangaroo import KangarooModel

NO_STOP = (400,)  # no token of the vocabulary
T, F = 40, 6


@pytest.fixture(scope="module")
def config(make_micro_config):
    return make_micro_config()


@pytest.fixture(scope="module")
def model(config, make_random_model) -> KangarooModel:
    return make_random_model(config.model)


def make_batch(config, frame_counts: list[int], lengths: list[int], seed: int = 0) -> PackedBatch:
    """One prompt a row: vision tokens from the third place on, then text up to `lengths`."""
    model = ModelConfig.from_config(config.model)
    per_frame = tokens_per_group(model, config.data.image_size) // frames_per_group(model)
    rows, side = len(lengths), config.data.image_size
    tokens = np.zeros((rows, T), np.int32)
    vision_index = np.full((rows, T), -1, np.int32)
    frames = np.zeros((rows, F, side, side, 3), np.uint8)
    times = np.zeros((rows, F), np.float32)
    for row, (count, length) in enumerate(zip(frame_counts, lengths, strict=True)):
        own = np.random.default_rng((seed, row))  # a row is the same in every batch
        n = max(1, per_frame * count) if count else 0
        tokens[row, :length] = own.integers(11, 399, length)
        vision_index[row, 3 : 3 + n] = np.arange(n)
        frames[row, :count] = own.integers(0, 256, (count, side, side, 3))
        times[row, :count] = np.arange(count) * 1.5
    place = np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T))
    filled = place < np.array(lengths)[:, None]
    return PackedBatch(
        tokens=tokens,
        segment_ids=filled.astype(np.int32),
        positions=np.where(filled, place, 0).astype(np.int32),
        targets=np.zeros_like(tokens),
        weights=np.zeros((rows, T), np.float32),
        frames=frames if any(frame_counts) else frames[:, :0],
        frame_times=times if any(frame_counts) else times[:, :0],
        frame_groups=np.zeros((rows, F), np.int32),
        vision_index=vision_index,
    )


@functools.partial(jax.jit, static_argnums=0)
def all_logits(graph, weights, batch):
    return nnx.merge(graph, weights).logits(batch)


def plain_greedy(model: KangarooModel, batch: PackedBatch, row: int, steps: int) -> list[int]:
    """The likeliest token of the whole model, run anew for each."""
    batch = jax.tree.map(lambda x: np.array(x[row : row + 1]), batch)
    answer = []
    for _ in range(steps):
        n = np.count_nonzero(batch.segment_ids)
        logits = all_logits(*nnx.split(model), batch)
        answer.append(int(jnp.argmax(logits[0, n - 1])))
        batch.tokens[0, n], batch.segment_ids[0, n], batch.positions[0, n] = answer[-1], 1, n
    return answer


def answers_of(generator: Generator, config, batch: PackedBatch, steps: int, stop_ids=NO_STOP, **options):
    """The generator's answers to the rows of a batch."""
    return generator.generate(*prompts_of(generator, config, batch), max_new_tokens=steps, stop_ids=stop_ids, **options)


def prompts_of(generator: Generator, config, batch: PackedBatch):
    """Prompts whose vision rows are those of all rows of the batch, one after another; and these vision rows."""
    rows, count = batch.frames.shape[:2]
    model = ModelConfig.from_config(config.model)
    each = count // frames_per_group(model) * tokens_per_group(model, config.data.image_size)
    index = np.where(batch.vision_index < 0, -1, batch.vision_index + each * np.arange(rows)[:, None]).astype(np.int32)
    prompts = Prompts(batch.tokens, index, np.count_nonzero(batch.segment_ids, axis=1).astype(np.int32))
    if not count:
        return prompts, None
    frames, times = batch.frames.reshape(rows * count, *batch.frames.shape[2:]), batch.frame_times.reshape(-1)
    return prompts, generator.encode(frames, times)


def alone(batch: PackedBatch, row: int) -> PackedBatch:
    """The batch with all rows but one empty."""
    other = np.arange(len(batch.tokens)) != row
    batch = jax.tree.map(np.array, batch)
    batch.tokens[other], batch.segment_ids[other], batch.vision_index[other], batch.frames[other] = 0, 0, -1, 0
    return batch


@pytest.mark.parametrize("joins", [True, False])
def test_cached_answers_are_plain_greedy_ones_for_ragged_rows_with_and_without_video(
    micro_config, make_random_model, joins
):
    micro_config.model.patchify.enabled = joins
    model = make_random_model(micro_config.model)
    generator = Generator(model)
    batch = make_batch(micro_config, [4, 0, 6, 2], [24, 5, 31, 12] if joins else [30, 5, 31, 12])
    together = answers_of(generator, micro_config, batch, 8)
    for row in range(4):
        assert together[row] == plain_greedy(model, batch, row, 8), row
        assert together[row] == answers_of(generator, micro_config, alone(batch, row), 8)[row]
    assert len({tuple(answer) for answer in together}) == 4
    other = batch.replace(frames=255 - np.asarray(batch.frames))
    changed = answers_of(generator, micro_config, other, 8)
    assert changed[1] == together[1] and changed != together  # only videos are looked at


def test_text_alone_and_an_empty_row(config, model):
    batch = make_batch(config, [0, 0], [7, 0])
    answers = answers_of(Generator(model), config, batch, 5)
    assert answers == [plain_greedy(model, batch, 0, 5), []]


def test_stop_ids_end_an_answer_each_on_its_own(config, model):
    generator = Generator(model)
    batch = make_batch(config, [0, 0], [7, 9])
    free = answers_of(generator, config, batch, 10)
    stop = (free[0][3], free[1][0])
    answers = answers_of(generator, config, batch, 10, stop)
    for have, want in zip(answers, free, strict=True):
        cut = next((i for i, token in enumerate(want) if token in stop), len(want))
        assert have == want[:cut]
    assert len(answers[0]) <= 3 and answers[1] == []


def test_streamed_answers_grow_into_the_whole_one(config, model):
    generator = Generator(model)
    batch = make_batch(config, [4, 2], [24, 12])
    whole = answers_of(generator, config, batch, 7)
    prompts, vision = prompts_of(generator, config, batch)
    stream = generator.stream(prompts, vision, max_new_tokens=7, stop_ids=NO_STOP)
    assert list(stream) == [[answer[:n] for answer in whole] for n in range(1, 8)]
    pieces = generator.stream(prompts, vision, max_new_tokens=7, stop_ids=NO_STOP, every=3)
    assert list(pieces) == [[answer[:n] for answer in whole] for n in (3, 6, 7)]


def test_sampling_repeats_with_its_seed_and_varies_with_it(config, model):
    generator = Generator(model)
    batch = make_batch(config, [0, 0], [7, 7])
    batch = batch.replace(tokens=np.repeat(batch.tokens[:1], 2, axis=0))

    def answers(seed):
        return answers_of(generator, config, batch, 8, sampling=Sampling(temperature=5.0, top_p=1.0, seed=seed))

    first = answers(0)
    assert first == answers(0) and first != answers(1) and first[0] != first[1]


def test_vision_tokens_do_not_depend_on_how_many_frames_are_seen_at_a_time(config, model):
    generator = Generator(model)
    frames = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), np.uint8)
    times = np.arange(70, dtype=np.float32)
    whole = generator.encode(frames, times)
    assert whole.shape[0] == 64  # groups of two frames are one token; 35 are rounded up
    for begin, end in ((0, 2), (2, 8), (62, 70)):
        part = generator.encode(frames[begin:end], times[begin:end])[: (end - begin) // 2]
        want = whole[begin // 2 : end // 2]
        np.testing.assert_allclose(part, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0)


def test_few_compilations_and_none_for_a_second_model_of_the_same_structure(config, model, make_random_model):
    batches = [make_batch(config, [4, 2], [n, 12], seed=n) for n in (20, 25, 31)]
    answers_of(Generator(model), config, batches[0], 8)
    functions = (generate._encode, generate._prefill, generate._decode)
    sizes = [function._cache_size() for function in functions]
    other = Generator(make_random_model(config.model))
    for batch in batches:
        answers_of(other, config, batch, 3, (1,))
        answers_of(other, config, batch, 7, (1,), sampling=Sampling(0.5, 0.5, 5))
    assert sizes == [function._cache_size() for function in functions]


def test_prompts_are_read_some_tokens_at_a_time(config, model, monkeypatch):
    batch = make_batch(config, [4, 6], [24, 33])
    whole = answers_of(Generator(model), config, batch, 6)
    monkeypatch.setattr(generate, "TOKENS_AT_A_TIME_CPU", 10)
    generate._prefill.clear_cache()
    assert generate._chunk(T) == 10
    assert answers_of(Generator(model), config, batch, 6) == whole
    generate._prefill.clear_cache()


def test_buckets_are_few_and_waste_a_third_at_most():
    sizes = {n: bucket(n) for n in range(1, 22_528)}
    assert len(set(sizes.values())) == 16
    assert all(n <= size and (size <= 128 or size < 1.5 * n) for n, size in sizes.items())
    assert all(size % 64 == 0 for size in sizes.values())
