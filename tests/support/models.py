"""Small models with random weights far from their initial values, so that their routers cut at random."""
import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from hnet import (
    AttentionConfig,
    ChunkingConfig,
    HNetConfig,
    HNetLM,
    RecurrenceConfig,
    StackConfig,
    StageConfig,
    init_decode_state,
    parameter_shapes,
)
from tests.support.inputs import Draw

MARGIN = 1e-4  # least distance of probabilities from 1/2: rounding must not move a boundary


def make_stack(width: int, **fields) -> StackConfig:
    """A stack from fields of all its parts by their names; `head_width` is that of a recurrence."""
    recurrence, attention = _take(RecurrenceConfig, fields), _take(AttentionConfig, fields)
    return StackConfig(
        width=width, recurrence=RecurrenceConfig(**recurrence), attention=AttentionConfig(**attention), **fields)


def make_stage(width: int, encoder: str = "m4", decoder: str = "", **fields) -> StageConfig:
    """A stage from fields of all its parts by their names; see `make_stack`."""
    chunking = ChunkingConfig(**_take(ChunkingConfig, fields))
    return StageConfig(stack=make_stack(width, **fields), encoder=encoder, decoder=decoder, chunking=chunking)


def _take(kind: type, fields: dict) -> dict:
    """Removes the fields of a config class from `fields`, and returns them."""
    return {field.name: fields.pop(field.name) for field in dataclasses.fields(kind) if field.name in fields}


def two_stage_config(**stage_fields) -> HNetConfig:
    common = dict(num_heads=2, rotary_width=8, feed_forward_width=24, state_size=8, head_width=16)
    stages = (
        make_stage(width=16, encoder="m1", decoder="m1", **common, **stage_fields),
        make_stage(width=16, encoder="T1", decoder="m1", window=5, **common, **stage_fields),
        make_stage(width=24, encoder="t1", **{**common, "rotary_width": 12}),
    )
    return HNetConfig(stages=stages, vocab_size=61)


def random_params(config: HNetConfig, seed: int = 0) -> dict:
    """Draws weights large enough for many boundaries and logits of order 1."""
    draw = Draw(seed)

    def leaf(path, shape):
        name = path[-1].key
        if "scale" in name or name == "skip":
            return 1 + 0.1 * draw(*shape.shape)
        fan_in = shape.shape[-2] if len(shape.shape) > 1 and name != "embedding" else 1
        return draw(*shape.shape) / fan_in**0.5

    return jax.tree_util.tree_map_with_path(leaf, parameter_shapes(config))


@cache
def compiled(config: HNetConfig):
    return jax.jit(lambda params, tokens, segment_ids: HNetLM(config).apply(
        {"params": params}, tokens, segment_ids))


def clear_tokens(config: HNetConfig, params: dict, segment_ids: np.ndarray) -> np.ndarray:
    """Draws tokens for which all boundary probabilities are at least MARGIN away from 1/2."""
    run = partial(compiled(config), params)
    for seed in range(100):
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, segment_ids.shape, dtype=np.int32)
        output = run(tokens, segment_ids)
        if all((jnp.abs(stage.boundary_prob - 0.5) > MARGIN).all() for stage in output.stages.values()):
            return tokens
    raise AssertionError("no tokens with clear boundaries in 100 draws")


def one_stage_config(boundary_lm: HNetConfig | None = None, **stage_fields) -> HNetConfig:
    """Returns a config of attention alone, which compiles fast."""
    common = dict(num_heads=2, rotary_width=8, feed_forward_width=24)
    stages = (
        make_stage(width=16, encoder="t1", decoder="t1", **common, **stage_fields),
        make_stage(width=16, encoder="T1", **common),
    )
    return HNetConfig(stages=stages, vocab_size=61, boundary_lm=boundary_lm)


def stepped_logits(
    config: HNetConfig, params: dict, tokens: np.ndarray, *, prompt_lengths: tuple[int, ...],
    boundary_levels: np.ndarray | None = None, max_length: int = 0,
) -> np.ndarray:
    """Reads rows as ragged, left-padded prompts and then token by token; returns logits [b, t, vocab]."""
    num_rows, length = tokens.shape
    run = compiled_with_state(config)
    levels = boundary_levels
    read, size = np.array(prompt_lengths), max(prompt_lengths)
    span = [np.arange(size - n, size) for n in read]
    prompt, ids, prompt_levels = np.zeros((3, num_rows, size), np.int32)
    for row, n in enumerate(read):
        prompt[row, span[row]], ids[row, span[row]] = tokens[row, :n], 1
        prompt_levels[row, span[row]] = 0 if levels is None else levels[row, :n]
    state = init_decode_state(config, num_rows, max_length or length)
    output = run(params, prompt, ids, state, None if levels is None else prompt_levels)
    logits = np.full((num_rows, length, config.vocab_size), np.nan, np.float32)
    for row, n in enumerate(read):
        logits[row, :n] = output.logits[row, span[row]]
    while (read < length).any():
        active, position = read < length, np.minimum(read, length - 1)
        at = np.arange(num_rows), position
        output = run(params, tokens[at][:, None], active[:, None].astype(np.int32), output.state,
                     None if levels is None else levels[at][:, None])
        logits[active, position[active]] = output.logits[active, 0]
        read = read + active
    assert run._cache_size() <= 2, "one program for the prompts and one for every step"
    return logits


def compiled_with_state(config: HNetConfig):
    return jax.jit(lambda params, tokens, segment_ids, state, levels: HNetLM(config).apply(
        {"params": params}, tokens, segment_ids, state, boundary_levels=levels))
