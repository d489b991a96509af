"""Costs of a config without running it: numbers counted by hand, and tables that line up."""
import json
import resource

import pytest

from experiments import describe
from experiments.analysis.flops import model_flops_per_byte
from experiments.config import RunConfig
from experiments.config.files import load_config
from experiments.errors import UsageError
from hnet import parameter_shapes
from tests.support.runs import config_of


def _describe(capsys, *arguments) -> str:
    describe.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_parameters_work_and_memory_of_a_small_model_are_those_counted_by_hand(tiny, capsys):
    told = json.loads(_describe(capsys, f"--config={tiny}", "--json"))
    attention_16, attention_32 = (3 * d * d + d * d + 2 * d for d in (16, 32))  # qkv, out, two norms
    router, residual, padding = 2 * 16 * 16, 16 * 16 + 16, 32 - 16
    expected = {"embedding, head": 2 * 256 * 16, "stage0": 2 * attention_16 + router + residual,
                "stage1": attention_32 + padding}
    assert {part["name"]: part["parameters"] for part in told["parts"]} == expected
    assert [part["bytes_per_token"] for part in told["parts"]] == [1, 1, 4]
    total = 4 * sum(expected.values())
    memory = told["memory"]
    assert memory["parameters"] == memory["gradients"] == total
    assert memory["optimizer"] == 2 * total + 2 * 4  # two moments, and the counters of Adam and of the schedule
    # In the decode state there is room for a chunk at every byte, whatever the capacity.
    caches = 4 * 32 * (2 * 2 * 16 + 2 * 32)  # bytes x positions x keys and values of two layers and of one
    others = memory["decode_state_per_row"] - caches
    assert 0 < others < 1500  # positions and lengths; what the router and the chunk of a row hold
    config = config_of(tiny)
    forward = model_flops_per_byte(config.model, 32, (4.0,))
    assert told["flops"] == {
        "forward_per_byte": forward, "training_per_byte": 3 * forward, "training_per_step": 3 * forward * 8 * 32}


def test_work_is_counted_at_the_compression_asked_for(tiny):
    work = [describe.describe_flops(config_of(tiny, f"tokens_per_chunk=({n},)")) for n in (2, 8)]
    assert work[0]["forward_per_byte"] > work[1]["forward_per_byte"]


def test_work_is_counted_at_the_bytes_per_chunk_that_a_run_realised(configs):
    config = describe.at_bytes_per_chunk(config_of(configs / "two_stage.py"), "2.5,10")
    assert config.tokens_per_chunk == (2.5, 4.0)
    parts = describe.describe_parts(config, parameter_shapes(config.model))
    assert [part.bytes_per_token for part in parts if part.name.startswith("stage")] == [1, 2.5, 10]
    assert describe.at_bytes_per_chunk(config, "1,1").tokens_per_chunk == (1.0, 1.0)


@pytest.mark.parametrize("text", ["", "3", "3,9,27", "9,3", "0,3", "0.5,2", "3,nan", "3,inf", "three,9", "3,,9"])
def test_bytes_per_chunk_that_cannot_be_are_refused(configs, text):
    with pytest.raises(UsageError, match=f"--bytes_per_chunk={text} must be one number per stage .*: 2 here"):
        describe.at_bytes_per_chunk(config_of(configs / "two_stage.py"), text)


def test_the_table_lines_up(tiny, capsys):
    lines = _describe(capsys, f"--config={tiny}", "--config.optimizer.ema_decay=0.9").splitlines()
    assert lines[0].split() == ["layers", "width", "bytes", "per", "token", "cut", "into", "chunks", "parameters",
                                "share"]
    end = lines[0].index("parameters") + len("parameters")
    assert [line[:end].split()[-1] for line in lines[1:5]] == ["8,192", "2,896", "4,176", "15,264"]
    text = "\n".join(lines)
    assert "  stage0            t1 .. t1" in text and "learned, 4 tokens" in text
    assert "attention counts as computed, with all its scores" in text
    assert "averaged weights" in text


def test_a_model_of_billions_is_described_without_its_weights(capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = _describe(capsys, "--config=hnet_2stage_xl")
    assert "1,603,492,224" in text and "6.41 GB" in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB; weights alone are 6.4 GB


def test_the_boundary_lm_is_a_part_of_its_own():
    config = load_config("blt_tiny_stdlib", [], RunConfig)
    parts = describe.describe_parts(config, parameter_shapes(config.model))
    assert [part.name for part in parts] == ["embedding, head", "boundary_lm", "stage0", "stage1"]


def test_compiling_adds_what_the_step_takes_and_says_that_it_takes_a_while(tiny, capsys):
    describe.main([f"--config={tiny}", "--compile", "--json"])
    out, err = capsys.readouterr()
    assert err.startswith("compiling the train step for 8 x cpu ...")
    memory = json.loads(out)["memory"]
    state = memory["parameters"] + memory["optimizer"]
    assert state < memory["step_arguments_per_device"] < state + 10_000  # and the rows of a batch
    assert memory["step_temporaries_per_device"] > 0


def test_unknown_configs_and_fields_are_refused():
    with pytest.raises(UsageError, match="did you mean 'hnet_2stage_xl'"):
        describe.main(["--config=hnet_2stage_x"])
    with pytest.raises(UsageError, match="no field 'tokens_per_chnk'; did you mean 'tokens_per_chunk'"):
        describe.main(["--config=hnet_2stage_xl", "--config.tokens_per_chnk=(2.0, 2.0)"])
