"""The beginning of a run: its config and its origin on disk, and a banner on the console."""
from pathlib import Path

import jax

from experiments.analysis.reference_lines import corpus_reference_lines
from experiments.config import RunConfig
from experiments.config.files import config_to_json
from experiments.data.bpe_tokenizer import BPETokenizer
from experiments.files import write_whole
from experiments.runs.manifest import write_manifest
from experiments.training.batches import RunData
from experiments.training.step import TrainState


def announce_run(config: RunConfig, workdir: Path, data: RunData, state: TrainState) -> None:
    """Writes config.json, manifest.json and the tokenizer's files, and prints what it takes to judge the run."""
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    fingerprint, lines = data.corpus.fingerprint, corpus_reference_lines(data.text)
    write_manifest(
        workdir, step=int(state.step), seed=config.seed, num_params=num_params, corpus=fingerprint,
        reference_lines=lines)
    if jax.process_index() == 0:
        write_whole(workdir / "config.json", config_to_json(config) + "\n")
        if isinstance(data.tokenizer, BPETokenizer):
            data.tokenizer.copy_to(workdir)
        device = jax.devices()[0]
        tokens = f", {fingerprint['tokens']:,} tokens" if "tokens" in fingerprint else ""
        print(f"{num_params:,} parameters on {jax.device_count()} x {device.device_kind}, run in {workdir}\n"
              f"corpus {config.data.source}: {fingerprint['files']:,} documents, {fingerprint['bytes']:,} bytes"
              f"{tokens}\n"
              "to compare, bits per byte on held-out text: "
              + ", ".join(f"{name} {value:.2f}" for name, value in lines.items()), flush=True)
