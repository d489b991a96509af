"""Dense attention in blocks: the reference's numbers and gradients, and no work where nothing is allowed."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import CAUSAL, SAME_SEGMENT, Attention, Window, token_info
from layers.attention.blockwise import attend_blockwise
from layers.attention.dense import attend_reference
from layers.attention.mask import pairs
from tests.support.assertions import assert_matches
from tests.support.inputs import Draw

B, T, S, H, N, K, V = 2, 11, 19, 6, 2, 8, 5
MASK = CAUSAL & SAME_SEGMENT & Window(9)
# Keys of a cache, in no order and with free slots, and of queries that follow; padding on either side.
POSITIONS = np.random.default_rng(0).permutation(S)[None, None] * np.ones((B, 1, 1), np.int32)
SLOTS = token_info(S, positions=POSITIONS[:, 0], segment_ids=(POSITIONS[:, 0] % 5 != 0).astype(np.int32))
QUERIES = token_info(T, positions=jnp.asarray([[*range(12, 12 + T)], [*range(3, 3 + T)]]),
                     segment_ids=jnp.asarray([[0, 0] + [1] * 9, [1] * 6 + [2] * 2 + [0] * 3]))


def _inputs(dtype="float32"):
    draw = Draw(0)
    return draw(B, T, H, K, dtype=dtype), draw(B, S, N, K, dtype=dtype), draw(B, S, N, V, dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"cap": 2.0, "key_bias": Draw(1)(B, N, S)}], ids=["plain", "capped"])
@pytest.mark.parametrize(("dtype", "block"), [("float32", 4), ("float32", 32), ("bfloat16", 4)])
def test_blocks_match_the_reference_in_value_and_gradient(dtype, block, options):
    inputs = _inputs(dtype)
    exact = [x.astype(jnp.float32) for x in inputs]

    def blocks(q, k, v):
        return attend_blockwise(q, k, v, mask=MASK, q_tokens=QUERIES, kv_tokens=SLOTS, scale=0.3, block=block,
                                **options)

    def reference(q, k, v):
        return attend_reference(q, k, v, pairs(MASK, QUERIES, SLOTS), scale=0.3, **options)

    def pulled(attended):  # an lse of -inf has no gradient
        lse = jnp.where(jnp.isfinite(attended.lse), attended.lse, 0)
        return jnp.sum(attended.o.astype(jnp.float32) ** 2) + jnp.sum(lse)

    actual, expected = jax.jit(blocks)(*inputs), jax.jit(reference)(*exact)
    np.testing.assert_array_equal(jnp.isfinite(actual.lse), jnp.isfinite(expected.lse))
    assert not jnp.isfinite(actual.lse).all() and actual.o.dtype == dtype
    finite = functools.partial(jnp.nan_to_num, neginf=0.0)
    assert_matches((actual.o, finite(actual.lse)), (expected.o, finite(expected.lse)), dtype=dtype)
    gradients = [jax.jit(jax.grad(lambda *x, run=run: pulled(run(*x)), argnums=(0, 1, 2)))(*x)
                 for run, x in ((blocks, inputs), (reference, exact))]
    assert_matches(*gradients, dtype=dtype, scale=4)


def test_a_block_without_an_allowed_pair_is_not_read():
    """Whatever is there, NaN too: a weight of 0 would not hide it."""
    q, k, v = _inputs()
    sees = token_info(S, positions=jnp.arange(S)[None])
    run = functools.partial(attend_blockwise, q, k, mask=CAUSAL, q_tokens=token_info(T), kv_tokens=sees, scale=1.0,
                            block=4)
    clear = run(v)
    unread, read = v.at[:, 12:].set(jnp.nan), v.at[:, 11:].set(jnp.nan)  # queries stand at 0 to 10
    np.testing.assert_array_equal(run(unread).o, clear.o)
    assert jnp.isnan(run(read).o[:, 8:]).all() and jnp.isfinite(run(read).o[:, :8]).all()


def test_many_queries_over_a_cache_run_in_blocks_on_cpus_and_few_do_not():
    layer = Attention(num_heads=2, rotary_width=4)
    params = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 3, 8)))

    def is_in_blocks(length):
        state = jax.eval_shape(lambda: layer.empty_state(1, 8, 300))
        x, ids = jax.ShapeDtypeStruct((1, length, 8), "float32"), jax.ShapeDtypeStruct((1, length), "int32")
        return "stablehlo.while" in jax.jit(layer.apply).lower(params, x, ids, state).as_text()

    assert is_in_blocks(65) and not is_in_blocks(64)
