"""Log-linear attention: both forms against the official vectors and each other, at any length, by segments."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import log_linear_attention
from layers.recurrences.log_linear_attention import num_levels_of
from tests.support.assertions import assert_matches
from tests.support.golden_cases import assert_golden_case, golden_case
from tests.support.inputs import Draw

NAMES = "q k v g level_scales"


@pytest.mark.parametrize("implementation", ["reference", "ladder"])
def test_outputs_and_gradients_are_those_of_the_official_vectors(implementation):
    def run(x):
        return (log_linear_attention(*(x[name] for name in NAMES.split()), implementation=implementation),)

    assert_golden_case(run, golden_case("rec_log_linear_attn", "c0"), NAMES)


@jax.jit
def _values_and_gradients(x, segment_ids):
    o, pull_back = jax.vjp(partial(log_linear_attention, segment_ids=segment_ids), *x)
    return o, pull_back(jnp.cos(o))


def _inputs(length):
    draw = Draw(length)
    # Rare, or nothing would be left for the larger blocks.
    log_decay = -jnp.where(draw.uniform(1, length, 2) < 0.02, 300 * draw.uniform(1, length, 2), 0.01)
    x = (draw(1, length, 1, 4), draw(1, length, 1, 4), draw(1, length, 2, 5), log_decay,
         draw(1, length, 2, num_levels_of(length)))
    return tuple(map(np.asarray, x))


SEGMENTS = {  # (id, length)
    "short": [(3, 3), (1, 2)],
    "long": [(0, 2), (7, 3), (2, 100), (0, 1), (3, 1), (4, 16), (9, 25), (0, 4)],
}


def _ids(segments):
    numbers, lengths = zip(*SEGMENTS[segments], strict=True)
    return np.repeat(np.asarray(numbers, np.int32), lengths)[None]


def test_segments_of_any_length_equal_those_alone_and_padding_reads_nothing():
    ids = _ids("long")
    x = _inputs(ids.shape[1])
    o, gradients = _values_and_gradients(x, ids)
    run = jax.jit(partial(log_linear_attention, implementation="reference"))
    assert_matches(o, run(*x, segment_ids=ids), dtype="float32", scale=4)
    for z in (o, *gradients):
        assert np.isfinite(z).all() and not np.any(z[ids == 0])
    alone = run(*(z[:, 5:105] for z in x))
    assert_matches(o[:, 5:105], alone, dtype="float32", scale=4)


def test_segments_in_a_row_shorter_than_a_chunk_equal_the_spec():
    ids = _ids("short")
    run = jax.jit(partial(log_linear_attention, segment_ids=ids), static_argnames="implementation")
    x = _inputs(ids.shape[1])
    assert_matches(run(*x, implementation="ladder"), run(*x, implementation="reference"), dtype="float32")


def test_what_does_not_fit_is_refused():
    q, k, v, log_decay, scales = _inputs(9)
    with pytest.raises(ValueError, match="level_scales has 4 levels, but 9 tokens have 5"):
        log_linear_attention(q, k, v, log_decay, scales[..., :4])
    with pytest.raises(ValueError, match="q and k have 2 heads, which must divide the 3 of v"):
        log_linear_attention(q.repeat(2, 2), k.repeat(2, 2), v[:, :, [0, 0, 0]], log_decay[:, :, [0] * 3],
                             scales[:, :, [0] * 3])
