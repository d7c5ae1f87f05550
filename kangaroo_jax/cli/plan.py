"""`kangaroo plan`."""

from pathlib import Path
from typing import Any

from kangaroo_jax.cli.arguments import Count, Natural, Number, NumberOrNone, Overrides, Positive, require
from kangaroo_jax.errors import UserError


def plan(
    *,
    config: str = "",
    topology: str = "",
    mode: str = "train",
    slices: Count = 1,
    curriculum: bool = False,
    search: bool = False,
    price_per_chip_hour: NumberOrNone = None,
    mfu: Number = 0.45,
    frames_a_cpu: Positive = 15.0,
    json: bool = False,
    cache: str = "",
    table: str = "",
    parts: bool = False,
    before: str = "",
    profile_of: str = "",
    quantize: str | None = None,
    kv_dtype: str | None = None,
    slots: Count | None = None,
    frames: Natural | None = None,
    overrides: Overrides = (),
) -> None:
    """What a stage, or a chat with the model, needs on chips not rented yet: memory, time, cost.

        kangaroo plan --config=stage5_long_video:kangaroo_8b --topology=v5e:4x8 --price-per-chip-hour=1.2
        kangaroo plan --config=stage4_instruct:kangaroo_8b --topology=v6e:1x1 --config.lora.rank=16
        kangaroo plan --mode=chat --config=stage5_long_video:kangaroo_8b --topology=v5e:1x1 --quantize=int8 --frames=160

    Every key of the config is a flag, --config.KEY=VALUE. Exit code 3: it does not fit.

    Args:
        config: FILE[:PRESET], such as configs/stage5_long_video.py:kangaroo_8b
        topology: chips: v5e:4x8, v5p:2x2x4, v6e:1x1, H100:8, ..., or here: the devices of this machine
        mode: train, a stage; chat, the engine that answers; kernels, lines of the table of attention kernels
        slices: slices (or nodes) of that size, joined by a slower network
        curriculum: all five stages of kangaroo_8b and their sum, without --config
        search: compile several meshes and remat policies, print the one foretold fastest that fits
        price_per_chip_hour: price in any currency
        mfu: assumed utilisation (causal attention counted), for time and cost
        frames_a_cpu: frames that a CPU of a host decodes in a second, as kangaroo bench batches measures them
        json: print JSON
        cache: folder for results, so that the same step is compiled only once
        table: only print a file of --json lines as a Markdown table
        parts: with --table, what the parts of a step are foretold to take
        before: with --parts, a file of earlier lines: each stage and slice of both files that differ, before and after
        profile_of: an .xplane.pb, or its folder, of the stage: what it measured beside what is foretold
        quantize: with --mode=chat, int8 or int4: the decoder's weights
        kv_dtype: with --mode=chat, int8: keys and values
        slots: with --mode=chat, conversations at the same time; 1
        frames: with --mode=chat, frames of the video of a conversation; 0 or nothing: as many tokens as in training
    """
    from kangaroo_jax.planning.compile import prepare_environment

    if table:
        from kangaroo_jax.planning.report import table_of_file

        if before and not parts:
            raise UserError("--before goes with --table=FILE --parts alone")
        print(table_of_file(_here_or_in_clone(table), parts, _here_or_in_clone(before) if before else None))
        return
    if parts or before:
        raise UserError(f"--{'parts' if parts else 'before'} goes with --table=FILE alone")
    require("plan", plan, topology=topology, config="all" if curriculum or mode == "kernels" else config)
    of_chat = {"quantize": quantize, "kv-dtype": kv_dtype, "slots": slots, "frames": frames}
    of_train = {"curriculum": curriculum, "search": search, "price-per-chip-hour": price_per_chip_hour}
    _check_mode(mode, of_chat, {**of_train, "profile-of": profile_of})
    if profile_of and curriculum:
        raise UserError("--profile-of is of one stage: it goes with --config, not with --curriculum")
    prepare_environment()  # must come before anything imports JAX

    from kangaroo_jax.cli.overrides import stage_of
    from kangaroo_jax.config import STAGES
    from kangaroo_jax.planning.plan import run

    kept = Path(cache) if cache else None
    if mode == "kernels":
        from kangaroo_jax.planning.kernel_table import run_kernels

        run_kernels(topology)
        return
    if mode == "chat":
        from kangaroo_jax.planning.chat import run_chat
        from kangaroo_jax.planning.chat_work import Talk

        talk = Talk(stage_of("plan", config, overrides), quantize, kv_dtype, slots or 1, frames or 0)
        if code := run_chat(talk, topology, slices=slices, as_json=json, cache=kept):
            raise SystemExit(code)
        return
    specs = [f"{name}:kangaroo_8b" for name in STAGES] if curriculum else [config]
    code = run(
        [stage_of("plan", spec, overrides) for spec in specs],
        topology,
        slices=slices,
        mfu=mfu,
        frames_a_cpu=frames_a_cpu,
        price=price_per_chip_hour,
        as_json=json,
        do_search=search,
        cache=kept,
        profile_of=Path(profile_of) if profile_of else None,
    )
    if code:
        raise SystemExit(code)


def _here_or_in_clone(name: str) -> Path:
    """A file, or the clone's where there is none of that name here."""
    from kangaroo_jax.config_files import config_folder

    of_clone = config_folder().parent / name
    return of_clone if not Path(name).exists() and of_clone.is_file() else Path(name)


def _check_mode(mode: str, of_chat: dict[str, Any], of_train: dict[str, Any]) -> None:
    """Raise UserError for a mode that is none, and for a flag of the other one."""
    others = {"train": of_chat, "chat": of_train, "kernels": {**of_chat, **of_train}}
    if mode not in others:
        raise UserError(f"--mode={mode}: train, chat or kernels")
    for name, value in others[mode].items():
        if value:
            raise UserError(f"--{name} does not go with --mode={mode}")


COMMANDS = {"": plan}
