"""Tokens per second of vLLM with and without elastickv, side by side.

    python benchmarks/engine/tokens_per_second.py

Two engines of the same model are started, one plain (A), one managed (B). After a warm-up round each they take turns,
A B B A A B ..., on the same prompts and on the same core, while the other one waits. The result is the median of the
ratios B/A of neighbouring rounds, once in tokens per second of the clock and once per second of the processor, which
other work on the machine disturbs less. `--only plain` measures A alone. Ends with 1 if the two answer differently,
or if the ratio is under `--least`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import alternate
from benchmarks.common.stats import paired_ratio
from elastickv.demo.model import ensure_model
from elastickv.demo.prompts import mixed
from engines.harness import Engine, Job, Round, start
from engines.harness import Result as Outcome

ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> int:
    options = _options()
    model = ensure_model(print)
    prompts = [prompt.text for prompt in mixed(options.prompts)]
    names = [options.only] if options.only else ["plain", "managed"]
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as place, ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name in names:
            engines[name] = stack.enter_context(start(_job(name, model, prompts, options, Path(place))))
            engines[name].wait_ready()
        rounds: dict[str, list[Round]] = {name: [] for name in names}
        for name in alternate(options.repeats + 1, names):
            engines[name].go()
            rounds[name].append(engines[name].wait_round())
            print(f"{name}: {rounds[name][-1].tokens_per_second:.1f} tokens/s", flush=True)
        results = {name: engine.finish() for name, engine in engines.items()}
    result = _result(options, rounds, results)
    result.write(options.output)
    return int(bool(result.failed) or any(row.met is False for row in result.rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of each engine (5)")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a round (64)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens answered to each prompt (64)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--core", type=int, default=None, help="the core of both engines; all cores if not given")
    parser.add_argument("--seqs", type=int, default=16, help="requests that run at the same time (16)")
    parser.add_argument("--blocks", type=int, default=512, help="blocks of 32 tokens in the cache (512)")
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--one-process", action="store_true", help="scheduler and worker in one process, no spinning")
    parser.add_argument("--only", choices=["plain", "managed"])
    parser.add_argument("--least", type=float, default=0.0, help="the ratio under which the run counts as failed")
    parser.add_argument("--output", type=Path, help="folder of the result (benchmarks/results/cpu)")
    return parser.parse_args()


def _job(name: str, model: Path, prompts: list[str], options: argparse.Namespace, place: Path) -> Job:
    engine = {
        "dtype": options.dtype,
        "max_num_seqs": options.seqs,
        "num_gpu_blocks_override": options.blocks,
        "enable_prefix_caching": not options.no_prefix_caching,
    }
    managed = {"VLLM_PLUGINS": "elastickv", "ELASTICKV": "1", "ELASTICKV_NAME": "b", "ELASTICKV_DIR": str(place / "d")}
    return Job(
        model,
        [prompts] * (options.repeats + 1),
        max_tokens=options.max_tokens,
        engine=engine,
        environment={**(managed if name == "managed" else {}), **(ONE_PROCESS if options.one_process else {})},
        core=options.core,
    )


def _result(options: argparse.Namespace, rounds: dict[str, list[Round]], results: dict[str, Outcome]) -> Result:
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    result = Result("engine/tokens_per_second", "vllm", False, "host", settings)
    clock = {name: [one.tokens_per_second for one in series[1:]] for name, series in rounds.items()}
    processor = {name: [one.tokens_per_cpu_second for one in series[1:]] for name, series in rounds.items()}
    result.samples = {
        "tokens a second": clock,
        "tokens a second of processor time": processor,
        "start seconds": {name: one.start_seconds for name, one in results.items()},
        "peak bytes": {name: one.peak_bytes for name, one in results.items()},
        "preemptions": {name: one.preemptions for name, one in results.items()},
        "prefix hits": {name: one.prefix_hits for name, one in results.items()},
    }
    for what, series, target in (
        ("tokens a second", clock, Target("ratio", "least", options.least)),
        ("tokens a second of processor time", processor, None),
    ):
        median = {name: statistics.median(values) for name, values in series.items()}
        both = len(series) == 2
        ratio = paired_ratio(series["managed"], series["plain"]) if both else None
        row = Row(what, "1/s", median.get("managed"), median.get("plain"), target if both else None, ratio)
        result.rows.append(row)
    if len(rounds) == 2:
        pairs = zip(rounds["plain"], rounds["managed"], strict=True)
        result.fail("with", [f"round {i}: other tokens" for i, (a, b) in enumerate(pairs) if a.tokens != b.tokens])
    return result


if __name__ == "__main__":
    sys.exit(main())
