"""The engine's compiled programs.

Their number is known beforehand: one for each of the sizes in `Sizes`, and no value of a request makes another.
`Programs` also is what holds memories for `slots.Slots`.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.inference.functions import FUNCTIONS, Structure, Weights
from kangaroo_jax.inference.memories import TAILS, Layers, Part, check_kv_dtype
from kangaroo_jax.inference.sampling import Choices, Chosen, Sampling, words
from kangaroo_jax.inference.sizes import TAIL, Key, Rows, Sizes
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.sharding import mesh_scope, sharding
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.progress import Progress, Tell, silent


class Programs:
    """The programs of one model. All but `warm_up` and `compiled` are for the one thread that owns the device."""

    tail = TAIL

    def __init__(
        self,
        model: KangarooModel,
        sizes: Sizes,
        *,
        mesh: Mesh | None = None,
        precision: str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        """`model` has unstacked layers (`KangarooModel.unstack`); on a mesh its weights are cut by their axes.

        Of an abstract model, on an abstract device, programs can be lowered and nothing else. `precision` is that of
        `jax.default_matmul_precision`; `kv_dtype` see `check_kv_dtype`.
        """
        check_kv_dtype(kv_dtype)
        graph, state = nnx.split(model)
        if mesh is not None:
            for _, weight in nnx.to_flat_state(state):
                weight.set_value(_placed(weight.get_value(), sharding(mesh, weight.axes, weight.shape)))
        leaves, treedef = jax.tree.flatten(state)
        self.sizes, self._mesh = sizes, mesh
        self._weights: Weights = tuple(leaves)
        shapes = tuple((leaf.shape, str(leaf.dtype), leaf.sharding) for leaf in leaves)
        # What programs depend on, beside their own sizes.
        common = (sizes.most_rows, sizes.chunks[0], sizes.frames, kv_dtype)
        self._structure = Structure(graph, treedef, (shapes, common), mesh, precision)
        llm, patch = model.llm, model.vision.patch_size
        self.depth, self.kv_heads, self.head_dim = llm.depth, llm.kv_heads, llm.head_dim
        self.vocabulary, self.width = model.llm.embedding.shape
        self.dtype, self.patch_size = llm.dtype, patch
        self.kv_dtype = jnp.dtype(kv_dtype) if kv_dtype is not None else self.dtype
        joined = model.patchify.kernel_size[0] if model.joins_frames else 1
        self.frames_a_call = -(-sizes.frames // joined) * joined
        self._store = _store(self._structure)
        self._no_vision: dict[int, jax.Array] = {}
        self._none_guided: dict[int, jax.Array] = {}

    # -------------------------------------------------------------------------------- what is compiled

    @property
    def compiled(self) -> int:
        """How many programs are compiled."""
        return len(self._store.programs)

    def warm_up(self, image_size: int, tell: Tell = silent) -> None:
        """Compile every program that there will be, several at a time; `tell` is told now and then how far it is."""
        keys = self.sizes.keys(image_size)
        progress = Progress("compiling", len(keys), "programs", tell)

        def compile_one(key: Key) -> None:
            self._program(key, self._example(key))
            progress.add()

        with ThreadPoolExecutor(max(1, min(4, usable_cpus()))) as pool:
            list(pool.map(compile_one, keys))

    def lower(self, key: Key, platform: str) -> Any:
        """A program of `Sizes.keys`, lowered for the mesh's devices, of `platform`, and not compiled.

        Raises ValueError where there is no mesh: one of one device, too, tells what is compiled for.
        """
        if self._mesh is None:
            raise ValueError("a program is lowered for a mesh")
        with self._scope(), jax.set_mesh(self._mesh):
            return self._jitted(key).trace(*self._example(key)).lower(lowering_platforms=(platform,))

    def _example(self, key: Key) -> tuple[Any, ...]:
        """Arguments as those that the program will get."""
        name, *sizes = key
        number, weights = np.int32(0), self._weights
        if name == "encode":
            frames = np.zeros((self.frames_a_call, sizes[0], sizes[0], 3), np.uint8)
            return weights, frames, np.zeros(self.frames_a_call, np.float32)
        if name == "decode":
            return self._step_example(tuple(zip(sizes[::2], sizes[1::2], strict=True)))
        large = self._shape_of_part(sizes[0])
        if name == "extend":
            tokens = np.zeros(sizes[1], np.int32)
            return weights, large, tokens, tokens, self._shape((sizes[1], self.width), (None, None)), number
        if name == "score":
            tokens = np.zeros(self.sizes.chunks[0], np.int32)
            return weights, large, tokens, number, tokens
        if name == "flush":
            return large, self._shape_of_tail(), number
        return self._shape_of_part(sizes[1]), large

    def _step_example(self, classes: Rows) -> tuple[Any, ...]:
        larges = tuple(self._shape_of_part(capacity) for capacity, count in classes for _ in range(count))
        rows = len(larges)
        choices = Choices.of([Sampling()] * rows, [False] * rows, [False] * rows, self.vocabulary)
        seen = self._shape((self.vocabulary,), (None,), np.int32)
        previous, numbers = self._shape((self.sizes.most_rows,), (None,), np.int32), np.zeros((5, rows), np.int32)
        tails = (self._shape_of_tail(),) * rows
        allowed = self._shape((rows, words(self.vocabulary)), (None, None), np.uint32)
        return self._weights, larges, tails, (seen,) * rows, previous, numbers, self.choices_shape(choices), allowed

    def _program(self, key: Key, arguments: Sequence[Any]) -> Any:
        program = self._store.programs.get(key)
        if program is None:
            with self._store.lock(key):
                if key not in self._store.programs:
                    with self._scope():
                        self._store.programs[key] = self._jitted(key).lower(*arguments).compile()
                program = self._store.programs[key]
        return program

    def _jitted(self, key: Key) -> Any:
        name, *sizes = key
        function, donated, static = FUNCTIONS[name]
        bound = functools.partial(function, self._structure, **{k: sizes[i] for k, i in static.items()})
        if name == "decode":
            bound = functools.partial(bound, most=self.sizes.most_rows)
        return jax.jit(bound, donate_argnums=donated, keep_unused=True)

    @contextlib.contextmanager
    def _scope(self) -> Iterator[None]:
        with mesh_scope(self._mesh) if self._mesh is not None else contextlib.nullcontext():
            with jax.default_matmul_precision(self._structure.precision):
                yield

    def _run(self, key: Key, *arguments: Any) -> Any:
        return self._program(key, arguments)(*arguments)

    # ------------------------------------------------------------------------------------ the programs

    def encode(self, frames: np.ndarray, times: np.ndarray) -> jax.Array:
        """frames uint8[F, S, S, 3] and their seconds float32[F], F = `frames_a_call` -> vision tokens [R, D]."""
        rows: jax.Array = self._run(("encode", frames.shape[1]), self._weights, frames, times)
        return rows

    def extend(self, large: Layers, tokens: np.ndarray, vision: np.ndarray | None, start: int) -> tuple[Layers, Any]:
        """Read the next piece of a prompt. `large` is used up.

        Args:
            tokens: int32[n], at most the largest chunk.
            vision: [n, D] with a vision token where `tokens` is -1; None where there is none.
            start: tokens that are there.

        Returns:
            the large part, and an array that is there when the piece is read.
        """
        capacity = large[0].tokens
        size = next(size for size in self.sizes.chunks if size >= len(tokens))
        far = next(far for far in self.sizes.lookbacks(capacity) if far >= start)
        padded = np.zeros(size, np.int32)
        padded[: len(tokens)] = np.maximum(tokens, 0)
        index = np.full(size, -1, np.int32)
        index[: len(tokens)] = np.where(tokens < 0, np.arange(len(tokens)), -1)
        arguments = (self._weights, large, padded, index, self._vision(size, vision), np.int32(start))
        layers, marker = self._run(("extend", capacity, size, far), *arguments)
        return layers, marker

    def score(
        self, large: Layers, tokens: np.ndarray, start: int, following: np.ndarray
    ) -> tuple[Layers, tuple[jax.Array, ...]]:
        """Read tokens int32[n], at most the smallest chunk, and tell how likely those that follow each are.

        Returns the large part, which was used up, and of each place the log-probability of `following`, the
        likeliest token and its log-probability, padded.
        """
        size, capacity = self.sizes.chunks[0], large[0].tokens
        pad = (0, size - len(tokens))
        arguments = (self._weights, large, np.pad(tokens, pad), np.int32(start), np.pad(following, pad))
        layers, found = self._run(("score", capacity), *arguments)
        return layers, found

    def decode(
        self,
        larges: Sequence[Layers],
        tails: Sequence[jax.Array],
        seen: Sequence[jax.Array],
        previous: jax.Array,
        numbers: np.ndarray,
        choices: Choices,
        allowed: Mapping[int, np.ndarray],
    ) -> tuple[Chosen, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """One token of each row, which stand by classes, ascending. `tails` and `seen` are used up, and come back.

        numbers int32[5, B]: the row of `previous` in which a row's token is, or -1; the token itself in that case;
        tokens in the large part and in the tail; the place of the token to choose in its answer.
        allowed: by rows that are `Choices.guided`, uint32[W] with a bit for each token that may come.
        """
        classes = itertools.groupby(large[0].tokens for large in larges)
        key = ("decode", *itertools.chain(*((capacity, len(list(rows))) for capacity, rows in classes)))
        bits = self._allowed(len(larges), allowed)
        arguments = (self._weights, tuple(larges), tuple(tails), tuple(seen), previous, numbers, choices, bits)
        chosen, tails, seen = self._run(key, *arguments)
        return chosen, tuple(tails), tuple(seen)

    # ------------------------------------------------------------------- memories, for `slots.Device`

    def empty(self, capacity: int) -> Layers:
        """See `slots.Device`."""
        layers: Layers = jax.tree.map(self._zeros, self._shape_of_part(capacity))
        return layers

    def empty_tail(self) -> jax.Array:
        """See `slots.Device`."""
        return self._zeros(self._shape_of_tail())

    def nothing_seen(self, seen: np.ndarray | None = None) -> jax.Array:
        """What a row has seen, for `decode`: nothing or what `sampling.seen_in_prompt` gave."""
        shape = self._shape((self.vocabulary,), (None,), np.int32)
        return self._zeros(shape) if seen is None else self._put(seen, shape)

    def no_tokens(self) -> jax.Array:
        """The `previous` of a first step."""
        return self._zeros(self._shape((self.sizes.most_rows,), (None,), np.int32))

    def choices(self, choices: Choices) -> Choices:
        """Settings of rows, on the device."""
        shapes = self.choices_shape(choices)
        placed: Choices = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), choices, shapes)
        return placed

    def choices_shape(self, choices: Choices) -> Choices:
        """The shapes of settings of rows."""
        shapes: Choices = jax.tree.map(lambda x: self._shape(x.shape, (None,) * x.ndim, x.dtype), choices)
        return shapes

    def flush(self, large: Layers, tail: jax.Array, filled: int) -> Layers:
        """See `slots.Device`."""
        layers: Layers = self._run(("flush", large[0].tokens), large, tail, np.int32(filled))
        return layers

    def copy(self, into: Layers, large: Layers, capacity: int) -> Layers:
        """See `slots.Device`."""
        layers: Layers = self._run(("copy", large[0].tokens, capacity), into, large)
        return layers

    def save(self, large: Layers, count: int) -> tuple[Any, int]:
        """See `slots.Device`."""
        content = [jax.tree.map(np.copy, jax.tree.map(np.asarray, part).first(count)) for part in large]
        return content, sum(array.nbytes for array in jax.tree.leaves(content))

    def size(self, count: int) -> int:
        """See `slots.Device`."""
        shapes = jax.tree.leaves(self._shape_of_part(count))
        size: int = sum(shape.size * shape.dtype.itemsize for shape in shapes)
        return size

    def restore(self, content: Any, capacity: int) -> Layers:
        """See `slots.Device`."""
        shapes = self._shape_of_part(capacity)
        padded = tuple(part.padded(shape) for part, shape in zip(content, shapes, strict=True))
        layers: Layers = jax.tree.map(self._put, padded, shapes)
        return layers

    # ------------------------------------------------------------------------------------------ arrays

    def _shape(self, shape: tuple[int, ...], axes: Sequence[str | None], dtype: Any = None) -> jax.ShapeDtypeStruct:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        where = sharding(self._mesh, axes, shape) if self._mesh is not None else place
        return jax.ShapeDtypeStruct(shape, dtype or self.dtype, sharding=where)

    def _shape_of_part(self, capacity: int) -> Any:
        return (Part.shapes(self.kv_heads, self.head_dim, capacity, self.kv_dtype, self._shape),) * self.depth

    def _shape_of_tail(self) -> jax.ShapeDtypeStruct:
        return self._shape((self.depth, 2, self.kv_heads, TAIL, self.head_dim), TAILS)

    def _zeros(self, shape: Any) -> jax.Array:
        return self._put(np.zeros(shape.shape, shape.dtype), shape)

    def _put(self, array: np.ndarray, shape: jax.ShapeDtypeStruct) -> jax.Array:
        placed: jax.Array = jax.device_put(array, shape.sharding)
        return placed

    def _allowed(self, rows: int, allowed: Mapping[int, np.ndarray]) -> jax.Array:
        shape = self._shape((rows, words(self.vocabulary)), (None, None), np.uint32)
        if not allowed:
            if rows not in self._none_guided:
                self._none_guided[rows] = self._zeros(shape)
            return self._none_guided[rows]
        bits = np.zeros(shape.shape, np.uint32)
        for row, mine in allowed.items():
            bits[row] = mine
        return self._put(bits, shape)

    def _vision(self, size: int, rows: np.ndarray | None) -> jax.Array | np.ndarray:
        if rows is None:
            if size not in self._no_vision:
                self._no_vision[size] = self._zeros(self._shape((size, self.width), (None, None)))
            return self._no_vision[size]
        padded = np.zeros((size, self.width), self.dtype)
        padded[: len(rows)] = rows
        return self._put(padded, self._shape((size, self.width), (None, None)))


def _placed(weight: Any, where: Any) -> Any:
    """A weight, or its abstract form, at its place on a mesh."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=where)
    return jax.device_put(weight, where)


class _Store:
    """Compiled programs of one structure, and a lock for each that is being compiled."""

    def __init__(self) -> None:
        self.programs: dict[Key, Any] = {}
        self._locks: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    def lock(self, key: Key) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(key, threading.Lock())


@functools.lru_cache(maxsize=8)
def _store(structure: Structure) -> _Store:
    return _Store()
