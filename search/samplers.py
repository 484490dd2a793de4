"""Optuna's samplers by name. One is made anew for every trial, so none has a state to lose: what it
knows is in the trials of the study, and chance comes from the trial's own seed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

Sampler = Literal["tpe", "nsga2", "nsga3", "gp", "random"]

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

GENETIC: tuple[Sampler, ...] = ("nsga2", "nsga3")

POPULATION = 16
"""Of the genetic samplers. Optuna's 50 would not see a second generation in most searches."""


def make_sampler(
    name: Sampler,
    seed: int,
    startup: int = 0,
    space: Mapping[str, BaseDistribution] | None = None,
) -> BaseSampler:
    """The sampler of one trial; `startup` trials are drawn at random before it models any. `space`
    is what all trials of a study with results have in common, where it is known: Optuna finds it
    anew from every one of them, which is a fifth of a proposal's time."""
    from optuna import exceptions

    # NSGA-III and the GP are marked so; the tests keep them to the contract of the others.
    warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
    made = _made(name, seed, startup)
    if space is not None:
        known = {name: space[name] for name in sorted(space)}  # as Optuna sorts them
        made.infer_relative_search_space = lambda study, trial: known
    return made


def _made(name: Sampler, seed: int, startup: int) -> BaseSampler:
    from optuna import samplers

    if name == "tpe":
        return samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    if name == "nsga3":
        return samplers.NSGAIIISampler(population_size=POPULATION, seed=seed)
    if name == "gp":
        return samplers.GPSampler(n_startup_trials=startup, seed=seed)
    return samplers.RandomSampler(seed=seed)
