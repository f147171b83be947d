"""E2M1, E4M3 and NVFP4 one Python float at a time, by looking at every representable value."""

from functools import cache

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FACTORS = [1.0, 1.5, 1.25, 1.12, 0.93, 0.87, 0.8, 0.73, 0.67, 0.6, 0.5]


@cache
def e4m3_values() -> list[float]:
    """Non-negative values in the order of their bytes 0x00-0x7E (0x7F is NaN): so the index's
    parity is the mantissa's."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return (subnormal + normal)[:127]


def nearest(x: float, values: list[float]) -> int:
    """Index of the value nearest to |x|; of two equally near the one with the even index. Infinity
    is nearest to the largest."""
    magnitude = min(abs(x), 2 * values[-1])
    return min(range(len(values)), key=lambda k: (abs(magnitude - values[k]), k % 2))


def e2m1(x: float) -> float:
    magnitude = E2M1[nearest(x, E2M1)]
    return -magnitude if x < 0 and magnitude else magnitude


def e2m1_code(x: float) -> int:
    index = nearest(x, E2M1)
    return index + 8 if x < 0 and index else index


def e4m3(x: float) -> float:
    magnitude = e4m3_values()[nearest(x, e4m3_values())]
    return -magnitude if x < 0 else magnitude


def span_scale(values: list[float], global_scale: float, search: bool) -> float:
    """E4M3 scale of one span: the first factor with the least squared error."""
    amax = max(abs(v) for v in values)
    best, best_error = 0.0, float("inf")
    for factor in FACTORS if search else [1.0]:
        scale = e4m3(min(448.0, max(2.0**-9, amax / 6 * factor * global_scale)))
        unit = scale / global_scale
        error = sum((e2m1(v / unit) * unit - v) ** 2 for v in values)
        if error < best_error * (1 - 1e-12):
            best, best_error = scale, error
    return best


def quantize_token(values: list[float], global_scale: float, group: int) -> list[float]:
    """What an NVFP4 activation quantizer makes of one token's inputs."""
    result = []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        scale = e4m3(min(448.0, global_scale * max(abs(v) for v in part) / 6))
        unit = scale / global_scale
        result += [e2m1(v / unit) * unit if scale else 0.0 for v in part]
    return result
