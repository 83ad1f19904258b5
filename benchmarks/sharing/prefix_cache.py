"""Two engines take turns in one budget, each with shared prefixes that fill most of it: how many tokens still hit?

    python benchmarks/sharing/prefix_cache.py [--turns 6] [--passes 100]

Each engine (vLLM on the CPU, a small random model) has a set of prefixes that fill 85 % of the budget. In its turn it
answers every prefix --passes times in random order, with another end each time, while the other one idles; then it is
the other's turn. Managed, both share the budget; plain vLLM has the whole budget for itself alone and answers the same
requests in the same order. A rate is prompt tokens found in the cache over all prompt tokens.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines.harness import Engine, Job, Round, start
from engines.oracle import TINY_VOCABULARY, make_tiny_llama

BLOCK_TOKENS = 32
LAYERS = 4
BLOCK_BYTES = LAYERS * 16 * 1024
"""Of the tiny model: 32 tokens of 4 layers, each a range of its own; a page of 16 KiB in each is one block."""
FILL = 0.85
NAMES = ("left", "right")
ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_num_seqs": 2,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 256 << 20,
}


def rounds(name: str, turns: int, passes: int, budget: int, prefix_blocks: int) -> list[list[list[int]]]:
    """The prompts of each pass of each turn of this engine; the same for every run."""
    generator = random.Random(name)

    def words(count: int) -> list[int]:
        return [generator.randrange(3, TINY_VOCABULARY) for _ in range(count)]

    prefixes = [words(prefix_blocks * BLOCK_TOKENS) for _ in range(int(FILL * budget) // prefix_blocks)]
    made = []
    for _ in range(turns * passes):
        generator.shuffle(prefixes)
        made.append([prefix + words(8) for prefix in prefixes])
    return made


def rate(done: list[Round], prompts: list[list[list[int]]]) -> float:
    found = sum(sum(one.cached) for one in done)
    return found / sum(len(prompt) for one in prompts for prompt in one)


def jobs(model: Path, chosen: Any, environment: dict[str, dict[str, str]], blocks: int) -> dict[str, Job]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        name: Job(
            model,
            rounds(name, chosen.turns // 2, chosen.passes, chosen.budget, chosen.prefix),
            max_tokens=2,
            engine={**ENGINE, "num_gpu_blocks_override": blocks},
            environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment[name]},
            core=cores[i % len(cores)],
        )
        for i, name in enumerate(NAMES)
    }


def take_turns(made: dict[str, Job], chosen: Any, alone: bool) -> dict[str, list[Round]]:
    """Every pass of every turn; `alone`: one engine after the other, each with all its turns."""
    done: dict[str, list[Round]] = {name: [] for name in NAMES}

    def turn(name: str, engine: Engine, passes: int) -> None:
        for number in range(passes):
            engine.go()
            done[name].append(engine.wait_round())
            if number % chosen.passes == 0:
                time.sleep(chosen.pause)

    if alone:
        for name in NAMES:
            with start(made[name]) as engine:
                turn(name, engine, chosen.turns // 2 * chosen.passes)
        return done
    with ExitStack() as stack:
        engines = {name: stack.enter_context(start(made[name])) for name in NAMES}
        for engine in engines.values():
            engine.wait_ready()
        for number in range(chosen.turns):
            name = NAMES[number % 2]
            turn(name, engines[name], chosen.passes)
    return done


def figures(done: dict[str, list[Round]], made: dict[str, Job], passes: int) -> dict[str, float]:
    """Mean rates over the turns of both engines: of a turn's first pass, first half, second half, and whole.

    The first turn of each fills an empty cache, for plain vLLM too, and is left out.
    """
    parts = {"first pass": (0, 1), "first half": (0, passes // 2), "second half": (passes // 2, passes)}
    rates: dict[str, list[float]] = {}
    for name in NAMES:
        prompts: Any = made[name].rounds
        for at in range(passes, len(done[name]), passes):
            for what, (low, high) in {**parts, "whole turn": (0, passes)}.items():
                span = slice(at + low, at + high)
                rates.setdefault(what, []).append(rate(done[name][span], prompts[span]))
    seconds = [sum(one.seconds for one in done[name]) for name in NAMES]
    means = {what: round(sum(values) / len(values), 4) for what, values in rates.items()}
    return {**means, "seconds of a turn": round(sum(seconds) / sum(map(len, done.values())) * passes, 2)}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--turns", type=int, default=6, help="of both together, an even number (6)")
    parser.add_argument("--passes", type=int, default=100, help="over all prefixes in a turn (100)")
    parser.add_argument("--budget", type=int, default=200, help="blocks of 64 KiB (200)")
    parser.add_argument("--prefix", type=int, default=10, help="blocks of a prefix (10)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds after the first pass of a turn (0)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as place:
        model = make_tiny_llama(Path(place, "model"))
        plain_jobs = jobs(model, chosen, {name: {} for name in NAMES}, chosen.budget)
        plain = figures(take_turns(plain_jobs, chosen, True), plain_jobs, chosen.passes)
        shared = {
            "VLLM_PLUGINS": "elastickv",
            "ELASTICKV": "1",
            "ELASTICKV_DIR": f"{place}/ledgers",
            "ELASTICKV_DEVICE": "host",
            "ELASTICKV_CAPACITY": str(chosen.budget * BLOCK_BYTES),
            "ELASTICKV_PAGE": str(BLOCK_BYTES // LAYERS),
        }
        environment = {name: {**shared, "ELASTICKV_NAME": name} for name in NAMES}
        managed_jobs = jobs(model, chosen, environment, chosen.budget)
        managed = figures(take_turns(managed_jobs, chosen, False), managed_jobs, chosen.passes)
    ratio = managed["second half"] / plain["second half"]
    print({"managed": managed, "plain": plain})
    report = {
        "budget, blocks": chosen.budget,
        "working set, blocks": int(FILL * chosen.budget) // chosen.prefix * chosen.prefix,
        "turns": chosen.turns,
        "passes in a turn": chosen.passes,
        "hit rate, managed": managed,
        "hit rate, plain vLLM with the whole budget": plain,
    }
    return common.write(
        "prefix_cache",
        report,
        {
            "hit rate in the second half of a turn, of plain vLLM's": (ratio, "least", 0.95),
            "hit rate over whole turns, of plain vLLM's": (managed["whole turn"] / plain["whole turn"], "least", 0.95),
        },
        chosen.output,
    )


if __name__ == "__main__":
    sys.exit(main())
