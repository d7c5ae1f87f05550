"""`kangaroo plan`."""

from pathlib import Path

from kangaroo_jax.cli.arguments import Count, Number, NumberOrNone, Overrides, require


def plan(
    *,
    config: str = "",
    topology: str = "",
    slices: Count = 1,
    curriculum: bool = False,
    search: bool = False,
    price_per_chip_hour: NumberOrNone = None,
    mfu: Number = 0.45,
    json: bool = False,
    cache: str = "",
    table: str = "",
    overrides: Overrides = (),
) -> None:
    """What a stage needs on chips not rented yet: memory, time, cost.

        kangaroo plan --config=stage5_long_video:kangaroo_8b --topology=v5e:4x8 --price-per-chip-hour=1.2

    Every key of the config is a flag, --config.KEY=VALUE. Exit code 3: it does not fit.

    Args:
        config: FILE[:PRESET], such as configs/stage5_long_video.py:kangaroo_8b
        topology: chips: v5e:4x8, v5p:2x2x4, v6e:4x8, H100:8, ...
        slices: slices (or nodes) of that size, joined by a slower network
        curriculum: all five stages of kangaroo_8b and their sum, without --config
        search: compile several meshes and remat policies, print the best that fits
        price_per_chip_hour: price in any currency
        mfu: assumed utilisation (causal attention counted), for time and cost
        json: print JSON
        cache: folder for results, so that the same step is compiled only once
        table: only print a file of --json lines as a Markdown table
    """
    from kangaroo_jax.config_files import config_folder
    from kangaroo_jax.planning.compile import prepare_environment

    if table:
        from kangaroo_jax.planning.plan import table_of_file

        file = Path(table)
        if not file.exists() and (of_clone := config_folder().parent / file).is_file():
            file = of_clone
        print(table_of_file(file))
        return
    require("plan", plan, topology=topology, config="all" if curriculum else config)
    prepare_environment()  # must come before anything imports JAX

    from kangaroo_jax.cli.overrides import config_of
    from kangaroo_jax.config import STAGES
    from kangaroo_jax.planning.plan import run

    specs = [f"{name}:kangaroo_8b" for name in STAGES] if curriculum else [config]
    code = run(
        [config_of("plan", spec, overrides) for spec in specs],
        topology,
        slices=slices,
        mfu=mfu,
        price=price_per_chip_hour,
        as_json=json,
        do_search=search,
        cache=Path(cache) if cache else None,
    )
    if code:
        raise SystemExit(code)


COMMANDS = {"": plan}
