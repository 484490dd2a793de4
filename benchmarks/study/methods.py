"""The methods that the study compares: how each finds its plan, starts it and recovers it.

Every method ends with the same number of recovery steps of the whole student; what it trains before
(replacements, masks) is counted in its cost.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.study.masks import masked_plan
from benchmarks.study.setting import Setting, Trained
from search.analyse import Analysis
from search.rules import Ground, amber, influence, narrowed, ppcl, uniform
from search.space import Space, priced_space
from trainers.evaluate import fidelity_loss
from trainers.students.plan import BlockPlan, Plan
from trainers.students.surgery import assemble

SCORED = 24
"""Plans that Espalier's search assembles and scores for a budget."""


@dataclass(frozen=True)
class Case:
    """One budget under one seed."""

    setting: Setting
    ground: Ground
    limit: int
    """Parameters."""
    seed: int


@dataclass(frozen=True)
class Method:
    """One row of the study."""

    name: str
    plan: Callable[[Case], Plan | None]
    """Before the library is trained; None when the method does not reach the budget."""
    start: Literal["first", "middle", "average"] = "middle"
    """First weights of what replaces several blocks."""
    trained: Literal["apart", "in sequence"] | None = "apart"
    """Whether replacements are trained before recovery: each on the teacher's own states (PPCL), or
    one behind the other on the student's."""
    loss: Literal["velocity", "diffusion"] = "velocity"
    """What recovery matches."""
    tuned: bool = True
    """Whether the whole student is recovered at the end."""
    longer: int = 1
    """How many times as many steps its recovery takes as everyone's."""
    frozen: float = 0.0
    """The share of the student's blocks, from the first, that recovery leaves alone."""
    chained: bool = False
    """Whether `plan` is for half the teacher, whose recovered student is the teacher of a smaller
    one with shared streams (Amber's hybrid)."""
    choose: Callable[[Case, Trained], Plan] | None = None
    """Chooses from the trained library instead; `plan` then names nothing."""


