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

from kangaroo_jax.chips import Slices, parse_topology
from kangaroo_jax.config import StageConfig
from kangaroo_jax.errors import UserError
from kangaroo_jax.models.kangaroo import count_parameters
from kangaroo_jax.planning import chat, cycles, gpu
from kangaroo_jax.planning import formula as plan_formula
from kangaroo_jax.planning.compile import Compiled, compile_step, topology_devices, why_not
from kangaroo_jax.planning.feeding import Feeding, feeding
from kangaroo_jax.planning.here import devices_here
from kangaroo_jax.planning.packing import Packed, packed
from kangaroo_jax.planning.profile import Measured, compared, measured
from kangaroo_jax.sharding import MESH_AXES
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.flops import step_flops
from kangaroo_jax.training.placement import resolve

DOES_NOT_FIT = 3  # exit code
SEARCHED = 4  # the most candidates that --search compiles


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage on a slice."""

    stage: str
    topology: str
    tokens_per_pack: int
    frames_per_pack: int
    source: str  # "compiled", or "formula" if there is no compiler for the chip: see `not_compiled`
    fits: bool
    peak_hbm_gib: float
    capacity_gib: float
    params_b: float  # billions
    params_per_device_gib: float  # weights, optimiser state and batch
    useful_token_share: float
    model_tflops_causal: float  # TFLOP of a step, whole batch
    model_tflops_full: float
    vit_share: float
    compiled_over_model_flops: float | None
    collectives_gib: dict[str, float]  # GiB for each device and step, by kind
    gathers_logits: bool | None
    mfu: float
    step_seconds: float
    steps: int
    chip_hours: float
    cost: float | None
    mesh: dict[str, int]
    accumulate: int
    remat: dict[str, str]
    compile_seconds: float | None
    compile_cpu_seconds: float | None  # CPU time of all threads
    nearest_change: str = ""
    foretold_seconds: float | None = None  # of a step, by the compiled program
    foretold_mfu_causal: float | None = None
    foretold_mfu_full: float | None = None
    foretold_mfu_pairs: float | None = None  # attention counted over pairs of one sample
    foretold_chip_hours: float | None = None
    foretold_cost: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)  # of foretold_seconds, see `cycles.PARTS`
    kernels: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # our own on GPUs, see `gpu.Kernel`
    not_compiled: str = ""  # why, and how to change that
    feeding: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a host must decode, see `Feeding`
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)  # by a profile, see `profile.Measured`


def make_plan(
    config: StageConfig, target: Slices, *, mfu: float, price: float | None = None, cache: Path | None = None
) -> Plan:
    """The plan of a stage's config on `target`: compiled, or by formula for a GPU whose compiler is not here.

    Args:
        config: a stage's config; `training.placement` decides what it leaves open.
        target: the chips.
        mfu: assumed model FLOPs utilisation, causal convention, for time and cost.
        price: the price of a chip for an hour, in any currency.
        cache: the folder for results of compilations.

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
        feeding=_feeding(config, target, sum(compiled.seconds.values()) if compiled else 0.0, seconds, rows.samples),
    )


