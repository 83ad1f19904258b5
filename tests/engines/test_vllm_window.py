"""Blocks behind a window: who holds them, that nobody gets them early, and that none is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv.config import Settings
from elastickv.ledger import read_device
from elastickv.memory import Cache, RankGeometry, RankMemory
from engines import tiny_models
from engines.harness import CORES, Job, Result, run
from engines.oracle import differences, tiny_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

BLOCK = 64 * 1024
BLOCKS = 201
TOKENS = 16
WINDOW = 40


# --- the rule


def config(*, v2: bool = True, decode: int = 1, prefill: int = 1, length: int = 4096) -> Any:
    return SimpleNamespace(
        use_v2_model_runner=v2,
        parallel_config=SimpleNamespace(decode_context_parallel_size=decode, prefill_context_parallel_size=prefill),
        model_config=SimpleNamespace(max_model_len=length),
        max_in_flight_tokens=1024,
    )


def groups(*kinds: str) -> list[Any]:
    import torch
    from vllm.v1 import kv_cache_interface as specs

    common: Any = {"block_size": TOKENS, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    made = {
        "full": specs.FullAttentionSpec(**common),
        "window": specs.SlidingWindowSpec(**common, sliding_window=WINDOW, dcp_sharded=False),
        "latent window": specs.SlidingWindowMLASpec(**common, sliding_window=WINDOW, dcp_sharded=False),
        "chunk": specs.ChunkedLocalAttentionSpec(**common, attention_chunk_size=WINDOW),
        "state": specs.MambaSpec(block_size=TOKENS, shapes=((4, 4),), dtypes=(torch.float32,)),
        **{
            f"aligned state, {drafts} drafts": specs.MambaSpec(
                TOKENS, ((4, 4),), (torch.float32,), mamba_cache_mode="align", num_speculative_blocks=drafts
            )
            for drafts in (0, 3)
        },
    }
    found = []
    for kind in kinds:
        spec: Any = made[kind.removeprefix("mixed ")]
        if kind.startswith("mixed "):
            spec = specs.UniformTypeKVCacheSpecs(block_size=TOKENS, kv_cache_specs={"a": spec})
        found.append(specs.KVCacheGroupSpec([f"{kind}.{len(found)}"], spec))
    return found


KINDS = ("full", "window", "latent window", "chunk", "state", "mixed window")
BEHIND = {1, 2, 3, 5}


@pytest.mark.parametrize(
    ("version", "made", "on_cpu", "always", "held"),
    [
        ("0.32.0", {}, False, False, BEHIND),
        ("0.33.0", {"v2": False}, False, False, BEHIND),
        ("0.33.1", {"decode": 2}, False, False, BEHIND),
        ("0.33.1", {"prefill": 2}, False, False, BEHIND),
        ("0.33.0", {}, False, False, {2, 3}),
        ("0.33.0", {}, False, True, BEHIND),
        ("0.32.0", {}, True, False, set()),
        ("0.32.0", {}, True, True, BEHIND),
    ],
)
def test_which_groups_are_held(version: str, made: dict[str, Any], on_cpu: bool, always: bool, held: set[int]) -> None:
    from elastickv.engines.vllm.window import Rule

    rule = Rule(config(**made), version, on_cpu=on_cpu, always=always)
    assert rule.groups(groups(*KINDS)) == held


def test_what_the_log_says() -> None:
    from elastickv.engines.vllm.window import Rule

    def text(version: str, *kinds: str, on_cpu: bool = False) -> str | None:
        return Rule(config(), version, on_cpu=on_cpu, always=False).describe(groups(*kinds))

    assert text("0.32.0", "full", "state") is None
    assert text("0.32.0", "full", "window") == "blocks behind a window are held until the request ends"
    assert text("0.33.0", "full", "window") == "blocks behind a window are given back at once"
    assert (
        text("0.33.0", "window", "chunk") == "blocks behind a window are held until the request ends in 1 of 2 groups"
    )
    assert text("0.32.0", "window", on_cpu=True) == "blocks behind a window are given back at once"


def test_a_request_is_counted_at_its_full_length() -> None:
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config as original

    from elastickv.engines.vllm.window import Rule, concurrency

    planned: Any = SimpleNamespace(num_blocks=10_000, kv_cache_groups=groups("full", "window"))
    released = Rule(config(), "0.33.0", on_cpu=False, always=False)
    assert concurrency(original, released)(config(), planned) == original(config(), planned)
    assert 10_000 / original(config(), planned) == 256 + (1024 + WINDOW - 1 + TOKENS - 1) // TOKENS + 1
    held = Rule(config(), "0.32.0", on_cpu=False, always=False)
    assert 10_000 / concurrency(original, held)(config(), planned) == pytest.approx(256 + 256)


# --- vLLM's own manager


class World:
    """vLLM's KVCacheManager for full attention and another kind of layer, over an elastic pool."""

    def __init__(self, directory: Path, *, hold: bool, caching: bool = True, other: str = "window") -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import KVCacheConfig

        from elastickv.engines.vllm import window
        from elastickv.engines.vllm.scheduler import attach

        init_none_hash(sha256)
        arguments = {"capacity": BLOCKS * BLOCK, "device": "host", "directory": str(directory), "stock": 0}
        settings = Settings.load(arguments={**arguments, "idle_release": "1h", "name": "one", "page": BLOCK})
        self.cache = Cache.create(settings, num_blocks=BLOCKS, ranks=[RankGeometry("host", 1, BLOCK)])
        self.memory = RankMemory.attach(self.cache.rank_spec(0))
        self.cache.wait_ready(10)
        kinds = groups("full", other)
        planned = KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=kinds)
        self.manager: Any = KVCacheManager(
            planned, 4096, TOKENS, TOKENS, max_in_flight_tokens=64, enable_caching=caching
        )
        scheduler = SimpleNamespace(kv_cache_manager=self.manager, running=[])
        self.pool = attach(scheduler, self.cache.pool, lambda: BLOCKS - 1, 0.0)
        self.hasher = get_request_block_hasher(TOKENS, sha256) if caching else None
        rule = window.Rule(config(), "0.32.0", on_cpu=True, always=hold)
        self.held = window.hold(self.manager.coordinator, rule.groups(kinds))
        self.requests = 0

    def request(self, prompt: list[int]) -> Any:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.requests += 1
        params = SamplingParams(max_tokens=1000)
        params.update_from_generation_config({}, None)
        return Request(f"r{self.requests}", prompt, params, None, block_hasher=self.hasher)

    def start(self, request: Any, chunk: int) -> bool:
        """A first step of at most `chunk` tokens of the prompt, with the prefix that is cached."""
        from vllm.v1.request import RequestStatus

        blocks, computed, *_ = self.manager.get_computed_blocks(request)
        new = min(chunk, request.num_tokens - computed)
        if self.manager.allocate_slots(request, new, computed, blocks) is None:
            return False
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = computed + new
        return True

    def go_on(self, request: Any, chunk: int) -> bool:
        """Another step: more of the prompt, or one token more."""
        left = request.num_tokens - request.num_computed_tokens
        if not left:
            request.append_output_token_ids(7)
            left = 1
        new = min(chunk, left)
        if self.manager.allocate_slots(request, new) is None:
            return False
        request.num_computed_tokens += new
        return True

    def close(self) -> None:
        self.cache.pool.check_integrity()
        self.memory.close()
        self.cache.close()


