"""The displacement delta = W - W_start of a weight matrix, described by its singular values s_1 >= ... >=
s_r, with r = min(rows, columns).

All functions take matrices as torch tensors and compute an exact singular value decomposition in the given
type (float32 in a run). This needs about 4 to 20 times rows x columns x r FLOP. They raise ValueError if the
argument is not a finite matrix. All except spectral_norm also raise it if delta is zero. arXiv 2605.11739.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# the default number of directions in `alignment`
K = 20


def spectral_norm(delta: Tensor) -> float:
    """s_1, the length of the displacement in its largest direction. 0 if nothing changed."""
    return float(singular_values(delta)[0])


def rho(delta: Tensor) -> float:
    """s_1 / sqrt(sum s_i^2): the share of the first direction in the norm of delta, in [1/sqrt(r), 1]."""
    return rho_of(_moved(singular_values(delta)))


def effective_rank(delta: Tensor) -> float:
    """The effective number of directions of the displacement `delta`, the change of one weight matrix, in
    [1, r]. It is exp of the entropy of z_i = s_i / sum s, where s_1 ... s_r are the r singular values of
    delta, not their squares.
    """
    return effective_rank_of(_moved(singular_values(delta)))


def top_norm_ratio(delta: Tensor, percent: float = 1.0) -> float:
    """sqrt(sum over i <= k of s_i^2 / sum s_i^2) with k = ceil(r percent / 100): the share of the first k
    directions in the norm of delta.

    It is at least rho, and equal to rho if k is 1 (1 percent of r <= 100). ValueError for a percentage
    outside (0, 100].
    """
    return top_norm_ratio_of(_moved(singular_values(delta)), percent)


def alignment(delta: Tensor, final: Tensor, k: int = K) -> float:
    """Mean over i <= min(k, r) of |<u_i(delta), u_i(final)>|, in [0, 1]. u_i is the i-th left singular
    vector.

    The absolute value is taken because the signs of singular vectors have no meaning. The official script
    aligns the signs with the previous step instead. ValueError for different shapes or k < 1.
    """
    if delta.shape != final.shape:
        raise ValueError(
            f"the two displacements differ in shape: {tuple(delta.shape)} and {tuple(final.shape)}"
        )
    return alignment_of(directions(delta, k)[1], directions(final, k)[1])


def singular_values(delta: Tensor) -> Tensor:
    """s, in decreasing order."""
    import torch

    return torch.linalg.svdvals(_checked(delta))


def directions(delta: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """(s, the first min(k, r) left singular vectors as columns) of a displacement that is not zero."""
    import torch

    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    u, s, _ = torch.linalg.svd(_checked(delta), full_matrices=False)
    return _moved(s), u[:, :k].contiguous()


def rho_of(s: Tensor) -> float:
    """rho from the singular values."""
    s = s.double()
    return float(s[0] / s.norm())


def effective_rank_of(s: Tensor) -> float:
    """effective_rank from the singular values; 0 log 0 = 0."""
    z = s.double() / s.double().sum()
    return math.exp(-float((z * z.clamp(min=1e-300).log()).sum()))


def top_norm_ratio_of(s: Tensor, percent: float) -> float:
    """top_norm_ratio from the singular values."""
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent:g}")
    s = s.double()
    # Rounded before ceil, because 64.4 percent of 250 is 161.00000000000003 in floating point.
    k = math.ceil(round(len(s) * percent / 100, 9))
    return float(s[:k].norm() / s.norm())


def alignment_of(u: Tensor, final_u: Tensor) -> float:
    """alignment from the left singular vectors, as columns."""
    return float((u.double() * final_u.double()).sum(0).abs().mean().clamp(max=1.0))


def _checked(delta: Tensor) -> Tensor:
    if delta.ndim != 2 or not delta.numel():
        raise ValueError(f"a displacement must be a matrix that is not empty, got shape {tuple(delta.shape)}")
    if not bool(delta.isfinite().all()):
        raise ValueError("the displacement has values that are not finite")
    return delta


def _moved(s: Tensor) -> Tensor:
    if not float(s[0]):
        raise ValueError("the displacement is zero, so it has no directions")
    return s
