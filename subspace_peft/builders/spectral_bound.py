"""An upper bound on what a subspace has missed of a second moment: the certificate of a streamed basis.

With orthonormal Q (d, w) and its complement, a second moment M (d, d) reads ``M = [[H, Rᵀ], [R, E]]``, where
``H = QᵀMQ`` (w, w) is known from the last pass, and so is R (as a matrix of w columns). Of E only the largest
eigenvalue matters; it is bounded by a few random vectors, to which E is applied twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

PROBES = 32  # random vectors per side: where one eigenvalue stands out, the bound is about 1.7 times as large
PROBE_PASSES = 2  # each one more pass over the stack, which brings the bound nearer by a root
DOUBT = 1e-9  # the chance, over the draw of the probes alone, that a bound does not hold

Apply = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def largest_missed(apply: Apply, Q: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Return per side an upper bound on the largest eigenvalue of ``E = (I − QQᵀ) M (I − QQᵀ)``.

    For a Gaussian block X of s columns, drawn without regard to Q, ``‖Eᵖ X‖₂ ≥ λᵖ ‖xᵀX‖₂`` with x E's first
    eigenvector, and ``‖xᵀX‖₂²`` is χ² distributed with s degrees of freedom, so ``λ ≤ (‖Eᵖ X‖₂ / √q)^(1/p)`` with q
    its quantile (after Dixon 1983). ``P(χ²_s ≤ q) ≤ (q/2)^(s/2) / (s/2)!`` gives q. The bound holds but for a chance
    of `DOUBT`, whatever the data.

    Args:
        apply: blocks of vectors (out, n) and (in, n) float64 → the second moments times them.
        Q: per side orthonormal columns (d, w) float64.
    """
    draw = torch.Generator().manual_seed(1)
    X = [torch.randn(len(q), PROBES, generator=draw, dtype=torch.float32).double() for q in Q]
    # the basis that is deflated is rounded as in the products; what rounding leaves of it is removed in float64
    X = [x - q @ (q.T @ x) for q, x in zip(Q, X, strict=True)]
    grown = [1.0, 1.0]
    for _ in range(PROBE_PASSES):
        X = [z - q @ (q.T @ z) for q, z in zip(Q, apply(X), strict=True)]
        for side, x in enumerate(X):
            norm = float(torch.linalg.matrix_norm(x, 2))
            # ‖Eᵖ X‖₂ as a product of the norms of each step, so that Eᵖ neither overflows nor vanishes
            grown[side] *= norm
            X[side] = x / max(norm, 1e-300)
    half = PROBES // 2
    quantile = 2 * math.exp((math.log(DOUBT) + math.lgamma(half + 1)) / half)
    out, inner = ((norm / math.sqrt(quantile)) ** (1 / PROBE_PASSES) for norm in grown)
    return out, inner


def most_held(
    Q: torch.Tensor, Z: torch.Tensor, H: torch.Tensor, trace: float, missed: float | None
) -> Callable[[int], float]:
    """Return a function k → an upper bound on the share of M's trace that its k leading eigenvectors hold.

    In the basis of Q and its complement ``M = [[H, Rᵀ], [R, E]]`` with ``E ⪯ missed``. For every ε > 0 that is
    ``⪯ (H + RᵀR/ε) ⊕ (E + ε)``, so the k leading eigenvalues of M add up to at most ``Σ max(λ_i(H + RᵀR/ε), missed +
    ε)`` (Ky Fan's maximum principle); the best ε of a few is taken. Never more than the whole trace.

    Args:
        Q: (d, w) float64, orthonormal.
        Z: M Q (d, w) float64.
        H: QᵀMQ (w, w) float64, symmetric.
        trace: of M.
        missed: bound on E's largest eigenvalue, see `largest_missed`; None where it is not known: then nothing is
            bounded.
    """
    R = Z - Q @ H
    square = R.T @ R
    square = (square + square.T) / 2
    scale = float(torch.linalg.eigvalsh(H)[-1])

    def reach(k: int) -> float:
        if missed is None:
            return 1.0
        best = trace
        # a grid of half decades: the bound is flat around its best ε
        for exponent in range(15):
            epsilon = max(scale, 1e-300) * 10 ** (-exponent / 2)
            values = torch.linalg.eigvalsh(H + square / epsilon).flip(0)[:k]
            rest = missed + epsilon
            best = min(best, float(values.clamp_min(rest).sum()) + rest * max(0, k - len(values)))
        return best / trace

    return reach
