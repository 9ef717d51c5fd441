"""Student's t distribution, of any number of degrees of freedom from 1 on."""

from __future__ import annotations

import math

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)
MOST = 1e4  # degrees of freedom; with more it is normal to 4 digits


def two_sided(t: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Return the probability of a value farther from 0 than ``t``, elementwise.

    With t = √ν tan θ, the density is proportional to cos θ to the power of ν - 1.
    """
    freedom = np.clip(freedom, 1, MOST)
    half = (math.pi / 2 - np.arctan(np.abs(t) / np.sqrt(freedom))) / 2
    logs = [math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) for nu in freedom.tolist()]
    angles = math.pi / 2 - half[:, None] * (1 - NODES)
    areas = half * (np.cos(angles) ** (freedom[:, None] - 1) @ WEIGHTS)
    return np.minimum(1, 2 * np.exp(logs) / math.sqrt(math.pi) * areas)


def quantile(freedom: np.ndarray) -> np.ndarray:
    """Return the 97.5% quantiles, by bisection."""
    low, high = np.full(freedom.shape, 1.9), np.full(freedom.shape, 12.8)
    for _ in range(40):
        middle = (low + high) / 2
        outside = two_sided(middle, freedom) > 0.05
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    return (low + high) / 2
