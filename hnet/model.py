"""H-Net: a language model over bytes that learns where to cut them (arXiv 2507.07955)."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import HNetConfig, StageConfig
from hnet.decode_state import BoundaryState, DecodeState, StageState, advance
from hnet.inner_stage import constrain, through_chunks
from hnet.layout import residual_depth
from hnet.routers import entropy_boundaries, make_router
from hnet.stack import Stack
from hnet.stage_output import StageOutput
from layers import (
    RouterHints,
    carried_segment,
    count_in_segment,
    last_segment,
    segment_starts,
    smooth,
    straight_through,
)
from layers.array_types import Array, Float, Int, Integer, typed


class HNetOutput(NamedTuple):
    logits: jax.Array                # [b, t, vocab] float32
    stages: dict[str, StageOutput]   # "stage0", ...: the stages that chunk, outermost first
    state: DecodeState | None        # after these tokens, if there was one to go on from


class HNetLM(nn.Module):
    """Embedding, the hierarchy, and a linear head."""

    config: HNetConfig

    @nn.compact
    @typed
    def __call__(
        self,
        tokens: Integer[Array, "b t"],
        segment_ids: Integer[Array, "b t"] | None = None,
        state: DecodeState | None = None,
        *,
        boundary_levels: Integer[Array, "b t"] | None = None,
    ) -> HNetOutput:
        """Predicts each next token from those before it in the same segment.

        Args:
          tokens: ids below vocab_size; one out of range makes its logits NaN.
          segment_ids: 0 = padding, anywhere in a row; non-zero ids are contiguous and unique within a row,
            and nothing crosses between them. None: each row is one segment. Logits at padding mean nothing.
          state: from `init_decode_state` or an earlier call. A row continues if its first segment is the one that
            it was in, and otherwise begins anew; a row of padding is left as it was. Logits of a segment past the
            state's max_length are NaN.
          boundary_levels: for stages whose router is "given": how many stages, from the outermost in, begin a
            chunk at each token; 0 = none. The first token of a segment begins one at every stage.
        Raises:
          ValueError: a stage needs boundary_levels and there are none.
        """
        config = self.config
        width = config.stages[0].stack.width
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        # A tied embedding is also the head, which at std 1 would start with enormous logits.
        std = 0.02 if config.tie_embeddings else 1.0
        init = nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "embed"))
        embedding = self.param("embedding", init, (config.vocab_size, width))
        x = jnp.take(embedding, tokens, axis=0, mode="fill").astype(config.compute_dtype)

        boundary = None
        if config.boundary_lm is not None:
            boundary_levels, boundary = self._find_boundaries(tokens, segment_ids, state)
        elif boundary_levels is not None:
            boundary_levels = jnp.asarray(boundary_levels, jnp.int32)
        hints = RouterHints(jnp.asarray(tokens, jnp.int32), boundary_levels)
        x, stages, after = HNet(config, 0, name="stage0")(
            constrain(x), segment_ids, hints, None if state is None else state.stage)
        if config.tie_embeddings:
            head = embedding.T
        else:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
            head = self.param("lm_head", init, (width, config.vocab_size))
        logits = jnp.einsum(
            "btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        if state is not None:
            num_read, num_tokens = count_in_segment(
                segment_ids != 0, segment_ids, state.num_tokens, state.stage.encoder.segment)
            # The caches have no room for what comes after: better no logits than wrong ones.
            logits = jnp.where((num_read > state.max_length)[:, :, None], jnp.nan, logits)
            state = state.replace(
                stage=advance(config, state.stage, after), num_tokens=num_tokens, boundary=boundary)
        return HNetOutput(logits, stages, state)

    def _find_boundaries(
        self, tokens: jax.Array, segment_ids: jax.Array, state: DecodeState | None
    ) -> tuple[jax.Array, BoundaryState | None]:
        """Boundary levels for the router "entropy", from a language model that is not trained along."""
        before = None if state is None else state.boundary
        output = HNetLM(self.config.boundary_lm, name="boundary_lm")(
            tokens, segment_ids, None if before is None else before.lm)
        levels, entropy = entropy_boundaries(
            output.logits, segment_ids, self.config.stages[0].chunking.entropy_threshold,
            None if before is None else before.entropy)
        return levels, None if before is None else BoundaryState(output.state, entropy)


class HNet(nn.Module):
    """One stage of the hierarchy with everything inside it; it calls itself for the stage within.

    Attributes:
      index: which stage of `config` this is; 0 is outermost.
    """

    config: HNetConfig
    index: int

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "b t d"],
        segment_ids: Int[Array, "b t"],
        hints: RouterHints,
        state: StageState | None = None,
    ) -> tuple[Float[Array, "b t d"], dict[str, StageOutput], StageState | None]:
        """Returns vectors of the width that came in, what the routers from here inwards did, and the state.

        In the state that is returned, updates of layers stand for their states: see `advance`.
        """
        config, stage = self.config, self.config.stages[self.index]
        outer_width, width = x.shape[-1], stage.stack.width
        if outer_width < width:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
            extra = self.param("pad_dimension", init, (width - outer_width,))
            extra = jnp.broadcast_to(extra.astype(x.dtype), (*x.shape[:-1], extra.shape[0]))
            x = jnp.concatenate([x, extra], axis=-1)

        before = StageState(None) if state is None else state
        h, encoder_state, _ = self._stack(stage.encoder, "encoder")(x, segment_ids, before.encoder)
        if not stage.decoder:
            return h[..., :outer_width], {}, None if state is None else state.replace(encoder=encoder_state)
        residual = self._residual_proj(width)(h)

        boundary_prob, router_state = make_router(stage.chunking, "router")(h, segment_ids, hints, before.router)
        # Strictly greater: an all-zero sequence has p = 0.5 everywhere and would split at every byte.
        boundary_mask = boundary_prob > 0.5
        inner = HNet(config, self.index + 1, name=f"stage{self.index + 1}")
        chunked = through_chunks(inner, config, h, boundary_prob, segment_ids, hints.boundary_levels, state)
        values, token_value = chunked.values, None
        if stage.chunking.upsampler == "smooth_tokens":
            values, token_value = _smooth_tokens(
                values, boundary_prob, segment_ids, before.token_value, before.last_segment)

        # How sure the router was of what it did; a boundary past the capacity was not made.
        confidence = jnp.where(chunked.starts_chunk, boundary_prob, 1 - boundary_prob)
        y = values * straight_through(confidence)[..., None] + residual
        num_overflow = jnp.sum(boundary_mask & ~chunked.starts_chunk, axis=1, dtype=jnp.int32)
        if stage.chunking.overflow == "error":
            y = jnp.where((num_overflow > 0)[:, None, None], jnp.nan, y)
        y, decoder_state, _ = self._stack(stage.decoder, "decoder")(
            constrain(y.astype(config.compute_dtype)), segment_ids, before.decoder)
        output = StageOutput(boundary_prob, boundary_mask, segment_ids != 0, num_overflow, chunked.capacity)
        if state is not None:
            _, num_chunks = count_in_segment(
                chunked.starts_chunk, segment_ids, state.num_chunks, state.last_segment)
            state = state.replace(
                encoder=encoder_state, router=router_state, pool=chunked.pool, chunk_value=chunked.chunk_value,
                token_value=token_value, num_chunks=num_chunks,
                last_segment=last_segment(segment_ids, state.last_segment),
                decoder=decoder_state, inner=chunked.inner)
        return y[..., :outer_width], {f"stage{self.index}": output, **chunked.stages}, state

    def _stack(self, layout: str, name: str) -> Stack:
        std = 0.02 / math.sqrt(stage_depth(self.config.stages[: self.index + 1]))
        return Stack(layout, self.config.stages[self.index].stack, std, self.config.compute_dtype, name=name)

    def _residual_proj(self, width: int) -> nn.Dense:
        """The skip path around the inner stages, in float32: closed at the start, but for its bias."""
        bound = width**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        partitioned = nn.with_logical_partitioning
        return nn.Dense(
            width, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST, name="residual_proj",
            kernel_init=partitioned(nn.initializers.zeros, ("embed", None)),
            bias_init=partitioned(uniform, ("norm",)))


def _smooth_tokens(
    values: jax.Array, boundary_prob: jax.Array, segment_ids: jax.Array, initial_value: jax.Array | None,
    last_id: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Averages over tokens instead of chunks: s_t = p_t v_t + (1 - p_t) s_{t-1} (after arXiv 2601.22805)."""
    restarts = segment_starts(segment_ids, None if last_id is None else carried_segment(segment_ids, last_id))
    smoothed = smooth(values, boundary_prob, restarts, is_real=segment_ids != 0, initial_value=initial_value)
    return smoothed, smoothed[:, -1]  # padding leaves the average as it is


def stage_depth(stages: Sequence[StageConfig]) -> int:
    """Counts the writes to the residual stream from the outside down to the last of `stages`."""
    return residual_depth(*(layout for stage in stages for layout in (stage.encoder, stage.decoder)))
