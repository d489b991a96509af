"""Every numerical tolerance of the tests, and the golden vectors they share."""
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# RMS(error) / RMS(expected). One rounding to bfloat16 costs about 1.6e-3, whatever the length.
RMS_LIMIT = {"float32": 1e-6, "bfloat16": 2.5e-3}
WORST_OVER_RMS = 16  # an RMS alone would hide one bad element among a million

# Against vectors computed in float64: largest error over largest value.
GOLDEN_LIMIT = 1e-6
# A float32 factor per step, raised to the power of 71: rounding only the step size to float32, with all else in
# float64, already differs by 1.6e-6 from the gradients of those vectors.
GOLDEN_POWERS_LIMIT = 5e-6
# A quotient by a small difference of large terms: the equations stepped in float32 also differ by 4e-6.
GOLDEN_QUOTIENT_LIMIT = 8e-6
GOLDEN_LAYER_LIMIT = 5e-5
GOLDEN_GRADIENT_LIMIT = 1e-3  # plus GRADIENT_FLOOR; whole models, whose own float32 noise is 6e-5
GRADIENT_FLOOR = 1e-6
GOLDEN_LOGITS_ERROR = 1e-4  # absolute; logits reach about 5
GOLDEN_PROBABILITY_ERROR = 2e-5
GOLDEN_LOSS_ERROR = 2e-5
# SmolLM2 in float32 against a float64 forward of the same weights. Two float32 programs of others differ from it
# by 1e-4 in logits (5e-4 at 4,096 tokens), 5e-5 in nats (5e-4), 3e-6 in attention weights, 6e-5 in rotated keys.
PRETRAINED_LOGITS_ERROR = 1e-3
PRETRAINED_NATS_ERROR = 1e-3
PRETRAINED_BFLOAT16_MEAN_NATS = 2e-3  # the mean over a text, in bfloat16; other code differs by 3e-4
PRETRAINED_ATTENTION_ERROR = 1e-5
PRETRAINED_ROTATED_ERROR = 2e-4
PRETRAINED_HEAD_SCORE_ERROR = 0.1  # of a head over other random tokens: 0.07 was the largest of 20
# Over the row's largest value. The last blocks cancel most of 26,000 at position 0, but not its rounding.
PRETRAINED_HIDDEN_LIMIT = 2e-5
SAME_COMPUTATION = 2e-5  # absolute, on logits of order 1 computed in another order (packed, padded, permuted)
OTHER_DEVICES = 2e-6  # relative: losses of 20 steps of training on one device and on eight
FROZEN_FIRST_LOSS = 1e-6  # relative: the first loss of a run that an earlier version made; 2e-7 where it was made
FROZEN_LOSS = 1e-5  # relative: the losses of the next 50 steps, in which rounding adds up
ANOTHER_SUM_ORDER = 1e-5  # relative to the largest value: gradients of a batch and of its parts

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def assert_matches(actual, expected, *, dtype, scale: float = 1.0) -> None:
    """Asserts that every leaf of `actual` is finite and close to the same leaf of the exact `expected`."""
    limit = scale * RMS_LIMIT[jnp.dtype(dtype).name]

    def check(name, got, want):
        assert np.isfinite(got).all(), f"{name} has NaN or inf"
        error, size = got - want, np.sqrt(np.mean(want**2))
        rms, worst = np.sqrt(np.mean(error**2)), np.abs(error).max()
        assert rms <= limit * size, f"{name}: RMS error {rms / size:.1e} of its size, limit {limit:.1e}"
        assert worst <= WORST_OVER_RMS * limit * size, f"{name}: worst error {worst / size:.1e} of its size"

    _each_leaf(check, actual, expected)


def assert_golden(actual, expected, *, limit: float = GOLDEN_LIMIT, floor: float = 0.0) -> None:
    """Asserts that leaves are finite, with errors up to `limit` times the largest expected value, plus `floor`."""

    def check(name, got, want):
        assert np.isfinite(got).all(), f"{name} has NaN or inf"
        worst, allowed = np.abs(got - want).max(), limit * np.abs(want).max() + floor
        assert worst <= allowed, f"{name}: worst error {worst:.1e}, allowed {allowed:.1e}"

    _each_leaf(check, actual, expected)


def _each_leaf(check, actual, expected) -> None:
    def compare(path, got, want):
        name = jax.tree_util.keystr(path) or "output"
        got, want = _parts(got), _parts(want)
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        if want.size:
            check(name, got, want)

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def _parts(x) -> np.ndarray:
    """Returns x in float64; a complex x as its real parts followed by its imaginary parts."""
    x = np.asarray(x)
    return np.stack([x.real, x.imag]).astype(np.float64) if np.iscomplexobj(x) else x.astype(np.float64)
