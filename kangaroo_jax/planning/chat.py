"""`kangaroo plan --mode=chat`: how many conversations chips that are not here can hold, and how fast they could answer.

The engine's own programs are compiled for a TPU slice, one chip included; GPUs are estimated by formula.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kangaroo_jax.chips import Slices, parse_topology
from kangaroo_jax.inference import weights
from kangaroo_jax.inference.programs import Programs
from kangaroo_jax.models.quantized import FORMATS
from kangaroo_jax.planning import chat_work, cycles, hlo
from kangaroo_jax.planning.chat_work import GIB, Held, Talk
from kangaroo_jax.planning.compile import Seconds, amount_refused, compile_kept, peak_bytes, topology_devices
from kangaroo_jax.sharding import MESH_AXES, make_mesh
from kangaroo_jax.system.progress import Tell

DOES_NOT_FIT = 3  # exit code


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program on one device, or why it was refused."""

    fits: bool
    peak_gib: float  # arguments, results, temporaries
    argument_gib: float
    temp_gib: float
    code_gib: float
    foretold_seconds: float | None  # of one run, see `cycles`; None where the chip's clock is not known
    lower_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class ChatPlan:
    """An engine on a slice. GiB are of one device."""

    mode: str
    stage: str
    topology: str
    source: str  # "compiled", or "formula" if there is no compiler for the chip
    quantize: str | None
    kv_dtype: str | None
    slots: int
    frames: int
    video_tokens: int
    context: int  # tokens of a conversation
    mesh: dict[str, int]
    fits: bool
    peak_hbm_gib: float  # all that is held, and the program that needs the most beside it
    capacity_gib: float
    weights_gib: float
    conversation_gib: float  # of one slot
    temporary_gib: float  # what the neediest program takes beside weights and conversations, and all programs' code
    conversations: int  # slots that fit
    first_token_seconds_bound: float
    encode_seconds_bound: float  # of it
    next_round_seconds_bound: float
    tokens_per_second_bound: dict[str, float]  # by conversations that are answered at the same time
    tokens_per_second_foretold: dict[str, float]  # by the compiled programs
    programs: dict[str, dict[str, Any]]
    compile_seconds: float | None
    compile_cpu_seconds: float | None
    nearest_change: str = ""


