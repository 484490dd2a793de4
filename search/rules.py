"""Rules, the papers' among them: from what the analysis measured, a plan for a budget.

Each rule is a function of `Ground` and a limit in its currency; RULES names them as a configuration
does. Where a paper is silent, the choice made here is said at the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from search.analyse import Analysis
from search.budget import Currency
from search.costs import costs_in
from trainers.measure import Table
from trainers.students.families import family_named
from trainers.students.families.base import Config
from trainers.students.plan import BlockPlan, Plan, uniform_plan

_ROUNDING = 1e-6
"""CKA is known in float32: a smaller rise is none."""

Rule = Literal["uniform", "ppcl", "amber", "influence"]
NextInterval = Literal["after", "end"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Ground:
    """What a rule decides from."""

    family: str
    config: Config
    """The teacher's transformer config."""
    analysis: Analysis
    noise_power: float = 1.0
    """See SearchConfig."""
    least_cka: float = 0.0
    next_interval: NextInterval = "after"
    currency: Currency = "parameters"
    """Of the limit."""
    table: Table | None = None
    """What was measured, for limits of latency and memory."""

    @property
    def teacher_blocks(self) -> int:
        return len(self.analysis.importance)

    def plan(self, spans: Sequence[Span]) -> Plan:
        """The plan that merges these spans and keeps every other block.

        A span over blocks that cannot become one is merged in parts.
        """
        spans = [part for span in spans for part in self._parts(span)]
        inside = {i for first, last in spans for i in range(first, last + 1)}
        alone = [(i, i) for i in range(self.teacher_blocks) if i not in inside]
        return Plan(
            family=self.family,
            teacher_blocks=self.teacher_blocks,
            blocks=tuple(
                BlockPlan(span=span, start="library") for span in sorted([*spans, *alone])
            ),
        )

    def cost(self, plan: Plan) -> int:
        family = family_named(self.family)
        costs = costs_in(self.currency, family, self.config, plan.blocks, self.table)
        return costs.of(plan)

    def _parts(self, span: Span) -> list[Span]:
        family, (start, last) = family_named(self.family), span
        parts = []
        for end in range(start, last + 1):
            longer = BlockPlan(span=(start, min(end + 1, last)))
            if end == last or family.refusal(self.config, longer) is not None:
                parts.append((start, end))
                start = end + 1
        return parts


def uniform(ground: Ground, limit: int) -> Plan | None:
    """The uniform plan of most blocks that fits: spans that differ in length by at most one."""
    for blocks in range(ground.teacher_blocks, 0, -1):
        whole = uniform_plan(ground.family, ground.teacher_blocks, blocks)
        plan = ground.plan([block.span for block in whole.blocks])
        if ground.cost(plan) <= limit:
            return plan
    return None


def ppcl_intervals(
    analysis: Analysis, least_cka: float = 0.0, next_interval: NextInterval = "after"
) -> list[tuple[Span, float]]:
    """PPCL's intervals and the CKA of each, from c(u, k) (METHODS.md, PPCL 2).

    From block u the interval ends at v, the first k − 1 for which Δ(u, k) > Δ(u, k − 1): where the
    loss of similarity first speeds up. Silent in the paper: c is the mean of the two streams'; the
    next interval starts `after` it, at v + 1, or at its `end`, where the next chain starts from the
    state after block v and takes the blocks from v + 1 on; block 0 stays whole, because its input
    is not yet a state of the chain; an interval ends at the longest span that was measured; one
    whose CKA is below `least_cka` is rejected, and the next starts one block on.
    """
    chain = (analysis.image_chain + analysis.text_chain) / 2
    blocks, longest = chain.shape
    found = []
    u = first = 1
    while u < blocks:
        reach = min(longest, blocks - u)
        losses = [float(chain[u, j - 1] - chain[u, j]) for j in range(1, reach)]
        # losses[j - 1] is Δ(u, u + j).
        rises = (j for j in range(1, len(losses)) if losses[j] > losses[j - 1] + _ROUNDING)
        v = u + next(rises, len(losses))
        cka = float(chain[u, v - u])
        if v > u and cka < least_cka:
            v = u
        if v > first:
            found.append(((first, v), cka))
        first = v + 1
        u = v if next_interval == "end" and v > u else first
    return found


