"""Meshes and the table from logical axes to mesh axes. The only file that names mesh axes.

The models say what a dimension *is* ("batch", "heads"); RULES says over which mesh axes it is cut. What
the compiler cannot be trusted to cut by itself (attention kernels, the loss, the embedding) runs in
`per_device`, where a function sees the piece of one device and talks to the others by logical axis.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from kangaroo_jax.chips import find_chip
from kangaroo_jax.conventions import FIELDS, PackedBatch
from kangaroo_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "context", "tensor")
Axes = Sequence[str | None]

# Logical axis -> mesh axes. Weights carry logical names (`nnx.Param(..., axes=(...))`), activations
# are constrained by them; a name that is not here is an error, not a silent replication.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "residual_tokens": ("context", "tensor"),  # between the layers' matrix products (Korthikanti et al. 2022)
    "token_parts": "tensor",  # what cuts residual_tokens finer than tokens
    "frames": ("data", "fsdp", "context", "tensor"),  # batch and frames flattened: the ViT is never replicated
    "pack_frames": ("context", "tensor"),  # of one pack, as they come: with batch they are "frames"
    "activation": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_vocab": "tensor",
    # weights
    "layers": None,
    "embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "vision_embed": ("fsdp", "context", "tensor"),  # gathered where used: its work is cut by frames alone
    "vision_heads": None,
    "vision_mlp": None,
    "patch": None,
    "norm": None,
    "replicas": "data",  # devices that hold the same weights of the decoder
}

# Logical axes that are cut to keep weights in pieces, not to share the work: joined where a weight is used.
STORAGE = ("embed", "vision_embed")


_APART: ContextVar[tuple[str, ...]] = ContextVar("mesh axes whose devices compute apart", default=())


# ------------------------------------------------------------------------------------ meshes


def mesh_sizes(shape: Sequence[int], devices: int) -> tuple[int, int, int, int]:
    """`shape` (data, fsdp, context, tensor) with its -1, if any, replaced by what is left of `devices`.

    Raises UserError where the shape does not fit the number of devices.
    """
    sizes = list(shape)
    if len(sizes) != len(MESH_AXES):
        raise UserError(f"mesh {tuple(shape)}: needs one size for each of {MESH_AXES}")
    if sizes.count(-1) > 1:
        raise UserError(f"mesh {tuple(shape)}: at most one size may be -1")
    if -1 in sizes:
        rest = -math.prod(sizes)
        if rest <= 0 or devices % rest:
            raise UserError(f"mesh {tuple(shape)}: {devices} devices do not divide by {rest}")
        sizes[sizes.index(-1)] = devices // rest
    if math.prod(sizes) != devices:
        raise UserError(f"mesh {tuple(shape)}: its axes need {math.prod(sizes)} devices, there are {devices}")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def make_mesh(shape: Sequence[int], devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh (data, fsdp, context, tensor) over `devices`; at most one -1 takes what is left.

    Neighbours on the mesh are neighbours on the chips' network, and as few hosts as possible have the same rows. The
    data axis runs over the slower network between several slices, so that it must be a multiple of their number.

    Raises UserError where the shape does not fit the devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = mesh_sizes(shape, len(devices))
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)
    return Mesh(arranged(sizes, devices), MESH_AXES)


def arranged(sizes: tuple[int, int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """TPUs as a mesh, as `make_mesh` says; they need `coords`, `core_on_chip`, `process_index` and a kind alone."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    if sizes[0] % len(slices):
        raise UserError(f"mesh {sizes}: its data axis must be a multiple of the {len(slices)} slices")
    inner = (sizes[0] // len(slices), *sizes[1:])
    return np.concatenate([_on_a_slice(inner, slices[index]) for index in sorted(slices)])


def groups_of_rows(grid: np.ndarray) -> list[np.ndarray]:
    """The devices of each group of rows, of a mesh's devices by its axes; they have its frames in their order."""
    return list(grid.reshape(-1, *grid.shape[2:]))


def hosts_of_rows(grid: np.ndarray) -> list[set[int]]:
    """The hosts (`process_index`) that have a device of each group of rows, of a mesh's devices by its axes."""
    return [{device.process_index for device in group.flat} for group in groups_of_rows(grid)]


def frames_cut(sizes: Sequence[int], rows: int, frames: int) -> int:
    """Into how many pieces the frames of a row are cut on a mesh of these sizes; neighbours may have the same piece."""
    by_name = dict(zip(MESH_AXES, sizes, strict=True))
    names = spec(FIELDS["frames"].axes[:2], (rows, frames), by_name)[1] or ()
    return math.prod(by_name[name] for name in ((names,) if isinstance(names, str) else names))


def _on_a_slice(sizes: tuple[int, int, int, int], devices: list[Any]) -> np.ndarray:
    """A slice's devices as a mesh in which no more hosts than necessary have the same rows: each of them reads them."""
    grid: np.ndarray = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    hosts: dict[int, list[Any]] = {}
    for device in devices:
        hosts.setdefault(device.process_index, []).append(device)
    here, group = len(devices) // len(hosts), sizes[2] * sizes[3]
    if group % here or max(map(len, hosts_of_rows(grid))) <= group // here:
        return grid
    # A host's devices in a ring are the last of the tensor axis, then of the context axis; hosts are a mesh themselves.
    tensor = math.gcd(sizes[3], here)
    context = here // tensor
    if sizes[2] % context:
        return grid
    machines = [_Machine(devices) for devices in hosts.values()]
    outer = (sizes[0], sizes[1], sizes[2] // context, sizes[3] // tensor)
    places = mesh_utils.create_device_mesh(outer, machines, allow_split_physical_axes=True)
    rings = np.array([machine.ring for machine in places.flat], dtype=object)
    pieces = rings.reshape(*outer, context, tensor).transpose(0, 1, 2, 4, 3, 5)
    return pieces.reshape(sizes)


class _Machine:
    """A host as one device on the network of a slice, as JAX's `mesh_utils` looks at devices."""

    platform, core_on_chip = "tpu", 0

    def __init__(self, devices: list[Any]) -> None:
        first = np.min([device.coords for device in devices], 0)
        size = np.max([device.coords for device in devices], 0) - first + 1
        self.coords, self.device_kind = tuple(int(place) for place in first // size), devices[0].device_kind
        self.process_index = devices[0].process_index

        def along(device: Any) -> tuple[int, ...]:
            x, y, *others = device.coords
            return (*others, x, -y if x % 2 else y, device.core_on_chip)

        self.ring = sorted(devices, key=along)


def split_mesh() -> Any:
    """The mesh that activations are cut over here, None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what is compiled for."""
    name: str = _device().platform
    return name


def device_kind() -> str:
    """JAX's name of what is compiled for, such as "TPU v5 lite"."""
    kind: str = _device().device_kind
    return kind


def compute_capability() -> float:
    """CUDA's compute capability of the GPU that is compiled for, 0 where it is none.

    A mesh names its devices' kind alone, so that only GPUs that are here, and those of `chips.CHIPS`, are known.
    """
    device = _device()
    if device.platform != "gpu":
        return 0.0
    chip = find_chip(device.device_kind)
    return chip.capability if chip else float(getattr(jax.devices()[0], "compute_capability", 0))


def _device() -> Any:
    """A device of the mesh if one is set, else the first device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.devices()[0] if device is None else device


# ------------------------------------------------------------------------------ logical axes


def batch_axes() -> PackedBatch:
    """The logical axes of each field of a batch, with a tuple in place of each array."""
    return PackedBatch(**{name: field.axes for name, field in FIELDS.items()})


def mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis that devices share here (see `apart`). Raises KeyError for an unknown name."""
    names = RULES[axis] if axis is not None else None
    names = (names,) if isinstance(names, str) else (names or ())
    return tuple(name for name in names if name not in _APART.get())


def spec(axes: Axes, shape: Sequence[int] | None = None, sizes: dict[str, int] | None = None) -> PartitionSpec:
    """The PartitionSpec of logical `axes`; None is an unsharded dimension. Raises KeyError for an unknown name.

    Given the array's `shape` and the mesh's `sizes`, a dimension is not cut over mesh axes (the last of its
    own first) whose sizes do not divide it.
    """
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for dimension, axis in enumerate(axes):
        free = [name for name in mesh_axes(axis) if name not in used]
        if shape is not None and sizes is not None:
            while free and shape[dimension] % math.prod(sizes[name] for name in free):
                free.pop()
        used.update(free)
        entries.append(tuple(free) if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int] | None = None) -> NamedSharding:
    """The NamedSharding of logical `axes` on `mesh`; with `shape`, only where it divides."""
    return NamedSharding(mesh, spec(axes, shape, dict(mesh.shape)))


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Constrain an activation to logical `axes` inside jit; nothing happens where no mesh is set."""
    mesh = split_mesh()
    if mesh is None:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec(axes, x.shape, dict(mesh.shape)))
    return constrained


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def joined(weight: jax.Array, axes: Axes) -> jax.Array:
    """A weight of logical `axes` as it is used: its STORAGE axes whole. Its gradient is cut again.

    Left to itself the compiler joined all tokens of a row on every device instead, where a context axis cuts them;
    where only fsdp and tensor axes cut anything, it joins the weights by itself.
    """
    return constrain(weight, tuple(None if axis in STORAGE else axis for axis in axes))


def _joined_forward(weight: jax.Array, axes: Axes) -> tuple[jax.Array, None]:
    return joined(weight, axes), None


def _joined_backward(axes: Axes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, axes),)


joined.defvjp(_joined_forward, _joined_backward)


def shards(axis: str | None) -> int:
    """Into how many pieces a logical axis is cut here; 1 for None."""
    mesh = split_mesh()
    return 1 if mesh is None or axis is None else math.prod(mesh.shape[name] for name in mesh_axes(axis))


def divides(shape: Sequence[int], axes: Axes) -> bool:
    """Whether every dimension of `shape` can be cut as its logical axis says."""
    return all(size % shards(axis) == 0 for size, axis in zip(shape, axes, strict=True))


def fitting(shape: Sequence[int], axes: Axes) -> tuple[str | None, ...]:
    """`axes`, with None for each that does not divide its dimension: those stay whole."""
    return tuple(None if size % shards(axis) else axis for size, axis in zip(shape, axes, strict=True))


# --------------------------------------------------------- functions that see one device's piece


def per_device(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """`function` on the pieces that each device holds, whose dimensions have logical axes.

    `in_axes` and `out_axes` are trees of tuples of logical axes, one for each array; every dimension must
    divide. Without a mesh it is the function itself, since the only piece is the whole.
    """
    if split_mesh() is None:
        return function
    specs = [_specs(axes) for axes in (in_axes, out_axes)]
    free = set(MESH_AXES) - set(_APART.get())
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], axis_names=free, check_vma=False)


def apart(function: Callable[..., Any], axis: str, in_axes: Any) -> Callable[..., Any]:
    """`function` run by each of the groups that a logical axis cuts the devices into, on its piece of the arrays.

    `in_axes` as of `per_device`; of them only what `axis` cuts is cut for the groups. The results are summed over the
    groups, once: inside nothing crosses from one to another. Where there is one group it is the function itself.
    """
    names = mesh_axes(axis)
    if shards(axis) == 1:
        return function

    def run(*arrays: Any) -> Any:
        kept = _APART.set((*_APART.get(), *names))
        try:
            return jax.tree.map(lambda x: jax.lax.psum(x, names), function(*arrays))
        finally:
            _APART.reset(kept)

    cut = {name: tuple(one for one in mesh_axes(name) if one in names) for name in RULES}
    specs = _specs(in_axes, lambda axes: PartitionSpec(*(cut[one] or None if one else None for one in axes)))
    return jax.shard_map(run, in_specs=specs, out_specs=PartitionSpec(), axis_names=set(names), check_vma=False)


def _specs(axes: Any, of: Callable[[Axes], PartitionSpec] = spec) -> Any:
    """A tree of tuples of logical axes, with the PartitionSpec of each."""
    is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)  # noqa: E731
    return jax.tree.map(of, axes, is_leaf=is_axes)


def index_on(axis: str | None) -> jax.Array:
    """int32[]: which piece of a logical axis this device has. Only in `per_device`."""
    return jax.lax.axis_index(mesh_axes(axis))


def sum_over(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over the devices that a logical axis is cut over. In `per_device`; elsewhere x."""
    return jax.lax.psum(x, mesh_axes(axis)) if shards(axis) > 1 else x


def max_over(x: jax.Array, axis: str | None) -> jax.Array:
    """The largest over the devices that a logical axis is cut over. In `per_device`; elsewhere x."""
    return jax.lax.pmax(x, mesh_axes(axis)) if shards(axis) > 1 else x


def gather(x: jax.Array, axis: str | None, dimension: int) -> jax.Array:
    """The pieces of `dimension`, cut over a logical axis, joined. In `per_device`; elsewhere x.

    Where nothing stands before `dimension` the pieces are joined as a dimension of their own: the gradient of that,
    like `sum_scatter`, stays a reduce-scatter, which libtpu made an all-reduce of whole rows of otherwise.
    """
    if shards(axis) == 1:
        return x
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    if math.prod(before) == 1:
        pieces: jax.Array = jax.lax.all_gather(x.reshape(x.shape[dimension:]), mesh_axes(axis), axis=0)
        return pieces.reshape(*before, -1, *after)
    whole: jax.Array = jax.lax.all_gather(x, mesh_axes(axis), axis=dimension, tiled=True)
    return whole


def sum_scatter(x: jax.Array, axis: str | None, dimension: int) -> jax.Array:
    """The sum over devices, of which each keeps its piece of `dimension`: the inverse of `gather`."""
    if shards(axis) == 1:
        return x
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    if math.prod(before) == 1:
        pieces = x.reshape(shards(axis), -1, *after)
        piece: jax.Array = jax.lax.psum_scatter(pieces, mesh_axes(axis), scatter_dimension=0)
        return piece.reshape(*before, *piece.shape)
    piece = jax.lax.psum_scatter(x, mesh_axes(axis), scatter_dimension=dimension, tiled=True)
    return piece


def exchange(x: jax.Array, axis: str | None, *, split: int, join: int) -> jax.Array:
    """All-to-all: dimension `split` is cut over a logical axis instead of dimension `join`, which becomes whole."""
    return x if shards(axis) == 1 else jax.lax.all_to_all(x, mesh_axes(axis), split, join, tiled=True)


def permute(x: jax.Array, axis: str, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Send x from the first piece's device to the second's, for each pair."""
    received: jax.Array = jax.lax.ppermute(x, mesh_axes(axis), pairs)
    return received


@contextlib.contextmanager
def mesh_scope(mesh: Mesh) -> Iterator[None]:
    """Activations are constrained over `mesh` inside; on one device there is nothing to constrain."""
    if mesh.size == 1:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def mesh_text(mesh: Mesh) -> str:
    """`1 cpu device` or the mesh's sizes."""
    kind = mesh.devices.flat[0].platform
    if mesh.size == 1:
        return f"1 {kind} device"
    return f"{mesh.size} {kind} devices, " + ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
