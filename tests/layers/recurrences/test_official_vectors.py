"""Matrix recurrences against the official vectors: outputs, states and gradients; hostile gates too."""
import jax.numpy as jnp
import pytest

from tests.support.golden_cases import assert_golden_case, golden_case, golden_cases
from tests.support.recurrence_cases import (
    run_delta,
    run_delta_product,
    run_hgrn2,
    run_linear_attention,
    run_rwkv6,
    run_rwkv7,
    run_ssd,
)

RECURRENCES = {  # name of the vectors: the function, and the names of its inputs there
    "rec_simple_gla": (run_linear_attention, "q k v g"),
    "rec_ssd": (run_ssd, "C B X A"),
    "rec_gla": (run_linear_attention, "q k v g"),
    "rec_hgrn2": (run_hgrn2, "q v g"),
    "rec_rwkv6": (run_rwkv6, "q k v g u"),
    "rec_deltanet": (run_delta, "q k v beta"),
    "rec_gated_deltanet": (run_delta, "q k v beta g"),
    "rec_kda": (run_delta, "q k v beta g"),
    "rec_comba": (run_delta, "q k v beta g p"),
    "rec_gdn2": (run_delta, "q k v g b w"),
    "rec_gated_delta_product": (run_delta_product, "q k v beta g"),
    "rec_rwkv7": (run_rwkv7, "r w k v a b"),
}


@pytest.mark.parametrize("implementation", ["reference", "chunkwise"])
@pytest.mark.parametrize("name", RECURRENCES)
def test_outputs_states_and_gradients_are_those_of_the_official_vectors(name, implementation):
    recur, names = RECURRENCES[name]
    cases = golden_cases(name)
    assert len(cases) >= 2, "mild and hostile gates"
    for case in cases:
        data = golden_case(name, case)
        segments = None if "segment_ids" not in data else jnp.asarray(data["segment_ids"])

        def run(x, segments=segments):
            initial = x.get("h0")
            if segments is not None:
                initial = initial[None]  # one per segment of the only row
            return recur(x, initial_state=initial, segment_ids=segments, implementation=implementation)

        assert_golden_case(run, data, f"{names} h0", "o ht")
