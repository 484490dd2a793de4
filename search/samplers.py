"""Optuna's samplers by name. One is made anew for every trial, so none has a state to lose: what it
knows is in the trials of the study, and chance comes from the trial's own seed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Sampler = Literal["tpe", "nsga2", "nsga3", "gp", "random"]

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

POPULATION = 16
"""Of the genetic samplers. Optuna's 50 would not see a second generation in most searches."""


def make_sampler(name: Sampler, seed: int, startup: int = 0) -> BaseSampler:
    """The sampler of one trial; `startup` trials are drawn at random before it models any."""
    from optuna import exceptions, samplers

    # NSGA-III and the GP are marked so; the tests keep them to the contract of the others.
    warnings.simplefilter("ignore", exceptions.ExperimentalWarning)
    if name == "tpe":
        return samplers.TPESampler(n_startup_trials=startup, multivariate=True, seed=seed)
    if name == "nsga2":
        return samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    if name == "nsga3":
        return samplers.NSGAIIISampler(population_size=POPULATION, seed=seed)
    if name == "gp":
        return samplers.GPSampler(n_startup_trials=startup, seed=seed)
    return samplers.RandomSampler(seed=seed)
