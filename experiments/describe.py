"""Says what a config costs, or the model of a run, without running it or allocating any weights.

  python -m experiments.describe --config=hnet_2stage_xl [--bytes_per_chunk=2.7,7.0] [--compile]
  python -m experiments.describe --workdir=runs/smollm2

Work is counted at config.data.sequence_length and at config.tokens_per_chunk, which is how many of its own tokens
each stage has in a chunk and what a run aims at. --bytes_per_chunk says instead what a run realised. Where a run
has a tokenizer, its tokens are counted in place of bytes. A cache has room for config.model.context_length tokens,
or for config.data.sequence_length where there is no such limit.
"""
import dataclasses
import itertools
import json
import math
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import commands
from experiments.analysis.flops import model_flops_per_byte
from experiments.config import RunConfig
from experiments.config.command_line import split_overrides
from experiments.config.files import load_config
from experiments.errors import UsageError, run_command
from experiments.pages.tables import aligned
from experiments.runs.saved_run import SavedRun
from experiments.training.mesh import batch_sharding, make_mesh, use_mesh
from experiments.training.step import TrainState, compile_program
from hnet import decode_state_bytes


class Part(NamedTuple):
    """A stage, or what is around the stages."""

    name: str
    layers: str
    width: int
    chunks: str   # how its tokens are cut
    bytes_per_token: float  # tokens of the text where these are not bytes
    parameters: int


def main(argv: list[str]) -> None:
    parser = commands.parser(__doc__, "describe")
    parser.add_argument("--config", help="a name in configs/, or the path of a config file")
    parser.add_argument("--workdir", help="a run that saved a checkpoint, in place of --config")
    parser.add_argument("--bytes_per_chunk", metavar="BYTES,...",
                        help="bytes in a chunk of each stage that chunks, outermost first, such as 2.7,7.0")
    parser.add_argument("--compile", action="store_true",
                        help="also compile the train step for the devices here, and say what memory it takes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments, overrides = split_overrides(argv)
    arguments = parser.parse_args(arguments)
    config = _open(arguments.config, arguments.workdir, overrides)
    if arguments.bytes_per_chunk is not None:
        config = at_bytes_per_chunk(config, arguments.bytes_per_chunk)
    mesh = make_mesh(1, jax.devices()[:1])
    with use_mesh(mesh):
        state = compile_program(config, mesh).abstract_state
    parts, flops = describe_parts(config, state.params), describe_flops(config)
    memory = describe_memory(config, state)
    if arguments.compile:
        memory |= compiled_memory(config)
    if arguments.json:
        as_dicts = [part._asdict() for part in parts]
        print(json.dumps({"parts": as_dicts, "flops": flops, "memory": memory}, indent=2))
    else:
        print("\n".join(_tables(config, parts, flops, memory)))


def _open(name: str | None, workdir: str | None, overrides: list[str]) -> RunConfig:
    """Returns the config that one of --config and --workdir names."""
    if (name is None) == (workdir is None):
        given = "neither" if name is None else "both"
        raise UsageError(f"{given} of --config=NAME and --workdir=RUN given; give one")
    if name is not None:
        return load_config(name, overrides, RunConfig)
    with SavedRun.open(workdir, overrides=overrides) as saved:
        return saved.config


def at_bytes_per_chunk(config: RunConfig, text: str) -> RunConfig:
    """The same run with tokens_per_chunk such that "2.7,7.0" are the bytes in a chunk of each stage.

    Raises:
      UsageError: not one number per stage that chunks, or they fall going inward.
    """
    num_chunking = len(config.model.stages) - 1
    try:
        lengths = [1.0, *(float(part) for part in text.split(",") if text)]
        tokens = tuple(inner / outer for outer, inner in itertools.pairwise(lengths))
        if len(tokens) != num_chunking or not all(1 <= number < math.inf for number in tokens):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"--bytes_per_chunk={text} must be one number per stage that chunks, outermost first: {num_chunking} "
            "here; all are at least 1, and none is below the one before it") from None
    # What is realised may be 1, which no ratio loss could aim at.
    return dataclasses.replace(config, tokens_per_chunk=tokens, ratio_objective="none")