@pytest.fixture
def worlds(directory: Path) -> Iterator[Any]:
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(directory.with_name(f"ledgers-{len(made)}"), **options))
        return made[-1]

    yield make
    for world in made:
        world.close()


def ids_of(world: World, request: Any, group: int = 1) -> list[int]:
    blocks = world.manager.coordinator.single_type_managers[group].req_to_blocks.get(request.request_id, [])
    return [block.block_id for block in blocks if not block.is_null]


def test_a_window_of_a_running_request_gives_nothing_back(worlds: Any) -> None:
    used = {}
    for hold in (False, True):
        world = worlds(hold=hold, caching=False)
        request = world.request(list(range(320)))
        assert world.start(request, 64)
        while request.num_computed_tokens < 320:
            assert world.go_on(request, 64)
        used[hold] = world.cache.pool.num_used()
        if hold:
            assert world.held[0].count > 10
        world.manager.free(request)
        assert world.cache.pool.num_used() == 0
        assert all(held.count == 0 for held in world.held)
    assert used[True] == 20 + 20
    assert used[False] < 20 + 10


def test_admission_counts_what_will_be_held(worlds: Any) -> None:
    """90 blocks of each group would not fit twice; at the size at which the window settles they would."""
    world = worlds(hold=True, caching=False)
    first, second = world.request(list(range(1440))), world.request(list(range(1440)))
    assert world.manager.allocate_slots(first, 64, full_sequence_must_fit=True) is not None
    first.num_computed_tokens = 64
    while first.num_computed_tokens < 1440:
        assert world.go_on(first, 64)
    assert world.manager.allocate_slots(second, 64, full_sequence_must_fit=True) is None
    free = worlds(hold=False, caching=False)
    first, second = free.request(list(range(1440))), free.request(list(range(1440)))
    assert free.manager.allocate_slots(first, 64, full_sequence_must_fit=True) is not None
    first.num_computed_tokens = 64
    while first.num_computed_tokens < 1440:
        assert free.go_on(first, 64)
    assert free.manager.allocate_slots(second, 64, full_sequence_must_fit=True) is not None