def random_plan(case: Case) -> Plan:
    """Spans cut at random, as many blocks as the budget allows."""
    blocks = len(_or_raise(uniform(case.ground, case.limit)).blocks)
    rng = random.Random(case.seed * 1009 + case.limit)
    cuts = sorted(rng.sample(range(1, case.ground.teacher_blocks), blocks - 1))
    edges = [0, *cuts, case.ground.teacher_blocks]
    spans = [(a, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1]
    return case.ground.plan(spans)


def hierarchical(case: Case) -> Plan | None:
    """HierarchicalPrune in its outline: influence times a position weight that falls exponentially
    from the first block to the last, so that late blocks go first."""
    analysis = case.ground.analysis
    blocks = len(analysis.influence)
    weight = torch.exp(-2.0 * torch.arange(blocks) / blocks)
    weighted = replace(analysis, influence=analysis.influence * weight)
    return influence(replace(case.ground, analysis=weighted), case.limit)


def puzzle(case: Case, trained: Trained) -> Plan:
    """The exact combination of least summed damage over the library (Puzzle's way)."""
    return _space(case, trained).exact(case.limit)[0]


def espalier(case: Case, trained: Trained) -> Plan:
    """The best assembled plan among the exact ones and the rules': scored, not only summed."""
    space = _space(case, trained)
    plans = space.exact(case.limit, SCORED)
    for rule in (uniform, ppcl, amber):
        plan = rule(case.ground, case.limit)
        if plan is not None and space.holds(plan):
            plans.append(plan)
    setting = case.setting

    def loss(plan: Plan) -> float:
        student = assemble(setting.teacher, plan, lambda block: trained.weights[block])
        return fidelity_loss(student, setting.family, setting.probe)

    return min(plans, key=loss)


def _ppcl(case: Case) -> Plan | None:
    return ppcl(case.ground, case.limit)


METHODS: tuple[Method, ...] = (
    Method("uniform", lambda case: uniform(case.ground, case.limit)),
    Method("random", random_plan),
    Method(
        "block influence",
        lambda case: influence(case.ground, case.limit),
        start="first",
        trained=None,
    ),
    Method("TinyFusion masks", masked_plan, start="first", trained=None),
    Method("HierarchicalPrune", hierarchical, start="first", trained=None, frozen=1 / 3),
    Method("Puzzle", lambda case: None, choose=puzzle),
    Method("PPCL", _ppcl),
    Method("Amber", lambda case: amber(case.ground, case.limit), start="average", loss="diffusion"),
    Method("Espalier", lambda case: None, choose=espalier),
)


ABLATIONS: tuple[Method, ...] = (
    Method("PPCL, CKA of the states themselves", lambda case: _ppcl_on(case, _without_probes)),
    Method("PPCL, one threshold", lambda case: _threshold(case)),
    Method("PPCL, in sequence", _ppcl, trained="in sequence"),
    Method("PPCL, first block", _ppcl, start="first"),
    Method("PPCL, average", _ppcl, start="average"),
    Method("PPCL, with width", lambda case: _ppcl_with_width(case)),
    Method("PPCL, no fine-tuning", _ppcl, tuned=False),
    Method("PPCL, recovered three times as long", _ppcl, longer=3),
    Method(
        "Amber, first block",
        lambda case: amber(case.ground, case.limit),
        start="first",
        loss="diffusion",
    ),
    Method(
        "Amber, no first phase",
        lambda case: amber(case.ground, case.limit),
        start="average",
        trained=None,
        loss="diffusion",
    ),
    Method(
        "Amber, all free for both phases",
        lambda case: amber(case.ground, case.limit),
        start="average",
        trained=None,
        loss="diffusion",
        longer=2,
    ),
    Method("Amber, velocity", lambda case: amber(case.ground, case.limit), start="average"),
)
"""What the papers' parts do, one taken away or exchanged at a time."""

CHAINS: tuple[Method, ...] = (
    Method(
        "Amber, by way of 50%",
        lambda case: amber(case.ground, case.setting.sweep.teacher_parameters // 2),
        start="average",
        loss="diffusion",
        chained=True,
    ),
)
"""For budgets below half: straight there, as the methods do, or in two steps."""


def needed(case: Case, methods: Sequence[Method]) -> dict[str, list[BlockPlan]]:
    """The replacements that the methods' plans start from, by the start of their training."""
    found: dict[str, list[BlockPlan]] = {}
    for method in methods:
        if method.trained == "apart" and method.choose is None:
            plan = method.plan(case)
            blocks = [] if plan is None else [b for b in plan.blocks if not b.untouched]
            found.setdefault(method.start, []).extend(blocks)
    return found


def _without_probes(analysis: Analysis) -> Analysis:
    """c(u, k) as the CKA of the teacher's states after blocks u and k."""
    blocks, longest = analysis.image_chain.shape

    def chain(cka: Tensor) -> Tensor:
        made = torch.full((blocks, longest), math.nan)
        for u in range(blocks):
            reach = min(longest, blocks - u)
            made[u, :reach] = cka[u, u : u + reach]
        return made

    return replace(
        analysis, image_chain=chain(analysis.image_cka), text_chain=chain(analysis.text_cka)
    )


def _ppcl_on(case: Case, change: Callable[[Analysis], Analysis]) -> Plan | None:
    ground = replace(case.ground, analysis=change(case.ground.analysis))
    return ppcl(ground, case.limit)


def _ppcl_with_width(case: Case) -> Plan | None:
    """Depth for two thirds of the way, then projected text and linear FFNs for the rest."""
    whole = case.setting.sweep.teacher_parameters
    depth = ppcl(case.ground, whole - (whole - case.limit) * 2 // 3)
    return None if depth is None else narrowed(case.ground, depth, case.limit)


def _threshold(case: Case) -> Plan | None:
    """From each block the longest span whose c(u, k) stays above one threshold, the highest that
    reaches the budget."""
    analysis = case.ground.analysis
    chain = (analysis.image_chain + analysis.text_chain) / 2
    blocks, longest = chain.shape
    for threshold in sorted(chain[~chain.isnan()].tolist(), reverse=True):
        spans, u = [], 1
        while u < blocks:
            reach = [j for j in range(min(longest, blocks - u)) if chain[u, j] >= threshold]
            v = u + max(reach, default=0)
            if v > u:
                spans.append((u, v))
            u = v + 1
        plan = case.ground.plan(spans)
        if case.ground.cost(plan) <= case.limit:
            return plan
    return None


def _space(case: Case, trained: Trained) -> Space:
    setting = case.setting
    own = [BlockPlan(span=(i, i)) for i in range(case.ground.teacher_blocks)]
    damages = {**dict.fromkeys(own, 0.0), **trained.damages}
    return priced_space(setting.family.name, setting.config, damages)


def _or_raise(plan: Plan | None) -> Plan:
    assert plan is not None, "no uniform plan fits the budget"
    return plan
