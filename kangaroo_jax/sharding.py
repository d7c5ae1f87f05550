"""Meshes and the table from logical axes to mesh axes. The only file that names mesh axes."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Weights carry logical names (`nnx.Param(..., axes=(...))`), activations
# are constrained by them; a name that is not here is an error, not a silent replication.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
    "frames": ("data", "fsdp", "context", "tensor"),  # batch and frames flattened: the ViT is never replicated
    "activation": None,
    "activation_heads": "tensor",
    "activation_kv_heads": "tensor",
    "activation_mlp": "tensor",
    "activation_vocab": "tensor",
    # weights
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "patch": None,
    "norm": None,
}


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh (data, fsdp, context, tensor) over `devices`; at most one -1 takes what is left.

    Raises ValueError where the shape does not fit the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = list(shape)
    if len(sizes) != len(MESH_AXES):
        raise ValueError(f"mesh {tuple(shape)}: needs one size for each of {MESH_AXES}")
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh {tuple(shape)}: at most one size may be -1")
    if -1 in sizes:
        rest = -int(np.prod(sizes))
        if rest == 0 or len(devices) % rest:
            raise ValueError(f"mesh {tuple(shape)}: {len(devices)} devices do not divide by {rest}")
        sizes[sizes.index(-1)] = len(devices) // rest
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh {tuple(shape)}: {int(np.prod(sizes))} places for {len(devices)} devices")
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of logical `axes`; None is an unsharded dimension. Raises KeyError for an unknown name."""
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        names = RULES[axis] if axis is not None else None
        names = (names,) if isinstance(names, str) else (names or ())
        free = tuple(name for name in names if name not in used)
        used.update(free)
        entries.append(free if len(free) > 1 else free[0] if free else None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The NamedSharding of logical `axes` on `mesh`."""
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrain an activation to logical `axes` inside jit; nothing happens where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))
