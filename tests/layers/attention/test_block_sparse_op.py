"""Transformations, dispatch, shapes that do not fit, and debugging, for all implementations."""
import dataclasses
import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from layers import BlockLists, Window, attend, merge, sharded_attend, token_info
from layers.arrays.dispatch import log_once
from layers.attention.block_lists import pack_query_bits
from tests.support.assertions import assert_matches
from tests.support.block_sparse_cases import Case, draw_inputs, values_and_gradients

CASE = Case(t=32, s=32, block_k=16, width=8, value_width=8, segments=True)
IMPLEMENTATIONS = {"xla": {}, "pallas_tpu": {"interpret": True}}


def _arguments(inputs):
    names = ("mask", "q_tokens", "kv_tokens", "blocks", "key_bias", "scale", "softcap", "sinks")
    return {name: getattr(inputs, name) for name in names}


def _attend(inputs, implementation="xla", **keywords):
    return attend(inputs.q, inputs.k, inputs.v, implementation=implementation, **_arguments(inputs), **keywords)


def _run(inputs, implementation="xla", **keywords):
    return _attend(inputs, implementation, **keywords).o


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_equals_a_loop_in_values_and_gradients(implementation):
    keywords = IMPLEMENTATIONS[implementation]
    one, other = draw_inputs(CASE, seed=1), draw_inputs(CASE, seed=2)
    both = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    run = partial(values_and_gradients, implementation=implementation, **keywords)
    mapped = jax.vmap(run)(both)
    looped = jax.tree.map(lambda *x: jnp.stack(x), run(one), run(other))
    assert_matches(mapped[:2], looped[:2], dtype="float32", scale=2)


def test_vmap_over_the_queries_alone_shares_keys_and_lists():
    inputs = draw_inputs(dataclasses.replace(CASE, shared_lists=True, segments=False))
    queries = jnp.stack([inputs.q, 2 * inputs.q])
    mapped = jax.vmap(lambda q: _run(inputs.replace(q=q)))(queries)
    assert_matches(mapped[1], _run(inputs.replace(q=queries[1])), dtype="float32")


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.save_only_these_names("block_sparse_attention")])
def test_remat_changes_no_gradient_and_a_policy_can_keep_the_output(policy, capsys):
    inputs = draw_inputs(CASE)

    def loss(q, attention):
        return jnp.sum(attention(q) ** 2)

    def attention(q):
        return _run(inputs.replace(q=q))

    plain = jax.grad(loss)(inputs.q, attention)
    rematerialised = partial(loss, attention=jax.checkpoint(attention, policy=policy))
    assert_matches(jax.grad(rematerialised)(inputs.q), plain, dtype="float32")
    jax.ad_checkpoint.print_saved_residuals(rematerialised, inputs.q)
    assert ("named 'block_sparse_attention'" in capsys.readouterr().out) == (policy is not None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_and_heads_spread_over_devices_equal_one_device(implementation):
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4],
                         axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs = draw_inputs(dataclasses.replace(
        CASE, select=True, sinks=True, positions=True, key_bias=implementation == "xla",
        token_heads=2 if implementation == "xla" else 1))
    keywords = dict(implementation=implementation, **IMPLEMENTATIONS[implementation])

    @jax.jit
    def sharded(q, k, v):
        return sharded_attend(mesh, q, k, v, **_arguments(inputs), **keywords)

    o, lse = sharded(inputs.q, inputs.k, inputs.v)
    expected_o, expected_lse = _attend(inputs, **keywords)
    assert_matches(o, expected_o, dtype="float32")
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    assert len(o.sharding.device_set) == 4
    gradient = jax.grad(lambda q: jnp.sum(sharded(q, inputs.k, inputs.v)[0] ** 2))(inputs.q)
    expected = jax.grad(lambda q: jnp.sum(_run(inputs.replace(q=q), **keywords) ** 2))(inputs.q)
    assert_matches(gradient, expected, dtype="float32", scale=2)


def test_outputs_over_disjoint_keys_merge_to_that_over_all_with_their_gradients():
    inputs = draw_inputs(dataclasses.replace(CASE, segments=False, density=1.0))
    mask = inputs.blocks.to_dense()
    is_even = jnp.arange(mask.shape[-1]) % 2 == 0
    blocks = [BlockLists.from_block_mask(mask & half, block_q=16, block_k=16) for half in (is_even, ~is_even)]

    def merged(q):
        return merge(*(_attend(inputs.replace(q=q, blocks=each)) for each in blocks)).o

    assert_matches(merged(inputs.q), _run(inputs), dtype="float32", scale=2)
    whole = jax.grad(lambda q: jnp.sum(_run(inputs.replace(q=q)) ** 2))(inputs.q)
    assert_matches(jax.grad(lambda q: jnp.sum(merged(q) ** 2))(inputs.q), whole, dtype="float32", scale=4)


def test_lists_may_change_without_compiling_again():
    run = jax.jit(_run)
    for seed in range(3):
        run(draw_inputs(CASE, seed=seed))
    assert run._cache_size() == 1


def test_auto_lowers_to_the_kernel_of_the_platform_not_of_the_host():
    case = Case(t=256, s=256, block_q=128, block_k=128)
    inputs = draw_inputs(case)
    traced = jax.jit(lambda inputs: _run(inputs, "auto")).trace(inputs)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(("device", "has_kernel"), [("NVIDIA H200", True), ("NVIDIA A100-SXM4-80GB", False)])