def _feeding(config: StageConfig, target: Slices, foretold: float, assumed: float, samples: float) -> dict[str, Any]:
    """The fields of a `Feeding` at a step's foretold or else its assumed time; none for a stage without frames."""
    devices = topology_devices(target) if target.chip.platform == "tpu" else []
    found = feeding(config, target, devices, foretold or assumed, samples)
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
    for size in _larger(target.topology):
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
    config: StageConfig, target: Slices, *, mfu: float, price: float | None, cache: Path | None, tell: Tell
) -> tuple[Plan, StageConfig] | None:
    """The plan foretold fastest that fits, among the meshes and remat policies fastest by formula, if any."""
    counts = count_parameters(config.model)
    found: list[tuple[float, Plan, StageConfig]] = []
    for number, trial in enumerate(plan_formula.candidates(config, target, counts, mfu)):
        if number == SEARCHED:
            break
        plan = make_plan(trial, target, mfu=mfu, price=price, cache=cache)
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
    profile_of: Path | None = None,
    tell: Tell = print,
) -> int:
    """Plan every config on `topology` and print, beside what the profile `profile_of` has measured, if given.

    Returns 0, or DOES_NOT_FIT if one does not fit. Raises UserError.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu}: a share between 0 and 1")
    target = devices_here() if topology == "here" else parse_topology(topology, slices)
    note: Tell = (lambda line: None) if as_json else tell
    found_by = dataclasses.asdict(measured(profile_of, target.chip)) if profile_of else {}
    plans = []
    for config in configs:
        note(f"{config.stage} on {target} ...")
        options: dict[str, Any] = dict(mfu=mfu, price=price, cache=cache)
        if do_search and (found := search(config, target, tell=note, **options)):
            plan = found[0]
        else:
            plan = make_plan(config, target, **options)
        if not plan.fits:
            change = nearest_change(config, target, plan, cache=cache, tell=note)
            plan = dataclasses.replace(plan, nearest_change=change or "none found: choose a larger slice")
        plan = dataclasses.replace(plan, measured=found_by)
        plans.append(plan)
        note(text(plan) if len(configs) == 1 else f"  {line(plan)}")
    if as_json:
        plain = [dataclasses.asdict(plan) for plan in plans]
        tell(json.dumps(plain[0] if len(plain) == 1 else {"stages": plain, **total(plans)}))
    elif len(plans) > 1:
        tell(table(plans, with_sum=True))
    return 0 if all(plan.fits for plan in plans) else DOES_NOT_FIT


def total(plans: list[Plan]) -> dict[str, Any]:
    """The sums of a curriculum."""
    cost = _sum(plans, "cost")
    hours = round(sum(plan.chip_hours for plan in plans), 1)
    foretold = {
        "foretold_chip_hours": _sum(plans, "foretold_chip_hours"),
        "foretold_cost": _sum(plans, "foretold_cost"),
    }
    return {"fits": all(plan.fits for plan in plans), "chip_hours": hours, "cost": cost, **foretold}


def _sum(plans: list[Plan], name: str) -> float | None:
    """The sum of a field, None where a plan has none."""
    values = [getattr(plan, name) for plan in plans]
    return None if None in values else round(sum(values), 2)


def text(plan: Plan) -> str:
    """A plan as text for the terminal."""
    verdict = "fits" if plan.fits else f"DOES NOT FIT; nearest change that does: {plan.nearest_change}"
    mesh = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    moved = ", ".join(f"{kind} {gib:,.1f}" for kind, gib in sorted(plan.collectives_gib.items()))
    ratio = (
        "" if plan.compiled_over_model_flops is None else f", compiled work {plan.compiled_over_model_flops:.3f} of it"
    )
    cost = "" if plan.cost is None else f", cost {plan.cost:,.0f}"
    rows = {
        "memory a device": f"{plan.peak_hbm_gib} of {plan.capacity_gib} GiB ({plan.source}): {verdict}",
        "weights, state, batch": f"{plan.params_per_device_gib} GiB a device; {plan.params_b} B parameters",
        "mesh": f"{mesh}; {plan.accumulate} parts a batch",
        "remat": f"llm {plan.remat['llm']}, vision {plan.remat['vision']}",
        "packing": f"{100 * plan.useful_token_share:.0f}% of the tokens hold a sample's token",
        "model work a step": f"{plan.model_tflops_causal:,} TFLOP causal, {plan.model_tflops_full:,} full{ratio}",
        "of it the ViT": f"{100 * plan.vit_share:.1f}%",
        "collectives, GiB": moved or "not known",
        f"at {100 * plan.mfu:.0f}% MFU": f"{plan.step_seconds} s a step, {plan.steps:,} steps, "
        f"{plan.chip_hours:,} chip-hours{cost}",
        **_foretold_rows(plan),
        **(compared(Measured(**plan.measured), plan.parts) if plan.measured else {}),
        **({"to decode": str(Feeding(**plan.feeding))} if plan.feeding else {}),
        **({"kernels": "; ".join(str(gpu.Kernel(**kernel)) for kernel in plan.kernels)} if plan.kernels else {}),
        "compiled in": f"{plan.compile_seconds} s"
        if plan.compile_seconds is not None
        else f"not compiled, by formula: {plan.not_compiled}",
    }
    return "\n".join([f"{plan.stage} on {plan.topology}", *(f"  {name:22} {value}" for name, value in rows.items())])


def _foretold_rows(plan: Plan) -> dict[str, str]:
    """Rows of what the compiled program says of time."""
    if plan.foretold_seconds is None:
        return {}
    cost = "" if plan.foretold_cost is None else f", cost {plan.foretold_cost:,.0f}"
    ways = {"causal": plan.foretold_mfu_causal, "full": plan.foretold_mfu_full, "own pairs": plan.foretold_mfu_pairs}
    shares_of_peak = ", ".join(f"{100 * share:.1f}% {way}" for way, share in ways.items() if share is not None)
    shares = {part.replace("_", " "): spent / plan.foretold_seconds for part, spent in plan.parts.items()}
    largest = sorted(((share, part) for part, share in shares.items() if share >= 0.005), reverse=True)
    return {
        "foretold": f"{plan.foretold_seconds} s a step, {plan.foretold_chip_hours:,} chip-hours{cost}; MFU "
        f"{shares_of_peak}",
        "of it": ", ".join(f"{part} {100 * share:.0f}%" for share, part in largest),
    }


def line(plan: Plan) -> str:
    """A plan on one line."""
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {plan.nearest_change}"
    return f"{plan.peak_hbm_gib} of {plan.capacity_gib} GiB, {verdict}, {plan.step_seconds} s a step"


def table(plans: list[Plan], *, with_sum: bool) -> str:
    """Plans as a Markdown table, with the cost only where it is known."""
    rows = []
    for plan in plans:
        ratio, seconds = plan.compiled_over_model_flops, plan.compile_seconds
        row = {
            "stage": plan.stage,
            "tokens, frames": f"{plan.tokens_per_pack:,}, {plan.frames_per_pack:,}",
            "slice": plan.topology,
            "mesh": "x".join(map(str, plan.mesh.values())),
            "remat": plan.remat["llm"],
            "GiB a device": f"{plan.peak_hbm_gib} of {plan.capacity_gib}",
            "fits": "yes" if plan.fits else "no",
            "compiled / model": "" if ratio is None else f"{ratio:.3f}",
            "s a step": f"{plan.step_seconds:.1f}",
            "chip-hours": f"{plan.chip_hours:,.0f}",
            "foretold s": "" if plan.foretold_seconds is None else f"{plan.foretold_seconds:.1f}",
            "foretold MFU": "" if plan.foretold_mfu_causal is None else f"{100 * plan.foretold_mfu_causal:.0f}%",
            "foretold chip-hours": "" if plan.foretold_chip_hours is None else f"{plan.foretold_chip_hours:,.0f}",
            "cost": "" if plan.cost is None else f"{plan.cost:,.0f}",
            "foretold cost": "" if plan.foretold_cost is None else f"{plan.foretold_cost:,.0f}",
            "compile s (CPU s)": "by formula" if seconds is None else f"{seconds:.0f} ({plan.compile_cpu_seconds:.0f})",
        }
        rows.append(row)
    names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    if with_sum:
        sums = total(plans)
        last = {"stage": "sum", "fits": "yes" if sums["fits"] else "no", "chip-hours": f"{sums['chip_hours']:,.0f}"}
        for name in ("cost", "foretold chip-hours", "foretold cost"):
            key = name.replace(" ", "_").replace("-", "_")
            last[name] = "" if sums[key] is None else f"{sums[key]:,.0f}"
        rows.append(last)
    cells = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def parts_table(plans: list[Plan]) -> str:
    """Seconds of a step by part, foretold, as a Markdown table of the plans that have them."""
    names = [
        "stage",
        "slice",
        "mesh",
        "remat",
        *(part.replace("_", " ") for part in cycles.PARTS),
        "step",
        "MFU, causal",
    ]
    rows = [names, ["---"] * len(names)]
    for plan in plans:
        if plan.foretold_seconds is not None and plan.foretold_mfu_causal is not None:
            where = (plan.stage, plan.topology, "x".join(map(str, plan.mesh.values())), "/".join(plan.remat.values()))
            parts = [f"{plan.parts[part]:.2f}" for part in cycles.PARTS]
            rows.append([*where, *parts, f"{plan.foretold_seconds:.1f}", f"{100 * plan.foretold_mfu_causal:.1f}%"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table_of_file(path: Path, parts: bool = False) -> str:
    """The table of the plans in a file of `--json` lines, of one mode; with `parts`, that of a step's parts.

    Raises UserError if it is no such file.
    """
    plans: list[Any] = []
    try:
        for kept in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(kept)
            plans.append(chat.ChatPlan(**fields) if fields.get("mode") == "chat" else Plan(**fields))
    except OSError as error:
        raise UserError(f"--table={path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--table={path}, line {len(plans) + 1}: not a line of kangaroo plan --json ({error})"
        ) from None
    of_chat = [isinstance(plan, chat.ChatPlan) for plan in plans]
    if any(of_chat) != all(of_chat):
        raise UserError(f"--table={path}: lines of --mode=chat and of --mode=train; one table has one of them")
    if any(of_chat):
        return chat.table(plans)
    return parts_table(plans) if parts else table(plans, with_sum=False)
