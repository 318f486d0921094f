"""How long a teacher pass takes on many workers that fail: a simulation of its scheduler.

    python -m infra.sizing --tokens 4e9 --tokens-per-second 40000 --bytes-per-token 1803 --workers 8 64 512

Measured figures go in, those of ``offline_teacher.main plan``: tokens a second of one worker, bytes a token.
Stated ones: how often a worker is lost, how long its place stays empty, what the store takes a second.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, replace

from infra.console import command, duration, table


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A teacher pass. Rates are of one worker."""

    tokens: float
    """R times the corpus."""
    tokens_per_second: float
    bytes_per_token: float
    workers: int
    shard_tokens: int = 1024 * 128
    mtbf_hours: float = 24.0
    """Mean time between losses of one worker (exponential): the stated failure rate."""
    replace_seconds: float = 180.0
    """From a loss until another worker is ready: a new machine, its image, the teacher's weights."""
    store_bytes_per_second: float = 1e9
    """What the store takes from all workers together."""
    driver_seconds: float = 0.002
    """What the driver spends on one shard; it does one at a time."""
    slow_share: float = 0.02
    slow_factor: float = 2.0
    """Share of the workers that are this much slower (stragglers)."""


@dataclass(frozen=True)
class Timing:
    seconds: float
    efficiency: float
    """Time of perfect workers that never wait, over time taken."""
    lost_shards: int
    bottleneck: str


def simulate(job: Pass, seed: int = 0) -> Timing:
    """Every shard, on an event queue. Two shards a worker are in flight; a loss costs the shard in hand.

    A shard takes the longer of computing it and of its share of the store's rate: one is written while the
    next is computed.
    """
    rng = random.Random(seed)
    shards = max(1, round(job.tokens / job.shard_tokens))
    compute = job.shard_tokens / job.tokens_per_second
    busy = min(job.workers, shards)
    write = job.shard_tokens * job.bytes_per_token * busy / job.store_bytes_per_second
    handing = job.driver_seconds * busy
    mtbf = job.mtbf_hours * 3600
    factors = [job.slow_factor if rng.random() < job.slow_share else 1.0 for _ in range(job.workers)]
    deaths = [rng.expovariate(1 / mtbf) for _ in range(job.workers)]
    free = [(0.0, worker) for worker in range(job.workers)]
    heapq.heapify(free)
    left, lost, end = shards, 0, 0.0
    while left:
        now, worker = heapq.heappop(free)
        finish = now + max(compute * factors[worker], write, handing)
        if deaths[worker] < finish:  # the shard goes to whoever is free next
            back = max(deaths[worker], now) + job.replace_seconds
            lost += 1
            deaths[worker] = back + rng.expovariate(1 / mtbf)
            heapq.heappush(free, (back, worker))
            continue
        left -= 1
        end = max(end, finish)
        heapq.heappush(free, (finish, worker))
    perfect = shards * compute / job.workers
    slowest = max((compute, "the teacher"), (write, "the store"), (handing, "the driver"))[1]
    return Timing(end, perfect / end, lost, "too few shards" if shards < 4 * job.workers else slowest)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m infra.sizing", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=float, required=True, help="of the corpus")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--tokens-per-second", type=float, required=True, help="of one worker, from plan")
    parser.add_argument("--bytes-per-token", type=float, required=True, help="from plan")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--mtbf-hours", type=float, default=Pass.mtbf_hours, help="of one worker")
    parser.add_argument("--replace-seconds", type=float, default=Pass.replace_seconds)
    parser.add_argument("--store-bytes-per-second", type=float, default=Pass.store_bytes_per_second)
    parser.add_argument("--price", type=float, default=0.0, help="of one worker an hour")
    options = parser.parse_args()
    job = Pass(
        tokens=options.tokens * options.replicas,
        tokens_per_second=options.tokens_per_second,
        bytes_per_token=options.bytes_per_token,
        workers=1,
        mtbf_hours=options.mtbf_hours,
        replace_seconds=options.replace_seconds,
        store_bytes_per_second=options.store_bytes_per_second,
    )
    rows = []
    for workers in options.workers:
        found = simulate(replace(job, workers=workers))
        money = f"{found.seconds / 3600 * workers * options.price:,.0f}" if options.price else "-"
        cells = [f"{workers}", duration(found.seconds), f"{found.efficiency:.0%}", f"{found.lost_shards:,}"]
        rows.append([*cells, found.bottleneck, money])
    print(table(rows, ["workers", "time", "efficiency", "lost shards", "bottleneck", "money"]))
    print(f"store: {job.tokens * job.bytes_per_token / 1e12:,.2f} TB")


if __name__ == "__main__":
    command(main)
