"""Matrix recurrences as functions of a dictionary of inputs, under the names of the official vectors."""
import jax.numpy as jnp

from layers import (
    dplr_recurrence,
    gated_delta_product,
    gated_delta_rule,
    gated_linear_attention,
    rwkv6_recurrence,
)
from tests.support.inputs import Draw

B, H, K, V = 2, 2, 8, 12


def run_linear_attention(x, **keywords):
    return gated_linear_attention(x["q"], x["k"], x["v"], x.get("g"), **keywords)


def run_hgrn2(x, **keywords):
    return gated_linear_attention(x["q"], 1 - jnp.exp(x["g"]), x["v"], x["g"], **keywords)


def run_ssd(x, **keywords):
    return gated_linear_attention(x["C"], x["B"], x["X"], x["A"], scale=1.0, **keywords)


def run_rwkv6(x, **keywords):
    return rwkv6_recurrence(x["q"], x["k"], x["v"], x["g"], x["u"], **keywords)


def run_delta(x, **keywords):
    return gated_delta_rule(x["q"], x["k"], x["v"], x.get("beta"), x.get("g"), read_key=x.get("p"),
                            erase=x.get("b"), write=x.get("w"), **keywords)


def run_delta_product(x, **keywords):
    length = x["q"].shape[1]  # the steps of a token follow each other
    k, v, beta = (z.reshape(z.shape[0], length, -1, *z.shape[2:]) for z in (x["k"], x["v"], x["beta"]))
    return gated_delta_product(x["q"], k, v, beta, x["g"], scale=1.0, **keywords)


def run_rwkv7(x, **keywords):
    return dplr_recurrence(x["r"], x["w"], x["k"], x["v"], x["a"], x["b"], **keywords)


def matrix_inputs(length, kind, dtype="float32"):
    """Draws inputs with keys of norm 1; kind is that of the decay, "none", "head" or "channel"."""
    draw = Draw(length)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    decay = {"none": None, "head": -jnp.abs(draw(B, length, H)),
             "channel": -20 * draw.uniform(B, length, H, K) ** 8}[kind]
    x = {"q": draw(B, length, H, K), "k": unit(draw(B, length, H, K)), "v": draw(B, length, H, V),
         "beta": 2 * draw.uniform(B, length, H)}
    x = {name: value.astype(dtype) for name, value in x.items()}
    return x | ({} if decay is None else {"g": decay}) | {"h0": draw(B, H, K, V)}
