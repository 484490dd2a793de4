"""What scored plans teach about single pieces: damages corrected so that their sums fit.

Summed damage is an estimate: replacements meet each other's errors, not the teacher's states. The
correction stays additive, so that the exact solver can follow it: piece damages w of least

    Σ over scored plans (Σ w − L)² / L²  +  strength · Σ over pieces (w / (s · d) − 1)²,   w ≥ 0,

where L is a plan's measured fidelity loss, d a piece's own damage, and s the one factor between
summed damage and loss that fits best. Ridge regression towards what each piece did alone: a piece
moves as far as the plans that hold it say, and one that no scored plan holds is only scaled.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from search.solver import Pieces
from trainers.students.plan import BlockPlan, Plan

STRENGTH = 0.1
"""Weight of a piece's own damage against one scored plan."""


class Surrogate:
    """Corrected damages, from the plans that have been scored so far."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        # A teacher's own block does no damage, whatever stands beside it.
        self._places = {b: i for i, b in enumerate(b for b, p in pieces.items() if p.damage > 0)}
        count = len(self._places)
        self._damage = np.array([pieces[b].damage for b in self._places])
        # Of the first sum, with columns in units of d: what grows with every plan stays this small.
        self._squares: NDArray[np.float64] = np.zeros((count, count))
        self._targets: NDArray[np.float64] = np.zeros(count)
        self._summed, self._summed_squares, self._scored = 0.0, 0.0, 0
        self._factors: NDArray[np.float64] | None = None

    def learn(self, plan: Plan, loss: float) -> None:
        """A plan's measured fidelity loss; above 0."""
        row = np.zeros(len(self._places))
        for block in plan.blocks:
            if block in self._places:
                place = self._places[block]
                row[place] = self._damage[place] / loss
        self._squares += np.outer(row, row)
        self._targets += row
        self._summed += row.sum()
        self._summed_squares += row.sum() ** 2
        self._scored += 1
        self._factors = None

    def damage(self, plan: Plan) -> float | None:
        """The loss that is expected of a plan; None before any was scored."""
        if not self._scored:
            return None
        factors = self._fitted()
        places = [self._places[block] for block in plan.blocks if block in self._places]
        return float(sum(factors[place] * self._damage[place] for place in places))

    def pieces(self) -> Pieces:
        """The pieces with corrected damages; as they were before any plan was scored."""
        if not self._scored:
            return self._pieces
        factors = self._fitted()
        corrected: Mapping[BlockPlan, float] = {
            block: float(factors[place] * self._damage[place])
            for block, place in self._places.items()
        }
        return {
            block: piece._replace(damage=corrected.get(block, piece.damage))
            for block, piece in self._pieces.items()
        }

    def _fitted(self) -> NDArray[np.float64]:
        """By how much each piece's damage is multiplied."""
        from scipy.optimize import nnls

        if self._factors is None:
            scale = self._summed / self._summed_squares if self._summed_squares else 1.0
            moved = np.flatnonzero(self._squares.diagonal())
            self._factors = np.full(len(self._places), scale)
            if len(moved):
                # w = scale · d · x: the same least squares in x, by its normal equations.
                squares = scale**2 * self._squares[np.ix_(moved, moved)]
                squares[np.diag_indices(len(moved))] += STRENGTH
                triangle = np.linalg.cholesky(squares).T
                wanted = scale * self._targets[moved] + STRENGTH
                found, _ = nnls(triangle, np.linalg.solve(triangle.T, wanted))
                self._factors[moved] = scale * found
        return self._factors
