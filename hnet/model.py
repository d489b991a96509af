"""H-Net: a language model over bytes that learns where to cut them (arXiv 2507.07955)."""
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from hnet.config import HNetConfig, StageConfig
from hnet.decode_state import StageState
from hnet.isotropic import Isotropic
from layers import Router, assign_chunks, chunk, dechunk, ratio_loss, straight_through
from layers.array_types import Array, Float, Int, Integer, Scalar, typed


@struct.dataclass
class StageOutput:
    """What the router of one stage did, at that stage's own length t."""

    boundary_prob: jax.Array   # [b, t] float32; 1 at the first token of a segment, 0 at padding
    boundary_mask: jax.Array   # [b, t] bool: every boundary, those past the capacity too
    mask: jax.Array            # [b, t] bool: True = a real token
    num_overflow: jax.Array    # [b] int32: boundaries past the capacity, whose tokens joined the chunk before
    capacity: int = struct.field(pytree_node=False)  # chunk slots per row

    @classmethod
    def of_padding(cls, batch: int) -> "StageOutput":
        """What a stage does with one padding token per row: nothing."""
        no, none = jnp.zeros((batch, 1), bool), jnp.zeros(batch, jnp.int32)
        return cls(jnp.zeros((batch, 1), jnp.float32), no, no, none, capacity=1)

    def ratio_loss(self, target: Scalar) -> jax.Array:
        """Eq. 10 over the batch's real tokens, for `target` tokens per chunk; see `layers.ratio_loss`."""
        return ratio_loss(self.boundary_prob, self.boundary_mask, self.mask, target)

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars over the batch's real tokens: how many became boundaries (F), and with what confidence (G)."""
        count = jnp.maximum(jnp.sum(self.mask, dtype=jnp.float32), 1)
        num_boundaries = jnp.sum(self.boundary_mask, dtype=jnp.float32)
        return {
            "boundary_rate": num_boundaries / count,
            "mean_boundary_prob": jnp.sum(self.boundary_prob) / count,
            "overflow_boundaries": jnp.sum(self.num_overflow, dtype=jnp.float32),
            "overflow_rows": jnp.sum(self.num_overflow > 0, dtype=jnp.float32),
        }


class HNetOutput(NamedTuple):
    logits: jax.Array                # [b, t, vocab] float32
    stages: dict[str, StageOutput]   # "stage0", ...: the stages that chunk, outermost first
    state: StageState | None         # after these tokens, if there was one to go on from