def test_a_preempted_request_holds_nothing_and_starts_again(worlds: Any) -> None:
    world = worlds(hold=True)
    request = world.request(list(range(320)))
    assert world.start(request, 320)
    for _ in range(40):
        assert world.go_on(request, 64)
    assert world.held[0].count > 0
    world.manager.free(request)  # as Scheduler._preempt_request does
    request.num_computed_tokens = 0
    assert (world.held[0].count, world.cache.pool.num_used()) == (0, 0)
    assert world.start(request, 400)
    assert request.num_computed_tokens > 256, "its prefix was cached, window included"
    world.manager.free(request)


def test_a_deferred_free_has_the_held_blocks_in_it(worlds: Any) -> None:
    world = worlds(hold=True)
    request = world.request(list(range(320)))
    assert world.start(request, 64)
    for _ in range(40):
        assert world.go_on(request, 64)
    held, used = world.held[0].count, world.cache.pool.num_used()
    blocks = world.manager.pop_blocks_for_free(request)
    assert len({block.block_id for block in blocks if not block.is_null}) == used
    assert (held > 0, world.held[0].count, world.cache.pool.num_used()) == (True, 0, used)
    world.pool.free_blocks(reversed(blocks))
    assert world.cache.pool.num_used() == 0


def test_what_lies_behind_the_window_is_evicted_first(worlds: Any) -> None:
    world = worlds(hold=True)
    request = world.request(list(range(320)))
    assert world.start(request, 64)
    seen: list[int] = []
    while request.num_computed_tokens < 320:
        assert world.go_on(request, 64)
        seen = list(dict.fromkeys([*seen, *ids_of(world, request)]))
    now = ids_of(world, request)
    order = [block.block_id for block in world.manager.coordinator.single_type_managers[1].pop_blocks_for_free("r1")]
    freed = [block for block in reversed(order) if block]
    world.manager.coordinator.single_type_managers[1].block_pool.free_blocks(
        [world.pool.blocks[block] for block in freed]
    )
    world.manager.coordinator.single_type_managers[0].free("r1")
    assert freed[-len(now) :] == now[::-1]
    assert set(freed[: -len(now)]).isdisjoint(now)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "plain"])
def test_no_block_is_handed_out_while_a_table_may_name_it(worlds: Any, seed: int, caching: bool) -> None:
    """Random requests that grow, end and are preempted; a worker's table keeps every id that it was ever told."""
    world = worlds(hold=True, caching=caching)
    rng = random.Random(seed)
    tables: dict[str, set[int]] = {}
    running: list[Any] = []
    shared = [rng.randrange(1000) for _ in range(200)]
    refused = 0
    for _ in range(300):
        choice = rng.random()
        if choice < 0.15 and len(running) < 6:
            request = world.request(shared[: rng.randrange(200)] + [rng.randrange(1000) for _ in range(150)])
            if world.start(request, rng.choice([16, 64, 400])):
                running.append(request)
                tables[request.request_id] = set()
        elif choice < 0.25 and running:
            request = running.pop(rng.randrange(len(running)))
            world.manager.free(request)
            del tables[request.request_id]
        elif running:
            request = rng.choice(running)
            before = {block for table in tables.values() for block in table}
            if not world.go_on(request, rng.choice([16, 64])):
                refused += 1
                victim = running.pop()
                world.manager.free(victim)
                del tables[victim.request_id]
            elif not caching:
                new = set(ids_of(world, request, 0) + ids_of(world, request, 1)) - tables[request.request_id]
                assert new.isdisjoint(before), "a block that another table names was handed out"
        for request in running:
            tables[request.request_id] |= set(ids_of(world, request, 0) + ids_of(world, request, 1))
        for table in tables.values():
            assert all(world.pool.blocks[block].ref_cnt > 0 for block in table)
        world.cache.pool.check_integrity()
    for request in running:
        world.manager.free(request)
    assert world.cache.pool.num_used() == 0
    assert all(held.count == 0 for held in world.held)


# --- an engine

ENGINE = {"skip_tokenizer_init": True, "max_num_seqs": 12, "kv_cache_memory_bytes": 256 << 20}
ENGINE_BLOCK = 64 * 1024
"""Of the tiny model: 2 layers of a group, 32 KiB each for 64 tokens."""
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PROMPTS = tiny_prompts(16, shared=96, least=80, most=300)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.gemma3(tmp_path_factory.mktemp("gemma"))