def test_auto_takes_the_hopper_kernel_on_a_hopper_gpu_alone(device, has_kernel):
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} has no Hopper kernel; 0.11 has")
    inputs = draw_inputs(Case(t=256, s=256, block_q=128, block_k=128, width=64, value_width=64, dtype="bfloat16"))
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device, None, "gpu"))
    with use_abstract_mesh(mesh):
        traced = jax.jit(lambda inputs: _run(inputs, "auto")).trace(inputs)
        assert ("mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()) == has_kernel


def test_auto_says_once_why_a_platform_goes_without_its_kernel(caplog):
    log_once.cache_clear()
    inputs = draw_inputs(CASE)  # blocks of 16
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            _run(inputs, "auto")
    messages = [record.message for record in caplog.records if "on tpu" in record.message]
    assert messages == ["block_sparse_attention runs as xla on tpu: block_q 16 is not a multiple of 128"]


def test_a_kernel_that_lacks_a_case_says_which():
    inputs = draw_inputs(CASE)
    with pytest.raises(NotImplementedError, match='"pallas_tpu": block_q 16 is not a multiple of 128'):
        _run(inputs, "pallas_tpu")
    blocks = BlockLists.from_block_mask(jnp.ones((1, 4, 256, 256), bool), block_q=128, block_k=128)
    q = jax.ShapeDtypeStruct((1, 32768, 4, 8), jnp.float32)
    with pytest.raises(NotImplementedError, match="lists of one batch row take 1028 KiB of scalar memory"):
        jax.eval_shape(lambda q: attend(q, q, q, blocks=blocks, implementation="pallas_tpu"), q)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(heads=3), "q has 3 heads, which is not a multiple of the 2 heads of k and v"),
    (dict(lists=3), "lists for 2 rows and 3 heads; rows may be 1 or 2, heads 1, 2 .* or 4"),
])
def test_heads_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _run(draw_inputs(dataclasses.replace(CASE, segments=False, **changes)))


def test_arguments_that_do_not_fit_are_refused():
    inputs = draw_inputs(CASE)
    tokens, blocks = inputs.q_tokens, inputs.blocks
    with pytest.raises(ValueError, match=r"lists 2 blocks of 16 queries and 2 of 16 keys; .* make 1 and 2"):
        _run(inputs.replace(q=inputs.q[:, :10], q_tokens=token_info(10)))
    with pytest.raises(ValueError, match="q, k, v are bfloat16, float32, float32"):
        _run(inputs.replace(q=inputs.q.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match=r"q_tokens.segment has shape \[2, 1, 31\]; \[2, 2, 32\] fits"):
        _run(inputs.replace(q_tokens=tokens._replace(segment=tokens.segment[:, :, :31])))
    with pytest.raises(ValueError, match=r"blocks.rows has shape \[2, 3, 1, 32\]"):
        rows = pack_query_bits(jnp.ones((2, 3, 32, 2), bool))
        _run(inputs.replace(blocks=dataclasses.replace(blocks, rows=rows)))
    with pytest.raises(ValueError, match="window -1 must be at least 0"):
        Window(-1)
    with pytest.raises(ValueError, match=r"softcap -1\.0 must be None or above 0"):
        _run(inputs.replace(softcap=-1.0))
    with pytest.raises(TypeError, match="parameter 'sinks'"):
        _run(inputs.replace(sinks=jnp.zeros(3)))


def test_wrong_lists_fail_where_they_are_known_and_in_debugging_where_they_are_traced():
    inputs = draw_inputs(CASE)
    wrong = dataclasses.replace(inputs.blocks, ids=inputs.blocks.ids + 5)
    with pytest.raises(ValueError, match="entries name no block"):
        _run(inputs.replace(blocks=wrong))

    @jax.jit
    def run(inputs):
        inputs.blocks.check(when_run=True)
        return _run(inputs)

    jax.block_until_ready(run(inputs))
    with pytest.raises(Exception, match="entries name no block"):
        jax.block_until_ready(run(inputs.replace(blocks=wrong)))
        jax.effects_barrier()


def test_traced_entries_that_name_no_block_are_as_if_they_were_not_there():
    inputs = draw_inputs(dataclasses.replace(CASE, density=1.0, segments=False))
    ids = inputs.blocks.ids.at[..., 0].set(99)
    counts = jnp.full_like(inputs.blocks.counts, 2)
    bad = dataclasses.replace(inputs.blocks, ids=ids, counts=counts)
    good = BlockLists.from_block_mask(
        jnp.zeros((2, 2, 2, 2), bool).at[..., 1].set(True), block_q=16, block_k=16)
    expected = _run(inputs.replace(blocks=good), "reference")
    assert_matches(jax.jit(_run)(inputs.replace(blocks=bad)), expected, dtype="float32", scale=2)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_memory_is_a_small_part_of_all_scores(with_gradient):
    tokens, heads = 4096, 8
    q = jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.float32)
    scores = jax.ShapeDtypeStruct((1, heads, tokens // 128, tokens // 128), jnp.float32)

    def attention(q, k, v, scores):
        blocks = BlockLists.from_top_k(scores, 4, block_q=128, block_k=128)
        return attend(q, k, v, blocks=blocks, implementation="xla").o

    def loss(*inputs):
        return jnp.sum(attention(*inputs) ** 2)

    run = jax.grad(loss, argnums=(0, 1, 2)) if with_gradient else attention
    memory = jax.jit(run).lower(q, q, q, scores).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.05 * 4 * tokens**2 * heads
