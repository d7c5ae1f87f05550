"""`kangaroo eval`: answers benchmarks from local files and scores the answers under every protocol."""

from pathlib import Path
from typing import TYPE_CHECKING

from kangaroo_jax.cli.arguments import Count, Natural, Number, Several, listed, require
from kangaroo_jax.errors import UserError

if TYPE_CHECKING:
    from kangaroo_jax.evaluation.judging import Judge


def evaluate(
    *,
    checkpoint: str = "",
    benchmark: str = "",
    data: str = "",
    workdir: str = "",
    server: str = "",
    model: str = "kangaroo",
    judge: str = "",
    judge_model: str = "",
    judge_key_env: str = "",
    controls: bool = False,
    check: bool = False,
    describe: str = "",
    rescore: bool = False,
    compare: Several = None,
    prompt: str = "",
    protocol: str = "strict",
    frames: Natural = 0,
    limit: Natural = 0,
    max_new_tokens: Natural = 0,
    strict: bool = False,
    as_images: bool = False,
    api_key_env: str = "",
    side: Count = 448,
    share: str = "1/1",
    at_a_time: Count = 8,
    slots: Count = 4,
    cache_gib: Number = 4.0,
    dtype: str | None = None,
    quantize: str | None = None,
    lora: str = "",
    ema: bool = False,
) -> None:
    """Answer published benchmarks from local files, and score the answers under every protocol.

        kangaroo eval --checkpoint=runs/quickstart --benchmark=quickstart --data=runs/quickstart --workdir=runs/eval
        kangaroo eval --server=http://127.0.0.1:8000/v1 --benchmark=mvbench --data=/data --workdir=runs/served
        kangaroo eval --describe=video-mme
        kangaroo eval --benchmark=video-mme,mlvu --data=/data --check
        kangaroo eval --workdir=runs/eval --rescore
        kangaroo eval --compare runs/eval_a runs/eval_b

    Nothing is downloaded. Run it again with the same workdir to go on: what was answered by these weights about these
    bytes is not asked again. docs/evaluation.md lists the benchmarks.

    Args:
        checkpoint: folder that training or a conversion wrote; or --server=URL
        benchmark: names by commas (--describe=all lists them), or FILE.jsonl of conversations with answers
        data: folder of the benchmarks' files; --describe=NAME says what goes there
        workdir: folder for answers and results
        server: address of a server of OpenAI's protocol, in place of a checkpoint
        model: its name at the server
        judge: address of a server of OpenAI's protocol that marks open answers
        judge_model: the judge's name at its server
        judge_key_env: variable of the environment that holds that server's key
        controls: also ask without the video, with one frame, with shuffled frames, and with the options moved
        check: only look whether the files are whole
        describe: only say what a benchmark is, what to fetch and where it goes; "all" lists them
        rescore: only score the answers in the workdir
        compare: only compare the workdirs of two runs, question by question
        prompt: style of the prompts: official, lmms-eval, vlmevalkit, ...; by default each benchmark's first
        protocol: of the comparison
        frames: of a video; 0 is the benchmark's number, or as in training
        limit: questions of each benchmark; 0 is all
        max_new_tokens: longest answer; 0 is the benchmark's
        strict: end at the first video that cannot be read
        as_images: send a server each frame as an image, where it knows no video
        api_key_env: variable of the environment that holds the server's key
        side: pixels of the frames that a server is sent
        share: part of the videos that this process asks about, such as 2/4
        at_a_time: questions, or answers that a judge marks, under way together
        slots: conversations that are remembered on the device
        cache_gib: memory for what was seen and read
        dtype: of the computation: float32, bfloat16 or float16
        quantize: int8 or int4, of the decoder's weights
        lora: folder of an adapter, to use beside the checkpoint; a run that trained one needs no word
        ema: take the average of the weights, where training kept one
    """
    from kangaroo_jax.evaluation.benchmarks.table import BENCHMARKS, benchmark_named

    if describe:
        _describe(list(BENCHMARKS) if describe == "all" else listed(describe))
        return
    if compare:
        _compare(compare, protocol)
        return
    if rescore:
        from kangaroo_jax.evaluation.running import rescore as run_again

        require("eval", evaluate, workdir=workdir)
        run_again(Path(workdir), _judge_of(judge, judge_model, judge_key_env, at_a_time))
        return
    require("eval", evaluate, benchmark=benchmark, data=data)
    names = tuple(listed(benchmark))
    for name in names:
        benchmark_named(name)
    if check:
        _check(names, Path(data), limit)
        return
    require("eval", evaluate, workdir=workdir)
    if not server:
        require("eval", evaluate, checkpoint=checkpoint)
    elif checkpoint:
        raise UserError("eval: --checkpoint and --server are two models; give one")

    from kangaroo_jax.evaluation.asking_server import Server
    from kangaroo_jax.evaluation.running import Loading, Settings, Share, evaluate_checkpoint, evaluate_server

    part, marker = Share.of(share), _judge_of(judge, judge_model, judge_key_env, at_a_time)
    settings = Settings(names, str(Path(data).resolve()), prompt, frames, limit, max_new_tokens, controls)
    loading = Loading(dtype, quantize, slots, cache_gib, at_a_time, strict, lora, ema)
    if server:
        served = Server(server, model, api_key_env, as_images, side)
        evaluate_server(served, settings, Path(workdir), loading, part, marker)
    else:
        from kangaroo_jax.inference.compiled import keep_programs

        keep_programs()
        evaluate_checkpoint(checkpoint, settings, Path(workdir), loading, part, marker)


def _judge_of(url: str, model: str, key: str, at_a_time: int) -> "Judge | None":
    if not url:
        return None
    from kangaroo_jax.evaluation.judging import Judge

    require("eval", evaluate, judge_model=model)
    return Judge(url, model, key, at_a_time)


def _describe(names: list[str]) -> None:
    from kangaroo_jax.evaluation.benchmarks.table import benchmark_named
    from kangaroo_jax.evaluation.checking import describe

    for name in names:
        print("\n".join(describe(benchmark_named(name))))


def _check(names: tuple[str, ...], data: Path, limit: int) -> None:
    """Say what is missing or broken; exit code 3 where a question cannot be asked."""
    from kangaroo_jax.evaluation.benchmarks.table import benchmark_named
    from kangaroo_jax.evaluation.checking import check, questions_of, report

    complete = True
    for name in names:
        benchmark = benchmark_named(name)
        found = check(benchmark, questions_of(benchmark, data, limit))
        print("\n".join(report(benchmark, found)))
        complete = complete and found.complete
    if not complete:
        raise SystemExit(3)


def _compare(runs: list[str], protocol: str) -> None:
    from kangaroo_jax.evaluation.benchmarks.question import PROTOCOLS
    from kangaroo_jax.evaluation.results import compare_runs

    if len(runs) != 2:
        raise UserError(f"eval: --compare takes the workdirs of two runs, not {len(runs)}: --compare A B")
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol={protocol}: is none of {', '.join(PROTOCOLS)}")
    print("\n".join(compare_runs(Path(runs[0]), Path(runs[1]), protocol)))


COMMANDS = {"": evaluate}
