"""`kangaroo plan`: what a stage needs on chips before they are rented.

It compiles the real train step for a TPU slice, or for GPUs, on this machine and prints memory, work, traffic, time
and cost. GPUs are estimated by formula where their compiler is not installed. If the stage does not fit, it names the
nearest change that does and exits with code 3.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kangaroo_jax.chips import CHIPS, Slices, parse_topology
from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.planning import formula as plan_formula
from kangaroo_jax.planning import report
from kangaroo_jax.planning.compile import Compiled, compile_step, topology_devices, why_not
from kangaroo_jax.planning.feeding import FRAMES_A_CPU, feeding
from kangaroo_jax.planning.here import devices_here
from kangaroo_jax.planning.packing import Packed, packed
from kangaroo_jax.planning.profile import measured
from kangaroo_jax.planning.report import Plan
from kangaroo_jax.sharding import MESH_AXES
from kangaroo_jax.system.progress import Tell, silent
from kangaroo_jax.training.flops import step_flops
from kangaroo_jax.training.placement import resolve

DOES_NOT_FIT = 3  # exit code
SEARCHED = 4  # the most candidates that --search compiles


def make_plan(
    config: StageConfig,
    target: Slices,
    *,
    mfu: float,
    price: float | None = None,
    cache: Path | None = None,
    frames_a_cpu: float = FRAMES_A_CPU,
) -> Plan:
    """The plan of a stage's config on `target`: compiled, or by formula for a GPU whose compiler is not here.

    Args:
        config: a stage's config; `training.placement` decides what it leaves open.
        target: the chips.
        mfu: assumed model FLOPs utilisation, causal convention, for time and cost.
        price: the price of a chip for an hour, in any currency.
        cache: the folder for results of compilations.
        frames_a_cpu: frames that a CPU decodes in a second.

    Raises UserError where the config does not fit the number of chips, or libtpu is missing.
    """
    config = resolve(config, target.chip, target.devices, target.slices)
    counts = count_parameters(config.model)
    rows = packed(config, config.train.mesh[2])
    reason = why_not(target.chip)
    compiled = None if reason else compile_step(config, target, cache, rows.visited)
    flops = step_flops(config)
    seconds = flops.causal / (target.devices * target.chip.tflops * 1e12 * mfu)
    hours = seconds * config.train.steps * target.devices / 3600
    estimate = plan_formula.peak_gib(config, counts)
    state = plan_formula.weights_and_state(config, counts)[0] / (target.devices / config.train.mesh[0]) / (1 << 30)
    return Plan(
        stage=config.stage,
        topology=str(target),
        tokens_per_pack=config.data.tokens_per_pack,
        frames_per_pack=config.data.frames_per_pack,
        source="compiled" if compiled else "formula",
        fits=compiled.fits if compiled else estimate <= target.chip.gib,
        peak_hbm_gib=compiled.peak_gib if compiled else estimate,
        capacity_gib=target.chip.gib,
        params_b=round(counts["total"] / 1e9, 3),
        params_per_device_gib=round(state, 2) if compiled is None or compiled.error else compiled.state_gib,
        useful_token_share=rows.useful,
        model_tflops_causal=round(flops.causal / 1e12, 1),
        model_tflops_full=round(flops.full / 1e12, 1),
        vit_share=round(flops.vision_share, 4),
        compiled_over_model_flops=over_model(compiled, config, target),
        collectives_gib={k: round(v / (1 << 30), 3) for k, v in compiled.collectives.items()} if compiled else {},
        gathers_logits=compiled.gathers_logits if compiled else None,
        mfu=mfu,
        step_seconds=round(seconds, 3),
        steps=config.train.steps,
        chip_hours=round(hours, 1),
        cost=None if price is None else round(hours * price, 2),
        mesh=dict(zip(MESH_AXES, config.train.mesh, strict=True)),
        accumulate=config.train.accumulate,
        remat={"llm": config.model.llm.remat, "vision": config.model.vision.remat},
        **foretold(compiled, config, target, rows, price),
        compile_seconds=compiled.compile_seconds if compiled else None,
        compile_cpu_seconds=compiled.compile_cpu_seconds if compiled else None,
        kernels=compiled.kernels if compiled else [],
        not_compiled=reason,
        feeding=_feeding(
            config, target, (sum(compiled.seconds.values()) if compiled else 0) or seconds, rows.samples, frames_a_cpu
        ),
    )


def _feeding(
    config: StageConfig, target: Slices, seconds: float, samples: float, frames_a_cpu: float
) -> dict[str, Any]:
    """The fields of a `Feeding`; none for a stage without frames."""
    devices = topology_devices(target) if target.chip.platform == "tpu" else []
    found = feeding(config, target, devices, seconds, samples, frames_a_cpu)
    return dataclasses.asdict(found) if found else {}


def foretold(
    compiled: Compiled | None, config: StageConfig, target: Slices, rows: Packed, price: float | None
) -> dict[str, Any]:
    """What the compiled program says of time, as fields of a `Plan`."""
    if compiled is None or not compiled.seconds:
        return {}
    flops, seconds = step_flops(config), sum(compiled.seconds.values())
    peak = seconds * target.devices * target.chip.tflops * 1e12
    hours = seconds * config.train.steps * target.devices / 3600
    return {
        "foretold_seconds": round(seconds, 3),
        "foretold_mfu_causal": round(flops.causal / peak, 4),
        "foretold_mfu_full": round(flops.full / peak, 4),
        "foretold_mfu_pairs": round((flops.causal - flops.llm_attention_causal * (1 - rows.pairs)) / peak, 4),
        "foretold_chip_hours": round(hours, 1),
        "foretold_cost": None if price is None else round(hours * price, 2),
        "parts": {part: round(spent, 4) for part, spent in compiled.seconds.items()},
    }


def over_model(compiled: Compiled | None, config: StageConfig, target: Slices) -> float | None:
    """Compiled FLOPs of all devices over the model's, which include the scores that FlashAttention computes twice."""
    if compiled is None or not compiled.flops:
        return None
    flops = step_flops(config)
    return round(sum(compiled.flops.values()) * target.devices / (flops.causal + flops.score_recomputation), 4)


