"""Plans as text: of a stage, on one line, as tables of several."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.planning import chat, cycles, gpu
from kangaroo_jax.planning.feeding import Feeding
from kangaroo_jax.planning.profile import Measured, compared


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


def parts_table(plans: list[Plan], before: list[Plan] | None = None) -> str:
    """Seconds of a step by part, foretold, as a Markdown table of the plans that have them.

    With `before` only of those for whose stage and slice it has a plan that foretells another time, first that one.
    """
    names = ["stage", "slice", "mesh", "remat", *(part.replace("_", " ") for part in cycles.PARTS), "step"]
    rows = [[*names, "MFU, causal"], ["---"] * (len(names) + 1)]
    earlier = {(plan.stage, plan.topology): plan for plan in before or [] if plan.parts}
    for plan in plans:
        was = earlier.get((plan.stage, plan.topology))
        if plan.parts and before is None:
            rows.append(_parts_row(plan, plan.stage))
        elif plan.parts and was is not None and was.parts != plan.parts:
            rows += [_parts_row(was, f"{plan.stage}, before"), _parts_row(plan, "after")]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _parts_row(plan: Plan, name: str) -> list[str]:
    """The cells of a plan that has parts."""
    where = [name, plan.topology, "x".join(map(str, plan.mesh.values())), "/".join(plan.remat.values())]
    spent = [f"{plan.parts[part]:.2f}" for part in cycles.PARTS]
    return [*where, *spent, f"{plan.foretold_seconds:.1f}", f"{100 * (plan.foretold_mfu_causal or 0):.1f}%"]


def table_of_file(path: Path, parts: bool = False, before: Path | None = None) -> str:
    """The table of the plans in a file of `--json` lines, of one mode; with `parts`, that of a step's parts.

    With `before`, a file of earlier plans, the parts of those that have changed.

    Raises UserError if one is no such file.
    """
    plans = _plans_of(path, "table")
    if before is not None:
        return parts_table(plans, _plans_of(before, "before"))
    if plans and isinstance(plans[0], chat.ChatPlan):
        return chat.table(plans)
    return parts_table(plans) if parts else table(plans, with_sum=False)


def _plans_of(path: Path, flag: str) -> list[Any]:
    """The plans in a file that a flag names."""
    plans: list[Any] = []
    try:
        for kept in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(kept)
            plans.append(chat.ChatPlan(**fields) if fields.get("mode") == "chat" else Plan(**fields))
    except OSError as error:
        raise UserError(f"--{flag}={path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--{flag}={path}, line {len(plans) + 1}: not a line of kangaroo plan --json ({error})"
        ) from None
    of_chat = [isinstance(plan, chat.ChatPlan) for plan in plans]
    if any(of_chat) != all(of_chat) or (flag == "before" and any(of_chat)):
        raise UserError(f"--{flag}={path}: lines of --mode=chat and of --mode=train; one table has one of them")
    return plans
