"""A language model by the transformers library with torch on CPUs, loaded from a directory of safetensors.

Attention is the library's default there (sdpa), and so is the cache (one that grows). Every call runs in
inference mode and makes logits for the last token alone.
"""
import time
from typing import Any

from serve import array, serve, threads


def make() -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads())
    kept: dict[str, Any] = {}

    def load(path: str, dtype: str) -> dict[str, Any]:
        kept.clear()
        kept["model"] = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        return {}

    def prefill(tokens: list[list[int]]) -> dict[str, Any]:
        """Reads rows of tokens; the cache is kept for `decode`."""
        with torch.inference_mode():
            ids = torch.tensor(tokens)
            start = time.perf_counter(), time.process_time()
            output = kept["model"](ids, use_cache=True, logits_to_keep=1)
            times = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        kept["cache"] = output.past_key_values
        return {**times, "logits": array(output.logits[:, -1].float().numpy())}

    def repeat(rows: int) -> dict[str, Any]:
        """Makes the cache of one row that of many."""
        kept["cache"].batch_repeat_interleave(rows)
        return {}

    def decode(tokens: list[list[int]]) -> dict[str, Any]:
        """Reads tokens [rows][steps] one step at a time, and continues from there at the next call."""
        with torch.inference_mode():
            ids = torch.tensor(tokens)
            start = time.perf_counter(), time.process_time()
            for step in range(ids.shape[1]):
                output = kept["model"](ids[:, step : step + 1], past_key_values=kept["cache"], use_cache=True)
                kept["cache"] = output.past_key_values
            times = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
        return {**times, "logits": array(output.logits[:, -1].float().numpy())}

    return {"load": load, "prefill": prefill, "repeat": repeat, "decode": decode}


if __name__ == "__main__":
    serve(["torch", "transformers"], make)
