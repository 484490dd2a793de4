"""How long the exact solver takes for a teacher of 60 blocks: damages drawn, sizes Qwen-Image's.

    python -m benchmarks.solver

Spans up to 10 blocks with 12 variants each (six FFN widths, two texts). Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable

from search.solver import Piece, best_partitions, budget_curve, damages_through
from search.space import candidates
from trainers.students.families import family_named

RUNS = 5
LIMIT = 10_000_000_000


def main() -> None:
    family = family_named("qwen_image")
    config, rng = family.published, random.Random(0)
    offered = candidates(60, 10, (0.9, 0.75, 0.6, 0.5, 0.25), ("dual", "projected"))
    pieces = {}
    for block in offered:
        worse = (block.length - 1) ** 1.5 + 2 * (1 - block.kept) + (block.text != "dual")
        damage = 0.01 * worse * rng.uniform(0.3, 3) if worse else 0.0
        pieces[block] = Piece(damage, family.block_parameters(config, block))
    outside = family.outside_parameters(config)

    def median(solve: Callable[[], object]) -> float:
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            solve()
            seconds.append(time.perf_counter() - started)
        return round(statistics.median(seconds), 2)

    found = {
        "pieces": len(pieces),
        "best_s": median(lambda: best_partitions(pieces, 60, outside, LIMIT)),
        "best_10_s": median(lambda: best_partitions(pieces, 60, outside, LIMIT, 10)),
        "budget_curve_s": median(lambda: budget_curve(pieces, 60, outside)),
        "sizes_on_the_curve": len(budget_curve(pieces, 60, outside)),
        "damages_through_s": median(lambda: damages_through(pieces, 60, outside, LIMIT)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
