"""Ridge regression from chunks of tokens, at a cost in proportion to the tokens.

1. Chunks are kept as they are while there are fewer tokens than inputs. Then they are summed to Gram matrices, in
   float64.
2. With fewer tokens than inputs, the dual problem is solved: an eigenvalue problem of the size of the tokens. Otherwise
   the primal one, of the size of the inputs. Both have the same solution.
3. Every candidate for the ridge is judged on held-out tokens, in the basis of the eigenvectors. So one
   eigenvalue problem serves all candidates.

Source: Hoerl and Kennard 1970; the dual form: Saunders, Gammerman and Vovk 1998.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

RIDGES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # times the mean of the Gram matrix' diagonal


class Ridge:
    """The regression `y = A w (+ c)`. The ridge with the lowest held-out error is chosen.

    Args:
        intercept: fit the constant `c`.
        ridges: candidates, as multiples of the mean of the Gram matrix' diagonal.
    """

    def __init__(self, intercept: bool, ridges: tuple[float, ...] = RIDGES):
        self.intercept, self.ridges = intercept, ridges
        self._fit, self._held_out = _Data(), _Data()

    def add(self, a: torch.Tensor, y: torch.Tensor, held_out: bool) -> None:
        """Add a chunk: `a`, `[tokens, inputs]`, and `y`, `[tokens, outputs]`."""
        if self.intercept:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        (self._held_out if held_out else self._fit).add(a, y)

    def solve(self) -> tuple[torch.Tensor, torch.Tensor | None, float, float]:
        """Solve for the weights. At least one chunk must be held out and one not.

        Returns:
            Weights, `[outputs, inputs]`; the intercept, `[outputs]`, or None; the ridge; and the held-out sum of squared
            errors over that of the targets.
        """
        fit, held = self._fit, self._held_out
        if fit.sums is None:  # fewer tokens than inputs
            a, y = fit.rows()
            gram = a @ a.T
            shift = gram.diagonal().sum() / a.shape[1]
        else:
            (gram, y), a = fit.sums, None
            shift = gram.diagonal().mean()
        values, vectors = torch.linalg.eigh(gram)
        rotated = vectors.T @ y  # `[eigenvalues, outputs]`
        basis = vectors if a is None else a.T @ vectors  # from coefficients to weights, `[inputs, eigenvalues]`
        error_of = held.error_in(basis)
        best: tuple[float, float, torch.Tensor] | None = None
        for ridge in self.ridges:
            coefficients = rotated / (values.clamp_min(0) + ridge * shift)[:, None]
            error = error_of(coefficients)
            if best is None or error < best[0]:
                best = error, ridge, coefficients
        assert best is not None, "there is at least one ridge"
        w = (basis @ best[2]).float()
        if self.intercept:
            return w[:-1].T.contiguous(), w[-1].contiguous(), best[1], best[0]
        return w.T.contiguous(), None, best[1], best[0]


@dataclass
class _Data:
    """Chunks of one part: as they are, or as sums."""

    chunks: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    sums: tuple[torch.Tensor, torch.Tensor] | None = None  # Gram matrix and product with the targets
    energy: float = 0.0  # sum of squares of the targets

    def add(self, a: torch.Tensor, y: torch.Tensor) -> None:
        self.energy += y.double().square().sum().item()
        if self.sums is None:
            self.chunks.append((a, y))
            if sum(len(chunk) for chunk, _ in self.chunks) < a.shape[1]:
                return
            waiting, self.chunks = self.chunks, []
        else:
            waiting = [(a, y)]
        for rows, targets in waiting:
            new = (rows.T @ rows).double(), (rows.T @ targets).double()
            self.sums = new if self.sums is None else (self.sums[0] + new[0], self.sums[1] + new[1])

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All chunks as one, in float64. They must not be summed."""
        a, y = zip(*self.chunks, strict=True)
        return torch.cat(a).double(), torch.cat(y).double()

    def error_in(self, basis: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """A function from coefficients in `basis` to the sum of squared errors over that of the targets."""
        if self.sums is None:
            a, y = self.rows()
            a = a @ basis
            return lambda w: ((y - a @ w).square().sum() / self.energy).item()
        gram, cross = basis.T @ self.sums[0] @ basis, basis.T @ self.sums[1]

        def error(w: torch.Tensor) -> float:
            return ((self.energy - 2 * (w * cross).sum() + (w * (gram @ w)).sum()) / self.energy).item()

        return error