class HNetLM(nn.Module):
    """Embedding, the hierarchy, and a linear head."""

    config: HNetConfig

    @nn.compact
    @typed
    def __call__(
        self,
        tokens: Integer[Array, "b t"],
        segment_ids: Integer[Array, "b t"] | None = None,
        state: StageState | None = None,
    ) -> HNetOutput:
        """Predicts each next token from those before it in the same segment.

        Args:
          tokens: ids below vocab_size; one out of range makes its logits NaN.
          segment_ids: 0 = padding, anywhere in a row; non-zero ids are contiguous and unique within a row,
            and nothing crosses between them. None: each row is one segment. Logits at padding mean nothing.
          state: from `init_decode_state` or an earlier call, to go on from; every row is then one segment,
            and a row of padding is left as it was.
        """
        config = self.config
        width = config.stages[0].width
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        # A tied embedding is also the head, which at std 1 would start with enormous logits.
        std = 0.02 if config.tie_embeddings else 1.0
        init = nn.with_logical_partitioning(nn.initializers.normal(std), ("vocab", "embed"))
        embedding = self.param("embedding", init, (config.vocab_size, width))
        x = jnp.take(embedding, tokens, axis=0, mode="fill").astype(config.compute_dtype)
        x, stages, state = HNet(config, 0, name="stage0")(_constrain(x), segment_ids, state)
        if config.tie_embeddings:
            head = embedding.T
        else:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
            head = self.param("lm_head", init, (width, config.vocab_size))
        logits = jnp.einsum(
            "btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        return HNetOutput(logits, stages, state)


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
        self, x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"], state: StageState | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Any], StageState | None]:
        """Returns the output, what each stage from here inwards did, and the state if it was given one."""
        config, stage = self.config, self.config.stages[self.index]
        outer_width = x.shape[-1]
        if stage.width > outer_width:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
            extra = self.param("pad_dimension", init, (stage.width - outer_width,))
            extra = jnp.broadcast_to(extra.astype(x.dtype), (*x.shape[:-1], extra.shape[0]))
            x = jnp.concatenate([x, extra], axis=-1)

        before = state or StageState(None, None, None, None, None)
        h, encoder_state = self._stack(stage.encoder_runs, "encoder")(x, segment_ids, before.encoder)
        if not stage.decoder:
            return h[..., :outer_width], {}, None if state is None else before._replace(encoder=encoder_state)
        residual = self._residual_proj(stage)(h)

        boundary_prob, router_state = Router(name="router")(h, segment_ids, before.router)
        # Strictly greater: an all-zero sequence has p = 0.5 everywhere and would split at every byte.
        boundary_mask = boundary_prob > 0.5
        capacity = max(1, math.ceil(stage.capacity * x.shape[1]))
        plan = assign_chunks(boundary_mask, segment_ids, capacity)

        inner = HNet(config, self.index + 1, name=f"stage{self.index + 1}")
        chunks = _constrain(chunk(h, plan))
        z, inner_stages, inner_state = _run_inner(inner, chunks, plan.segment_ids, before.inner)

        # How sure the router was of what it did; a boundary past the capacity was not made.
        confidence = jnp.where(plan.starts_chunk, boundary_prob, 1 - boundary_prob)
        y, value = dechunk(z, boundary_prob, plan, initial_value=before.value)
        y = _constrain((y * straight_through(confidence)[..., None] + residual).astype(config.compute_dtype))
        y, decoder_state = self._stack(stage.decoder_runs, "decoder")(y, segment_ids, before.decoder)
        output = StageOutput(boundary_prob, boundary_mask, segment_ids != 0, plan.num_overflow, capacity)
        if state is not None:
            state = StageState(encoder_state, router_state, value, decoder_state, inner_state)
        return y[..., :outer_width], {f"stage{self.index}": output, **inner_stages}, state

    def _stack(self, runs: tuple[tuple[str, int], ...], name: str) -> Isotropic:
        std = 0.02 / math.sqrt(residual_depth(self.config, self.index))
        stage = self.config.stages[self.index]
        return Isotropic(runs, stage, std, self.config.compute_dtype, self.config.remat, name=name)

    def _residual_proj(self, stage: StageConfig) -> nn.Dense:
        """The skip path around the inner stages, in float32: closed at the start, but for its bias."""
        bound = stage.width**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        partitioned = nn.with_logical_partitioning
        return nn.Dense(
            stage.width, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST, name="residual_proj",
            kernel_init=partitioned(nn.initializers.zeros, ("embed", None)),
            bias_init=partitioned(uniform, ("norm",)))


def _run_inner(
    inner: HNet, chunks: jax.Array, segment_ids: jax.Array, state: StageState | None
) -> tuple[jax.Array, dict[str, StageOutput], StageState | None]:
    """Runs the stage within; while decoding single tokens only if some row has a chunk for it."""
    if state is None or chunks.shape[1] > 1:
        return inner(chunks, segment_ids, state)

    def skip(inner, chunks, segment_ids, state):
        names = [f"stage{index}" for index in range(inner.index, len(inner.config.stages) - 1)]
        return jnp.zeros_like(chunks), {name: StageOutput.of_padding(chunks.shape[0]) for name in names}, state

    run = lambda inner, *arguments: inner(*arguments)  # noqa: E731
    return nn.cond(jnp.any(segment_ids != 0), run, skip, inner, chunks, segment_ids, state)


def residual_depth(config: HNetConfig, index: int) -> int:
    """Writes to the residual stream from the outside down to stage `index`, for the scale of out-projections.

    A block writes once, one with a feed-forward twice; a stage adds its encoder and decoder to those around it.
    """
    runs = [run for stage in config.stages[: index + 1] for run in stage.encoder_runs + stage.decoder_runs]
    return sum(count * (2 if letter in "MT" else 1) for letter, count in runs)


def _constrain(x: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(x, ("activation_batch", "activation_length", "activation_embed"))