def make_chat_plan(talk: Talk, target: Slices, cache: Path | None = None) -> ChatPlan:
    """The plan of an engine on `target`: compiled for a TPU, by formula for a GPU.

    Raises UserError where heads cannot be cut over the chips, or libtpu is missing.
    """
    mesh = talk.mesh(target)
    one = chat_work.held(talk, mesh)
    found = compile_programs(talk, target, cache) if target.chip.compiles_on_cpu else {}
    beside = temporary_gib(talk, target, one, found)
    total = (one.weights + talk.slots * one.slot) / GIB + beside
    free = (target.chip.gib - beside) * GIB - one.weights
    bounds = chat_work.bounds(talk, target, one)
    return ChatPlan(
        mode="chat",
        stage=talk.config.stage,
        topology=str(target),
        source="compiled" if found else "formula",
        quantize=talk.quantize,
        kv_dtype=talk.kv_dtype,
        slots=talk.slots,
        frames=talk.frames,
        video_tokens=talk.video_tokens,
        context=talk.context,
        mesh=dict(zip(MESH_AXES, mesh, strict=True)),
        fits=total <= target.chip.gib and all(program.fits for program in found.values()),
        peak_hbm_gib=round(total, 2),
        capacity_gib=target.chip.gib,
        weights_gib=round(one.weights / GIB, 2),
        conversation_gib=round(one.slot / GIB, 2),
        temporary_gib=round(beside, 2),
        conversations=max(0, int(free // one.slot)),
        first_token_seconds_bound=bounds.first_token_seconds,
        encode_seconds_bound=bounds.of_it_encode_seconds,
        next_round_seconds_bound=bounds.next_round_seconds,
        tokens_per_second_bound=dict(bounds.tokens_per_second),
        tokens_per_second_foretold=_speeds(found),
        programs={name: dataclasses.asdict(program) for name, program in found.items()},
        compile_seconds=_sum(found, "compile_seconds"),
        compile_cpu_seconds=_sum(found, "compile_cpu_seconds"),
    )


def _speeds(found: dict[str, Program]) -> dict[str, float]:
    """Tokens a second of all conversations together, by their number."""
    speeds = {}
    for name, program in found.items():
        kind, _, rows = name.partition(" ")
        if kind == "decode" and program.foretold_seconds:
            speeds[rows or "1"] = round(int(rows or 1) / program.foretold_seconds, 1)
    return speeds


def _sum(found: dict[str, Program], name: str) -> float | None:
    return round(sum(getattr(program, name) for program in found.values()), 1) if found else None


def compile_programs(talk: Talk, target: Slices, cache: Path | None) -> dict[str, Program]:
    """The neediest of the engine's programs, compiled for a TPU slice."""
    devices = topology_devices(target)
    model = weights.abstract(talk.model, talk.quantize)
    programs = Programs(model, talk.sizes, mesh=make_mesh(talk.mesh(target), devices), kv_dtype=talk.kv_dtype)
    capacity = target.chip.gib * GIB

    def read(program: Any, seconds: Seconds) -> dict[str, Any]:
        memory = program.memory_analysis()
        parts = cycles.foretell(hlo.parse(program.as_text()), target)
        found = Program(
            fits=peak_bytes(memory) <= capacity,
            peak_gib=round(memory.peak_memory_in_bytes / GIB, 3),
            argument_gib=round(memory.argument_size_in_bytes / GIB, 3),
            temp_gib=round(memory.temp_size_in_bytes / GIB, 3),
            code_gib=round(memory.generated_code_size_in_bytes / GIB, 3),
            foretold_seconds=round(sum(parts.values()), 4) if parts else None,
            **seconds,
        )
        return dataclasses.asdict(found)

    def refused(message: str, seconds: Seconds) -> dict[str, Any]:
        unknown = float("nan")
        return dataclasses.asdict(Program(False, amount_refused(message), unknown, unknown, 0.0, None, **seconds))

    return {
        name: Program(**compile_kept(lambda key=key: programs.lower(key, "tpu"), target, cache, read, refused))  # type: ignore[misc]
        for name, key in talk.programs().items()
    }


def temporary_gib(talk: Talk, target: Slices, one: Held, found: dict[str, Program]) -> float:
    """What the neediest program takes beside weights and conversations, and the code of all."""
    if not found:
        return chat_work.temporary_gib(talk, target.devices) + chat_work.PROGRAM_GIB
    large, own = one.large / GIB, one.own / GIB
    needs = []
    for name, program in found.items():
        kind, _, rows = name.partition(" ")
        held = {"encode": 0.0, "extend": large, "decode": int(rows or 1) * (large + own)}[kind]
        needs.append(program.peak_gib - one.weights / GIB - held)
    return max(needs) + _code_gib(talk, found)


def _code_gib(talk: Talk, found: dict[str, Program]) -> float:
    """The code of all of the engine's programs, of which the largest are known."""
    kinds = {name.split()[0]: program.code_gib for name, program in found.items()}
    keys = talk.sizes.keys(talk.config.data.image_size)
    return sum(kinds.get(key[0], kinds["extend"] if key[0] == "score" else 0.0) for key in keys)


def nearest_change(talk: Talk, target: Slices, plan: ChatPlan) -> str:
    """The mildest change that makes the engine fit, by what was compiled and the formula; "" if none is known."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if 0 < plan.conversations < talk.slots:
        changes.append((f"--slots={plan.conversations}", {"slots": plan.conversations}))
    for form in FORMATS if talk.quantize is None else ("int4",) if talk.quantize == "int8" else ():
        changes.append((f"--quantize={form}", {"quantize": form}))
        changes.append((f"--quantize={form} --slots=1", {"quantize": form, "slots": 1}))
    if talk.kv_dtype is None:
        narrow = [(f"{text} --kv-dtype=int8", {**change, "kv_dtype": "int8"}) for text, change in changes]
        changes = [("--kv-dtype=int8", {"kv_dtype": "int8"}), *changes, *narrow]
    for text, change in changes:
        trial = dataclasses.replace(talk, **change)
        one = chat_work.held(trial, talk.mesh(target))
        if (one.weights + trial.slots * one.slot) / GIB + plan.temporary_gib <= target.chip.gib:
            return text
    return ""


# ------------------------------------------------------------------------------------ output


def run_chat(
    talk: Talk, topology: str, *, as_json: bool = False, cache: Path | None = None, slices: int = 1, tell: Tell = print
) -> int:
    """Plan an engine on `topology` and print; 0, or DOES_NOT_FIT. Raises UserError."""
    target = parse_topology(topology, slices)
    talk.mesh(target)
    if not as_json:
        tell(f"an engine of {talk.config.stage} on {target} ...")
    plan = make_chat_plan(talk, target, cache)
    if not plan.fits:
        change = nearest_change(talk, target, plan)
        plan = dataclasses.replace(plan, nearest_change=change or "none found: choose a larger slice")
    tell(json.dumps(dataclasses.asdict(plan)) if as_json else text(plan))
    return 0 if plan.fits else DOES_NOT_FIT


def text(plan: ChatPlan) -> str:
    """A plan as text for the terminal."""
    verdict = "fits" if plan.fits else f"DOES NOT FIT; nearest change that does: {plan.nearest_change}"
    speeds = ", ".join(f"{speed:,} with {rows}" for rows, speed in plan.tokens_per_second_bound.items())
    seen = f"{plan.frames} frames, {plan.video_tokens:,} tokens, " if plan.frames else ""
    quantize = f" --quantize={plan.quantize}" if plan.quantize else ""
    quantize += f" --kv-dtype={plan.kv_dtype}" if plan.kv_dtype else ""
    first = f"{plan.first_token_seconds_bound} s for a question of {chat_work.QUESTION} tokens"
    if plan.frames:
        first = (
            f"{plan.first_token_seconds_bound} s after the frames are decoded, of it {plan.encode_seconds_bound} for "
        )
        first += f"the ViT; a next question {plan.next_round_seconds_bound} s"
    rows = {
        "memory a device": f"{plan.peak_hbm_gib} of {plan.capacity_gib} GiB ({plan.source}): {verdict}",
        "of it weights": f"{plan.weights_gib} GiB, decoder {plan.quantize or '16 bits'}",
        "a conversation": f"{plan.conversation_gib} GiB: {seen}{plan.context:,} tokens in all; {plan.slots} planned, "
        f"{plan.conversations} fit",
        "programs": f"{plan.temporary_gib} GiB beside that",
        "mesh": ", ".join(f"{name} {size}" for name, size in plan.mesh.items()),
        "first token, bound": first,
        "tokens a second, bound": f"{speeds} conversations at a time",
        **_foretold(plan),
        "compiled in": f"{plan.compile_seconds} s" if plan.compile_seconds is not None else "not compiled: by formula",
        "to start it": f"kangaroo serve --checkpoint=DIR --context={plan.context} --slots={plan.slots}{quantize}",
    }
    return "\n".join([f"{plan.stage} on {plan.topology}", *(f"  {name:22} {value}" for name, value in rows.items())])


def _foretold(plan: ChatPlan) -> dict[str, str]:
    """A row of what the compiler's own estimates say of time."""
    seconds = {name: program["foretold_seconds"] for name, program in plan.programs.items()}
    if not plan.tokens_per_second_foretold or None in seconds.values():
        return {}
    speeds = ", ".join(f"{speed:,} with {rows}" for rows, speed in plan.tokens_per_second_foretold.items())
    return {
        "foretold": f"{speeds} at a time; {seconds['encode']} s a call of the ViT, {seconds['extend']} s for the last "
        "512 tokens of a full conversation"
    }


def table(plans: list[ChatPlan]) -> str:
    """Plans as a Markdown table."""
    rows = []
    for plan in plans:
        speeds = plan.tokens_per_second_bound
        cpu = plan.compile_cpu_seconds
        row = {
            "slice": plan.topology,
            "decoder": plan.quantize or "16 bits",
            "keys, values": plan.kv_dtype or "16 bits",
            "frames, tokens": f"{plan.frames}, {plan.context:,}",
            "weights": f"{plan.weights_gib}",
            "a conversation": f"{plan.conversation_gib}",
            "planned": str(plan.slots),
            "GiB a device": f"{plan.peak_hbm_gib} of {plan.capacity_gib}",
            "fits": "yes" if plan.fits else "no",
            "conversations that fit": str(plan.conversations),
            "first token, s": f"{plan.first_token_seconds_bound:.2f}",
            "next question, s": f"{plan.next_round_seconds_bound:.3f}",
            "tokens a second, 1 / all": " / ".join(f"{speed:,.0f}" for speed in speeds.values()),
            "foretold": " / ".join(f"{speed:,.0f}" for speed in plan.tokens_per_second_foretold.values()),
            "compile s (CPU s)": "by formula" if cpu is None else f"{plan.compile_seconds:.0f} ({cpu:.0f})",
        }
        rows.append(row)
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
