"""One Gaussian step of a flow from noise (t = 1) to data (t = 0), its density, and the KL between two such
steps.

x_t = (1 - t) x_0 + t x_1 with x_1 standard normal, and a velocity v that estimates x_1 - x_0. The following
SDE, which runs with dt < 0, has the same marginals at every noise level a:

    dx = [ v + sigma^2 / (2t) (x + (1 - t) v) ] dt + sigma dw,     sigma(t) = a sqrt(t / (1 - t))

(arXiv 2605.08063; Flow-GRPO, arXiv 2505.05470). One Euler-Maruyama step is `sde_step`; a = 0 is the ODE.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

# a float, a numpy array or a torch tensor
Value = Any


# rounding error of times, which are stored in float32
_ROUNDING = 1e-6


def sde_step(
    x: Value, v: Value, t: Value, dt: Value, noise_level: Value, noise: Value
) -> tuple[Value, Value, Value]:
    """One Gaussian step from time t to t + dt: (x_next, mean, std).

        mean = x (1 + sigma^2/(2t) dt) + v (1 + sigma^2 (1-t)/(2t)) dt
        std = sigma sqrt(-dt),     x_next = mean + std noise

    At t = 1, where sigma has a pole, the 1 - t in sigma is replaced by -dt: sigma = a / sqrt(-dt), mean = x
    (1 - a^2/2) + v dt, std = a. At noise_level a = 0: x_next = mean = x + v dt, std = 0 (Euler's step).

    x, v, noise: equal shapes; t, dt, noise_level: floats, or arrays that broadcast to this shape; std has
    the shape of t. 16-bit inputs would overflow, so they are widened to float32 first. ValueError for t
    outside (0, 1], dt >= 0, a step beyond t = 0, a negative noise level, and unequal shapes.
    """
    shapes = [np.shape(x), np.shape(v), np.shape(noise)]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"x, v and noise must have equal shapes, got {', '.join(str(tuple(shape)) for shape in shapes)}"
        )
    mean, std = step_moments(x, v, t, dt, noise_level)
    return mean + std * wide(noise), mean, std


def step_moments(x: Value, v: Value, t: Value, dt: Value, noise_level: Value) -> tuple[Value, Value]:
    """(mean, std) of the Gaussian step from time t to t + dt, by the formulas of `sde_step`.

    x, v: state and velocity, of equal shapes; t in (0, 1], dt < 0 and noise_level: floats, or arrays that
    broadcast to this shape. mean has the shape of x, std the shape of t. ValueError for shapes that do not
    fit.
    """
    x, v = wide(x), wide(v)
    shapes = {"x": x, "v": v, "t": t, "dt": dt, "noise_level": noise_level}
    shapes = {name: tuple(np.shape(value)) for name, value in shapes.items()}
    if shapes["x"] != shapes["v"] or not all(_fits(shape, shapes["x"]) for shape in shapes.values()):
        raise ValueError(
            "x and v must have equal shapes, and t, dt and noise_level must be numbers or broadcast to this "
            f"shape (t[:, None] for rows), got {shapes}"
        )
    of_x, of_v, std = step_factors(t, dt, noise_level)
    return x * of_x + v * of_v, std


def step_factors(t: Value, dt: Value, noise_level: Value) -> tuple[Value, Value, Value]:
    """(A, B, std) of the step with mean A x + B v. They depend neither on the state nor on the model."""
    t, dt, noise_level = wide(t), wide(dt), wide(noise_level)
    _check(t, dt, noise_level)
    # 1 - t, or -dt where t is exactly 1
    gap = (1 - t) + (t == 1) * -dt
    # sigma^2 / (2t)
    pull = noise_level**2 / (2 * gap)
    return 1 + pull * dt, (1 + pull * (1 - t)) * dt, noise_level * (-dt * t / gap) ** 0.5


def step_logp(x_next: Value, mean: Value, std: Value) -> Value:
    """log N(x_next; mean, std^2), summed over the last axis, so it is the log-density of a whole state in
    nats. ValueError where std is 0 (the ODE has no density).
    """
    x_next, mean, std = wide(x_next), wide(mean), wide(std)
    if not _all(std > 0):
        raise ValueError(
            "a step of the ODE has no density, because its std is 0. Sample with noise_level > 0."
        )
    z = (x_next - mean) / std
    return -(z * z / 2 + (_log(std) + 0.5 * math.log(2 * math.pi))).sum(-1)


def wide(value: Value) -> Value:
    """16-bit arrays and tensors as float32, wider ones unchanged, plain numbers as floats."""
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, np.ndarray):
        return value.astype(np.promote_types(value.dtype, np.float32), copy=False)
    import torch

    return value.to(torch.promote_types(value.dtype, torch.float32))


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """True if an array of this shape broadcasts to the shape `whole`."""
    return len(shape) <= len(whole) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False)
    )


def _check(t: Value, dt: Value, noise_level: Value) -> None:
    if not _all((t > 0) & (t <= 1)):
        raise ValueError(f"t must lie in (0, 1], where 1 is noise and 0 is data, got {t}")
    if not _all(dt < 0):
        raise ValueError(
            f"dt must be negative, because time runs from noise (t = 1) down to data (t = 0), got {dt}"
        )
    if not _all(t + dt >= -_ROUNDING):
        raise ValueError(f"a step must not end below t = 0, got t = {t} with dt = {dt}")
    if not _all((noise_level >= 0) & (noise_level < math.inf)):
        raise ValueError(f"noise_level must be 0 (the ODE) or a positive number, got {noise_level}")


def _all(condition: Value) -> bool:
    return condition if isinstance(condition, bool) else bool(condition.all())


def _log(value: Value) -> Value:
    if isinstance(value, float):
        return math.log(value)
    return np.log(value) if isinstance(value, np.ndarray) else value.log()


def kl_weight(t: Any, dt: Any, noise_level: Any) -> Any:
    """The weight w in KL = w |v_s - v_T|^2, in nats per squared velocity, with the shape of t. Arguments
    are floats, numpy arrays or torch tensors.

        w = |dt|/2 (sigma (1-t)/(2t) + 1/sigma)^2 = |dt|/2 (1-t)/t (a/2 + 1/a)^2     for t < 1
          = dt^2 / (2 a^2)                                                           at t = 1

    w is small near noise and grows like 1/t towards data. As a function of a, it is least at sqrt(2) and
    grows without bound towards 0. ValueError at noise level 0, and where `sde_step` raises it.
    """
    _, of_v, std = step_factors(t, dt, noise_level)
    smallest = std if isinstance(std, float) else std.min()
    if not smallest > 0:
        raise ValueError(
            "a step at noise level 0 has no density, so its KL is infinite: use weight = 'mse' in this "
            "velocity_kl, "
            "or sample with a noise_level above 0"
        )
    return of_v**2 / (2 * std**2)