def ppcl(ground: Ground, limit: int) -> Plan | None:
    """PPCL's plan under a limit (METHODS.md, PPCL 2 to 5); None out of its reach.

    The paper gives one plan, and larger ones by plugging blocks back. Silent: which. Here the
    intervals of lowest CKA go back first, as long as the student stays under the limit. Where all
    intervals leave it too large, width goes on as in the paper: text is projected where its
    streams before and after are most alike, then FFNs become linear where their maps fit best.
    """
    spans = dict(ppcl_intervals(ground.analysis, ground.least_cka, ground.next_interval))
    whole = ground.plan(list(spans))
    if ground.cost(whole) > limit:
        return narrowed(ground, whole, limit)
    for span in sorted(spans, key=lambda span: (spans[span], span)):
        without = [other for other in spans if other != span]
        if ground.cost(ground.plan(without)) <= limit:
            del spans[span]
    return ground.plan(list(spans))


def narrowed(ground: Ground, plan: Plan, limit: int) -> Plan | None:
    """The plan with projected text, then linear FFNs, block by block in PPCL's order until it fits;
    None when that is not enough."""
    text_cka, ffn_error = ground.analysis.text_cka, ground.analysis.ffn_error
    blocks = list(plan.blocks)

    def unlike(i: int) -> float:
        first, last = blocks[i].span
        return -float(text_cka[first - 1, last])

    def misfit(i: int) -> float:
        first, last = blocks[i].span
        return float(ffn_error[first : last + 1].mean())

    family = family_named(ground.family)
    steps = (({"text": "projected"}, unlike, 1), ({"ffn": "linear"}, misfit, 0))
    for change, order, start in steps:
        for i in sorted(range(start, len(blocks)), key=lambda i: (order(i), i)):
            changed = {**blocks[i].model_dump(), **change, "start": "library"}
            block = BlockPlan.model_validate(changed)
            if family.refusal(ground.config, block) is not None:
                continue
            blocks[i] = block
            made = plan.model_copy(update={"blocks": tuple(blocks)})
            if ground.cost(made) <= limit:
                return made
    return None


def amber(ground: Ground, limit: int) -> Plan | None:
    """Amber-Image's plan under a limit (METHODS.md, Amber-Image 1 and 2); None out of its reach.

    One-shot: the blocks of lowest importance go, never the first or the last, and a kept block
    takes the pruned run after it into its span. The weight of a timestep is silent in the paper;
    here it is the timestep, 1 at pure noise, to the power of `noise_power`.
    """
    importance = ground.analysis.importance
    bands = importance.shape[1]
    times = [1 - (band + 0.5) / bands for band in range(bands)]  # the noisiest band is the first
    weights = [time**ground.noise_power for time in times]
    weighted = (importance @ importance.new_tensor(weights)) / sum(weights)
    return _without_lowest(ground, weighted.tolist(), limit)


def influence(ground: Ground, limit: int) -> Plan | None:
    """ShortGPT's plan under a limit: the blocks of lowest Block Influence go (1 − the cosine of a
    block's input and output, mean of the two streams), never the first or the last."""
    return _without_lowest(ground, ground.analysis.influence.tolist(), limit)


RULES: dict[Rule, Callable[[Ground, int], Plan | None]] = {
    "uniform": uniform,
    "ppcl": ppcl,
    "amber": amber,
    "influence": influence,
}


def _without_lowest(ground: Ground, scores: Sequence[float], limit: int) -> Plan | None:
    order = sorted(range(1, ground.teacher_blocks - 1), key=lambda i: (scores[i], i))
    for count in range(len(order) + 1):
        kept = [i for i in range(ground.teacher_blocks) if i not in order[:count]]
        ends = [*(i - 1 for i in kept[1:]), ground.teacher_blocks - 1]
        spans = [(i, end) for i, end in zip(kept, ends, strict=True) if end > i]
        plan = ground.plan(spans)
        if ground.cost(plan) <= limit:
            return plan
    return None
