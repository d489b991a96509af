"""H-Net: a language model over bytes that learns where to cut them (arXiv 2507.07955)."""
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from hnet.config import HNetConfig, StageConfig
from hnet.decode_state import BoundaryState, DecodeState, StageState, advance
from hnet.inner_stage import InnerOutput, RoutedTokens, constrain, make_chunks, run_inner_stage, run_main_network
from hnet.layout import residual_depth
from hnet.routers import entropy_boundaries, make_router
from hnet.stack import Stack
from hnet.stage_output import StageOutput
from layers import (
    PoolingScores,
    RouterHints,
    carried_segment,
    count_in_segment,
    dechunk,
    last_real,
    segment_starts,
    smooth,
    straight_through,
)
from layers.array_types import Array, Float, Int, Integer, typed


class HNetOutput(NamedTuple):
    """Predictions of a model, and the choices of its routers.

    Attributes:
      logits: [b, t, vocab] float32; [b, 1, vocab] where only those after the last token were asked for.
      stages: "stage0", ...: the stages that chunk, outermost first.
      state: after these tokens, if there was one to continue from.
    """

    logits: jax.Array
    stages: dict[str, StageOutput]
    state: DecodeState | None


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
        logits_of: Literal["all", "last"] = "all",
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
          logits_of: "last" makes only the logits after the last token of each row, wherever padding is: those of
            all tokens of a long prompt may cost more than the layers. For a row of padding they mean nothing.
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
        if logits_of == "last":
            x = last_real(x, segment_ids)[:, None]
        logits = jnp.einsum(
            "btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        if state is not None:
            num_read, num_tokens = count_in_segment(
                segment_ids != 0, segment_ids, state.num_tokens, state.stage.encoder.segment)
            if logits_of == "last":
                num_read = last_real(num_read, segment_ids)[:, None]
            # The caches have no room for what comes after: better no logits than wrong ones.
            logits = jnp.where((num_read > state.max_length)[:, :, None], jnp.nan, logits)
            state = state.replace(
                stage=advance(config, state.stage, after), num_tokens=num_tokens, boundary=boundary)
        return HNetOutput(logits, stages, state)

    def _find_boundaries(
        self, tokens: jax.Array, segment_ids: jax.Array, state: DecodeState | None
    ) -> tuple[jax.Array, BoundaryState | None]:
        """Finds boundary levels for the router "entropy", by a language model that is not trained along."""
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
        """Encodes, routes, chunks, runs the main network on the chunks, dechunks and decodes (figure 1).

        Returns vectors of the width that came in, the choices of the routers from here inwards, and the state. In
        the state that is returned, updates of layers stand for their states: see `advance`.
        """
        stage, before = self._stage, StageState(None) if state is None else state
        h, encoder, _ = self._stack(stage.encoder, "encoder")(self._widen(x), segment_ids, before.encoder)
        if not stage.decoder:  # the innermost stage, whose encoder is the main network
            return h[..., : x.shape[-1]], {}, None if state is None else state.replace(encoder=encoder)
        p, router = make_router(stage.chunking, "router")(h, segment_ids, hints, before.router)
        length_embedding = self._length_embedding()

        def inside(inner: HNet, tokens: RoutedTokens, num_slots: int) -> InnerOutput:
            chunks = make_chunks(stage.chunking, tokens, num_slots, before, length_embedding)
            z, stages, inner_state = run_main_network(inner, chunks, before.inner)
            values, value = dechunk(
                z, tokens.boundary_prob, chunks.partition, smoothing=stage.chunking.upsampler == "smooth",
                initial_value=before.chunk_value, round_to_bfloat16=self.config.bfloat16_dechunk)
            return InnerOutput(values, chunks.partition.starts_chunk, jnp.int32(num_slots), stages,
                               dict(chunks.carried, chunk_value=value, inner=inner_state))

        inner = HNet(self.config, self.index + 1, name=f"stage{self.index + 1}")
        tokens = RoutedTokens(h, segment_ids, p, hints.boundary_levels, self._pooling_scores(h))
        output = run_inner_stage(inside, inner, tokens, stage.chunking, state)
        choices = StageOutput.of_chunks(p, segment_ids, output.starts_chunk, output.num_slots)
        y, token_value = self._join(tokens, output, choices, before)
        y, decoder, _ = self._stack(stage.decoder, "decoder")(y, segment_ids, before.decoder)
        stages = {f"stage{self.index}": choices, **output.stages}
        return y[..., : x.shape[-1]], stages, None if state is None else state.next(
            segment_ids, output.starts_chunk, encoder=encoder, router=router, decoder=decoder,
            token_value=token_value, **output.carried)

    @property
    def _stage(self) -> StageConfig:
        return self.config.stages[self.index]

    def _stack(self, layout: str, name: str) -> Stack:
        std = 0.02 / math.sqrt(stage_depth(self.config.stages[: self.index + 1]))
        return Stack(layout, self._stage.stack, std, self.config.compute_dtype, name=name)

    def _widen(self, x: jax.Array) -> jax.Array:
        """Appends learned features, the same for all tokens, up to the width of this stage."""
        num_extra = self._stage.stack.width - x.shape[-1]
        if not num_extra:
            return x
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
        extra = self.param("pad_dimension", init, (num_extra,)).astype(x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(extra, (*x.shape[:-1], num_extra))], axis=-1)

    def _pooling_scores(self, h: jax.Array) -> jax.Array | None:
        return PoolingScores(name="pooling")(h) if self._stage.chunking.downsampler == "attention" else None

    def _length_embedding(self) -> jax.Array | None:
        """Returns a vector for each length of a chunk, 0 at first; None where the stage has none."""
        num_lengths = self._stage.chunking.length_embedding
        if not num_lengths:
            return None
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed"))
        return self.param("length_embedding", init, (num_lengths, self._stage.stack.width))

    def _join(
        self, tokens: RoutedTokens, inner: InnerOutput, choices: StageOutput, before: StageState
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds the chunks' values, times the router's confidence, to a projection of the tokens."""
        values, token_value = inner.values, None
        if self._stage.chunking.upsampler == "smooth_tokens":
            values, token_value = _smooth_tokens(values, tokens.boundary_prob, tokens.segment_ids, before)
        # The router's confidence in what it did; a boundary past the last slot was not made.
        confidence = jnp.where(inner.starts_chunk, tokens.boundary_prob, 1 - tokens.boundary_prob)
        y = values * straight_through(confidence)[..., None] + self._residual_proj()(tokens.h)
        if self._stage.chunking.overflow == "error":
            y = jnp.where((choices.num_overflow > 0)[:, None, None], jnp.nan, y)
        return constrain(y.astype(self.config.compute_dtype)), token_value

    def _residual_proj(self) -> nn.Dense:
        """Makes the skip path around the inner stages, in float32: closed at the start, but for its bias."""
        width = self._stage.stack.width
        bound = width**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        partitioned = nn.with_logical_partitioning
        return nn.Dense(
            width, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST, name="residual_proj",
            kernel_init=partitioned(nn.initializers.zeros, ("embed", None)),
            bias_init=partitioned(uniform, ("norm",)))


def _smooth_tokens(
    values: jax.Array, boundary_prob: jax.Array, segment_ids: jax.Array, before: StageState
) -> tuple[jax.Array, jax.Array]:
    """Averages over tokens instead of chunks: s_t = p_t v_t + (1 - p_t) s_{t-1} (after arXiv 2601.22805)."""
    carried = None if before.last_segment is None else carried_segment(segment_ids, before.last_segment)
    smoothed = smooth(values, boundary_prob, segment_starts(segment_ids, carried), is_real=segment_ids != 0,
                      initial_value=before.token_value)
    return smoothed, smoothed[:, -1]  # padding leaves the average as it is


def stage_depth(stages: Sequence[StageConfig]) -> int:
    """Counts the writes to the residual stream from the outside down to the last of `stages`."""
    return residual_depth(*(layout for stage in stages for layout in (stage.encoder, stage.decoder)))