def engine_run(model: Path, directory: Path, *, caching: bool, **settings: str) -> Result:
    environment = {**ONE_PROCESS}
    if settings:
        environment |= {
            "VLLM_PLUGINS": "elastickv",
            "VLLM_LOGGING_LEVEL": "INFO",
            "ELASTICKV": "1",
            "ELASTICKV_DIR": str(directory),
            "ELASTICKV_DEVICE": "host",
            "ELASTICKV_NAME": "one",
            **settings,
        }
    engine = {**ENGINE, "enable_prefix_caching": caching}
    job = Job(model, [PROMPTS, PROMPTS], engine=engine, environment=environment, core=CORES[0], probe="shared_blocks")
    return run(job)


@pytest.fixture(scope="module")
def plain(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What plain vLLM answers, with all the memory it could want."""
    return engine_run(gemma, tmp_path_factory.mktemp("none"), caching=False)


@pytest.mark.slow
def test_an_engine_that_holds_answers_as_plain_vllm(gemma: Path, plain: Result, directory: Path) -> None:
    """Little memory, so that requests are preempted; with holding no id stands in two tables, without it some do."""
    capacity = str(96 * ENGINE_BLOCK)
    released = engine_run(gemma, directory.with_name("released"), caching=False, ELASTICKV_CAPACITY=capacity)
    held = engine_run(
        gemma, directory.with_name("held"), caching=False, ELASTICKV_CAPACITY=capacity, ELASTICKV_HOLD_WINDOWS="always"
    )
    assert differences(plain.tokens, released.tokens) == []
    assert differences(plain.tokens, held.tokens) == []
    assert held.preemptions > 0
    assert "blocks behind a window are given back at once" in released.log
    assert "blocks behind a window are held until the request ends" in held.log
    assert sum(sum(part.probed) for part in released.rounds) > 0, (
        "the control: released blocks do come back under others"
    )
    assert {count for part in held.rounds for count in part.probed} == {0}
    assert "IntegrityError" not in held.log


@pytest.mark.slow
def test_an_engine_that_holds_and_caches_prefixes(gemma: Path, plain: Result, directory: Path) -> None:
    held = engine_run(
        gemma,
        directory.with_name("held"),
        caching=True,
        ELASTICKV_CAPACITY=str(96 * ENGINE_BLOCK),
        ELASTICKV_HOLD_WINDOWS="always",
        ELASTICKV_IDLE_RELEASE="0.1s",
    )
    assert differences(plain.tokens, held.tokens) == []
    assert held.prefix_hits > 0
    from elastickv._core import Ledger

    assert read_device(Ledger.open(str(directory.with_name("held")), "host")).held == 0


# --- what vLLM counts


def test_a_count_below_zero_asks_for_nothing(worlds: Any) -> None:
    """Drafts had taken a block of the state, and were dropped: there are more blocks than are needed."""
    world = worlds(hold=False, other="aligned state, 3 drafts")
    request = world.request(list(range(TOKENS - 2)))
    assert world.start(request, TOKENS)
    request.append_output_token_ids(7)
    assert world.manager.allocate_slots(request, 1 + 3, num_lookahead_tokens=3) is not None
    request.num_computed_tokens = TOKENS - 1
    request.append_output_token_ids(7)
    at = TOKENS - 1
    count = world.manager.coordinator.get_num_blocks_to_allocate
    assert count(request.request_id, TOKENS, ((), ()), 0, at, at, TOKENS) < 0
    assert world.manager.allocate_slots(request, 1, num_lookahead_tokens=3) is not None


def test_not_in_this_step_is_no_demand(worlds: Any) -> None:
    """vLLM counts more than all blocks for a prefix whose state this step has only begun to cache."""
    world = worlds(hold=False, other="aligned state, 0 drafts")
    world.manager.new_step_starts()
    prompt = list(range(4 * TOKENS))
    assert world.start(world.request(prompt), len(prompt))
    mapped = world.memory.mapped_bytes
    later = world.request([*prompt, *range(TOKENS)])
    assert not world.start(later, 5 * TOKENS)
    assert (world.memory.mapped_bytes, world.pool.starved) == (mapped, False)
    world.manager.new_step_starts()
    assert world.start(later, 5 * TOKENS)


def test_to_count_outside_of_an_admission_is_to_take_nothing(worlds: Any) -> None:
    world = worlds(hold=False)
    request = world.request(list(range(TOKENS)))
    assert world.start(request, TOKENS)
    mapped = world.memory.mapped_bytes
    count = world.manager.coordinator.get_num_blocks_to_allocate
    assert count(request.request_id, 40 * TOKENS, ((), ()), 0, TOKENS, TOKENS, 40 * TOKENS) > 30
    assert world.memory.mapped_bytes == mapped