# ------------------------------------------------------------------------- changes and search


def nearest_change(
    config: StageConfig, target: Slices, plan: Plan, *, cache: Path | None = None, tell: Tell = print
) -> str:
    """The mildest change that makes a stage fit, compiled if there is a compiler; "" if none is known.

    Changes are tried by increasing cost: remat, tensor and context axes, bfloat16 moments, a larger slice.
    """
    counts = count_parameters(config.model)
    base = plan_formula.peak_gib(resolve(config, target.chip, target.devices, target.slices), counts)
    known = plan.peak_hbm_gib == plan.peak_hbm_gib  # not NaN
    correction = plan.peak_hbm_gib / base if known else 1.0  # corrects the formula by the compiler's result
    tried = 0
    for text, trial, slices in _changes(config, target):
        try:
            resolved = resolve(trial, slices.chip, slices.devices, slices.slices)
        except UserError:
            continue
        if plan_formula.peak_gib(resolved, counts) * max(correction, 1.0) > slices.chip.gib:
            continue
        if why_not(slices.chip):
            return text
        if tried == SEARCHED:
            break
        tried += 1
        tell(f"does not fit; compiling with {text}")
        if compile_step(resolved, slices, cache).fits:
            return text
    return ""


def _changes(config: StageConfig, target: Slices) -> Iterable[tuple[str, StageConfig, Slices]]:
    """(description of a change, changed config, chips), mildest first."""
    slices, inner = target.slices, target.devices // target.slices
    changes: list[dict[str, Any]] = []
    if config.model.llm.remat not in ("auto", "full"):
        changes.append({"model.llm.remat": "full", "model.vision.remat": "full"})
    for context, tensor in ((1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 4), (1, 8), (8, 1), (8, 4), (16, 4)):
        if inner % (context * tensor) == 0:
            changes.append({"train.mesh": (slices, inner // (context * tensor), context, tensor)})
    for change in [*changes, *({**change, "optimizer.moment_dtype": "bfloat16"} for change in changes)]:
        least = {"model.llm.remat": "full", "model.vision.remat": "full", "train.accumulate": 0}
        trial = config.changed({**least, **change})
        yield " ".join(f"--config.{key}={_flag(value)}" for key, value in change.items()), trial, target
    for size in _larger(target.topology) if target.chip.name in CHIPS else ():  # of a machine's CPU there is one size
        larger = parse_topology(f"{target.chip.name}:{size}", slices)
        yield f"--topology={target.chip.name}:{size}", config, larger


def _flag(value: Any) -> str:
    return str(value).replace(" ", "")


def _larger(topology: str) -> list[str]:
    """The next larger topologies, each with twice the chips."""
    sizes, found = [int(part) for part in topology.split("x")], []
    for _ in range(3):
        sizes[sizes.index(min(sizes))] *= 2
        found.append("x".join(map(str, sorted(sizes))))
    return found


def search(
    config: StageConfig, target: Slices, *, mfu: float, tell: Tell, **options: Any
) -> tuple[Plan, StageConfig] | None:
    """The plan foretold fastest that fits, among the meshes and remat policies fastest by formula, if any.

    `options` are others of `make_plan`.
    """
    counts = count_parameters(config.model)
    found: list[tuple[float, Plan, StageConfig]] = []
    for number, trial in enumerate(plan_formula.candidates(config, target, counts, mfu)):
        if number == SEARCHED:
            break
        plan = make_plan(trial, target, mfu=mfu, **options)
        by_formula = plan_formula.step_seconds(trial, target.chip, counts, mfu)
        seconds = by_formula if plan.foretold_seconds is None else plan.foretold_seconds
        shape, remat = tuple(plan.mesh.values()), plan.remat["llm"]
        verdict = "fits" if plan.fits else "does not fit"
        tell(f"mesh {shape} remat {remat}: {verdict}, {plan.peak_hbm_gib} GiB, about {seconds:.2f} s a step")
        if plan.fits:
            found.append((seconds, plan, trial))
    return min(found, key=lambda one: one[0])[1:] if found else None


# ------------------------------------------------------------------------------------ output


def run(
    configs: list[StageConfig],
    topology: str,
    *,
    slices: int = 1,
    mfu: float = 0.45,
    price: float | None = None,
    as_json: bool = False,
    do_search: bool = False,
    cache: Path | None = None,
    frames_a_cpu: float = FRAMES_A_CPU,
    profile_of: Path | None = None,
    tell: Tell = print,
) -> int:
    """Plan every config on `topology` and print, beside what the profile `profile_of` has measured, if given.

    Returns 0, or DOES_NOT_FIT if one does not fit. Raises UserError.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu}: a share between 0 and 1")
    target = devices_here() if topology == "here" else parse_topology(topology, slices)
    note: Tell = silent if as_json else tell
    found_by = dataclasses.asdict(measured(profile_of, target.chip)) if profile_of else {}
    plans = []
    for config in configs:
        note(f"{config.stage} on {target} ...")
        options: dict[str, Any] = dict(mfu=mfu, price=price, cache=cache, frames_a_cpu=frames_a_cpu)
        if do_search and (found := search(config, target, tell=note, **options)):
            plan = found[0]
        else:
            plan = make_plan(config, target, **options)
        if not plan.fits:
            change = nearest_change(config, target, plan, cache=cache, tell=note)
            larger = "slice" if target.chip.name in CHIPS else "machine"
            plan = dataclasses.replace(plan, nearest_change=change or f"none found: choose a larger {larger}")
        plan = dataclasses.replace(plan, measured=found_by)
        plans.append(plan)
        note(report.text(plan) if len(configs) == 1 else f"  {report.line(plan)}")
    if as_json:
        plain = [dataclasses.asdict(plan) for plan in plans]
        tell(json.dumps(plain[0] if len(plain) == 1 else {"stages": plain, **report.total(plans)}))
    elif len(plans) > 1:
        tell(report.table(plans, with_sum=True))
    return 0 if all(plan.fits for plan in plans) else DOES_NOT_FIT
