"""How much of the code the tests hold: changes one line at a time and runs the tests of that file (not part of CI).

    python tests/mutation/run.py models training            # 40 mutants of each room, or --sample N; seeded
    python tests/mutation/run.py models --sample 200        # goes on where the last one stopped
    python tests/mutation/run.py models --only attention    # those of the sample in files of that name
    python tests/mutation/run.py --report                   # scores and survivors of what has run
    python tests/mutation/run.py models --again             # once more those that survived, after tests were written

It works on a copy of the tree below `--work`, so that the tree may be edited meanwhile. Each mutant runs in a fork
of one process that has imported JAX, with -x and a limit on CPU time; one that runs into it counts as killed.
Results are lines of `--work`/results.jsonl. A mutant is known by its line and the changed line, so that results
stay valid while other lines change. EQUIVALENT lists those that change nothing that a test could see, and why.
"""

import argparse
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutation.equivalent import EQUIVALENT  # noqa: E402
from tests.mutation.mutants import Mutant, mutants_of  # noqa: E402
from tests.mutation.rooms import ROOMS  # noqa: E402

IMPORTED = (
    "pytest",
    "jax.numpy",
    "flax.nnx",
    "optax",
    "orbax.checkpoint",
    "grain",
    "av",
    "PIL.Image",
    "ml_collections",
)
FINISHED = {0: "survived", 1: "killed", 2: "killed", 3: "killed", 4: "killed"}  # exit codes of pytest


def copy_tree(work: Path) -> Path:
    """The tree as it is now, in `work`/tree, compiled but for what is mutated."""
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "runs")
    shutil.copytree(ROOT, tree, ignore=ignored)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree)], check=False)
    for files in ROOMS.values():
        for file in files:
            for compiled in (tree / file).parent.glob(f"__pycache__/{Path(file).stem}.*.pyc"):
                compiled.unlink()
    return tree


def run_tests(tree: Path, tests: list[str], log: Path, cpu_seconds: int, slow: bool) -> tuple[int, float]:
    """(exit code, CPU seconds) of pytest -x over `tests`, in a fork; -9 where it took too long."""
    start, pid = time.time(), os.fork()
    if pid == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(p for p in sys.path if Path(p).resolve() not in (ROOT, Path(__file__).parent))]
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "kangaroo_jax")]:
            del sys.modules[name]
        os.environ["PYTHONPATH"] = str(tree)
        sys.argv = ["pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line", *(["--slow"] if slow else []), *tests]
        code = 3
        try:
            code = int(importlib.import_module("pytest").main(sys.argv[1:]))
        finally:
            os._exit(code)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code, usage.ru_utime + usage.ru_stime
        if time.time() - start > 20 * cpu_seconds:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.2)


def check_sound(tree: Path, tests: list[str], log: Path, cpu_seconds: int, slow: bool) -> None:
    """End where the tests fail without a mutant: each would seem killed."""
    code, cpu = run_tests(tree, tests, log, cpu_seconds, slow)
    if code != 0:
        said = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{said}\nwithout a mutant: code {code} after {cpu:.0f} s of {cpu_seconds}: {' '.join(tests)}")


def run_one(tree: Path, mutant: Mutant, tests: list[str], log: Path, cpu_seconds: int, slow: bool) -> dict[str, Any]:
    """The result of one mutant; the copy is as it was afterwards."""
    file = tree / mutant.path
    source, begin = file.read_bytes(), time.time()
    file.write_bytes(mutant.apply(source))
    try:
        code, cpu = run_tests(tree, tests, log, cpu_seconds, slow)
    finally:
        file.write_bytes(source)
    text = log.read_text(errors="replace")
    by = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    # A code that is not pytest's own is that of a process which a test's subject has ended.
    result = "timeout" if code < 0 else FINISHED.get(code, "killed" if code > 5 else f"exit {code}")
    return {
        "name": mutant.name,
        "path": mutant.path,
        "line": mutant.line,
        "operator": mutant.operator,
        "result": result,
        "by": by[0] if by else "",
        "seconds": round(time.time() - begin, 1),
        "cpu": round(cpu, 1),
    }


def all_mutants(room: str, tree: Path) -> list[Mutant]:
    """Every mutant of a room."""
    files = [file for file in ROOMS[room] if (tree / file).exists()]
    return [mutant for file in files for mutant in mutants_of(file, (tree / file).read_bytes())]


def sample_of(room: str, tree: Path, count: int, seed: int) -> list[Mutant]:
    """`count` mutants of a room; a larger sample of the same seed begins with the smaller one."""
    mutants = all_mutants(room, tree)
    random.Random(f"{seed} {room}").shuffle(mutants)
    return mutants[:count]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of every mutant."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def report(results: dict[str, dict[str, Any]]) -> str:
    """Scores by room, and the survivors, of those changes that the tree as it is now still allows."""
    lines = []
    for room, files in ROOMS.items():
        names = {mutant.name for mutant in all_mutants(room, ROOT)}
        mine = [r for r in results.values() if r["path"] in files and r["name"] in names]
        if not mine:
            continue
        same = [r for r in mine if r["name"] in EQUIVALENT and r["result"] == "survived"]
        alive = [r for r in mine if r["result"] not in ("killed", "timeout") and r not in same]
        counted = len(mine) - len(same)
        lines.append(
            f"{room}: {counted - len(alive)} of {counted} killed, {100 * (counted - len(alive)) / max(counted, 1):.0f}%"
            f" ({len(same)} more change nothing)"
        )
        for r in sorted(alive, key=lambda r: (r["path"], r["line"])):
            _, before, after = r["name"].split(" | ", 2)
            lines += [f"  {r['result']} {r['path']}:{r['line']} ({r['operator']})", f"    - {before}", f"    + {after}"]
        lines += [f"  equivalent {r['name']}: {EQUIVALENT[r['name']]}" for r in same]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", choices=[[], *ROOMS], help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files of the sample whose path this regex is found in")
    parser.add_argument("--work", type=Path, default=Path("/tmp/kangaroo_mutation"))
    parser.add_argument("--cpu-seconds", type=int, default=240, help="of the tests of one mutant")
    parser.add_argument("--again", action="store_true", help="run those again that survived")
    parser.add_argument("--slow", action="store_true", help="with the slow tests")
    parser.add_argument("--report", action="store_true", help="only say what is known")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results_file = options.work / "results.jsonl"
    if not options.report:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(options.work / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        tree = copy_tree(options.work)
        for name in IMPORTED:
            importlib.import_module(name)
        sound: set[str] = set()
        for room in options.rooms:
            for mutant in sample_of(room, tree, options.sample, options.seed):
                known = read_results(results_file).get(mutant.name)
                if not re.search(options.only, mutant.path):
                    continue
                if known and not (options.again and known["result"] == "survived" and mutant.name not in EQUIVALENT):
                    continue
                tests = [test for test in ROOMS[room][mutant.path] if (tree / test).exists()]
                if unknown := [test for test in tests if test not in sound]:
                    check_sound(tree, unknown, options.work / "log", options.cpu_seconds, options.slow)
                    sound.update(unknown)
                result = run_one(tree, mutant, tests, options.work / "log", options.cpu_seconds, options.slow)
                with results_file.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{result['result']:<8} {result['seconds']:>5} s  {mutant.name}  {result['by']}", flush=True)
    print(report(read_results(results_file)))


if __name__ == "__main__":
    main()
