"""The spec of the matrix recurrence: token by token, in float32."""
from functools import partial

import jax
import jax.numpy as jnp

from layers.recurrences.matrix.step_inputs import MatrixCall, StepInputs


def sequential(call: MatrixCall, inputs: StepInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns every o_t [b, t, n, r, v], in v's dtype, and the last state [b, n, r, k, v]."""
    answer = partial(jnp.einsum, "bnrkv,bnrk->bnrv", precision=jax.lax.Precision.HIGHEST)

    def step(state, token):
        q, k, v, log_decay, a, b = (None if x is None else x.astype(jnp.float32) for x in token)
        decayed = jnp.exp(log_decay)[..., None] * state
        if b is not None:
            after = decayed + _outer(b, answer(state, _repeat_heads(a, v))) + _outer(k, v)
        elif a is not None:
            after = decayed + _outer(k, v - answer(decayed, _repeat_heads(a, v)))
        else:
            after = decayed + _outer(k, v)
        o = call.scale * answer(state if call.reads_before else after, _repeat_heads(q, v))
        return after, o.astype(token.v.dtype)

    state, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs))
    return jnp.swapaxes(o, 0, 1), state


def _repeat_heads(x: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, (*v.shape[:3], x.shape[-1]))


def _outer(x: jax.Array, y: jax.Array) -> jax.Array:
    return x[..., :, None] * y[..., None, :]