def describe_parts(config: RunConfig, params: Any) -> list[Part]:
    """The parts of the model, outermost first, with the parameters of each."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [entry.key for entry in path]
        stages = [key for key in keys if re.fullmatch(r"stage\d+", key)]
        name = "boundary_lm" if keys[0] == "boundary_lm" else stages[-1] if stages else "embedding, head"
        counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
    first = config.model.stages[0]
    parts = [Part("embedding, head", "", first.stack.width, "", 1.0, counts["embedding, head"])]
    if config.model.boundary_lm is not None:
        lm = config.model.boundary_lm.stages[0]
        parts.append(Part("boundary_lm", "frozen", lm.stack.width, "", 1.0, counts["boundary_lm"]))
    bytes_per_token = 1.0
    for index, stage in enumerate(config.model.stages):
        layers, chunks = stage.encoder, ""
        if stage.decoder:
            layers += f" .. {stage.decoder}"
            chunks = f"{stage.chunking.router}, {round(config.tokens_per_chunk[index], 2):g} tokens"
        name = f"stage{index}"
        parts.append(Part(name, layers, stage.stack.width, chunks, bytes_per_token, counts[name]))
        if stage.decoder:
            bytes_per_token *= config.tokens_per_chunk[index]
    return parts


def describe_flops(config: RunConfig) -> dict[str, float]:
    """Floating-point operations of the model, as `experiments.analysis.flops` counts them."""
    forward = model_flops_per_byte(config.model, config.data.sequence_length, config.tokens_per_chunk)
    training, unit = 3 * forward, _unit(config)
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    return {f"forward_per_{unit}": forward, f"training_per_{unit}": training,
            "training_per_step": training * tokens_per_step}


def describe_memory(config: RunConfig, state: TrainState) -> dict[str, int]:
    """Bytes of what a training run keeps, over all devices, and of what decoding one row keeps."""
    decode_state = decode_state_bytes(config.model.at_full_capacity(), 1, _room(config))
    memory = {"parameters": _num_bytes(state.params), "gradients": _num_bytes(state.params),
              "optimizer": _num_bytes(state.opt_state)}
    if state.ema:
        memory["average"] = _num_bytes(state.ema)
    return memory | {"decode_state_per_row": decode_state}


def compiled_memory(config: RunConfig) -> dict[str, int]:
    """Returns the memory that XLA sets aside on each device for the train step, on the mesh of training here."""
    mesh = make_mesh(config.model_axis)
    print(f"compiling the train step for {mesh.size} x {jax.devices()[0].device_kind} ...", file=sys.stderr)
    with use_mesh(mesh):
        program = compile_program(config, mesh)
        shape = (config.data.batch_size, config.data.sequence_length + 1)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        batch = {"tokens": tokens, "segment_ids": tokens}
        analysis = program.step.lower(program.abstract_state, batch).compile().memory_analysis()
    return {"step_arguments_per_device": analysis.argument_size_in_bytes,
            "step_temporaries_per_device": analysis.temp_size_in_bytes}


def _unit(config: RunConfig) -> str:
    return "token" if config.data.tokenizer else "byte"


def _room(config: RunConfig) -> int:
    """Returns the tokens that a decoding state is counted for."""
    return config.model.context_length or config.data.sequence_length


def _num_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _tables(
    config: RunConfig, parts: list[Part], flops: dict[str, float], memory: dict[str, int]
) -> list[str]:
    length, rows, unit = config.data.sequence_length, config.data.batch_size, _unit(config)
    total = sum(part.parameters for part in parts)
    per_token = "bytes per token" if unit == "byte" else "text tokens per token"
    header = ("", "layers", "width", per_token, "cut into chunks", "parameters", "share")
    table = [header] + [
        (part.name, part.layers, str(part.width), f"{part.bytes_per_token:.2f}", part.chunks,
         f"{part.parameters:,}", f"{part.parameters / total:.1%}") for part in parts
    ] + [("total", "", "", "", "", f"{total:,}", "")]
    work = [
        (f"forward, per {unit}", f"{_scaled(flops[f'forward_per_{unit}'])}FLOP"),
        (f"training, per {unit}", f"{_scaled(flops[f'training_per_{unit}'])}FLOP   "
                               "3 x forward; more where activations are computed again"),
        ("training, per step", f"{_scaled(flops['training_per_step'])}FLOP   {rows:,} rows"),
    ]
    names = {
        "parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer's state",
        "average": "averaged weights",
        "decode_state_per_row": "decoding, per row",
        "step_arguments_per_device": "train step's inputs, per device",
        "step_temporaries_per_device": "train step's temporaries, per device"}
    chunks = ", and for each to begin a chunk" if len(config.model.stages) > 1 else ""
    remarks = {"decode_state_per_row": f"   room for {_room(config):,} {unit}s{chunks}"}
    space = [(names[name], f"{_scaled(size)}B{remarks.get(name, '')}") for name, size in memory.items()]
    return [
        *_indented(table, left={0, 1, 4}), "",
        f"work in rows of {length:,} {unit}s; attention counts as computed, with all its scores",
        *_indented(work, left={0, 1}), "",
        "memory",
        *_indented(space, left={0, 1}),
    ]


def _indented(rows: list[tuple[str, ...]], left: set[int]) -> list[str]:
    return ["  " + line for line in aligned(rows, left=left, gap="   ")]


def _scaled(number: float) -> str:
    """Returns such as "12.3 G", to three digits or so."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


if __name__ == "__main__":
    run_command(main)
