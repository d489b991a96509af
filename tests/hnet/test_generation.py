import jax
import numpy as np
import pytest

from hnet import BOS, HNetConfig, HNetLM, Sampling, generate, generate_text, sample
from hnet.generation import _programs
from tests.support.models import compiled, random_params, two_stage_config

CONFIG = two_stage_config()
PARAMS = random_params(CONFIG)
MODEL = HNetLM(CONFIG)
PROMPTS = [[5, 9, 3, 44], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
GREEDY = Sampling(temperature=0)


def _generate(prompts, **options):
    options = {"num_tokens": 8, "sampling": GREEDY} | options
    return np.stack(list(generate(MODEL, PARAMS, prompts, **options)), axis=1)


def test_greedy_continuations_are_those_of_the_whole_sequence_for_ragged_prompts():
    drawn = _generate(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *drawn[row]]
        tokens, ids = np.zeros((3, 24), np.int32), np.zeros((3, 24), np.int32)
        tokens[0, : len(text)], ids[0, : len(text)] = text, 1
        expected = np.argmax(compiled(CONFIG)(PARAMS, tokens, ids).logits[0], axis=-1)
        np.testing.assert_array_equal(drawn[row], expected[len(prompt) - 1 : len(text) - 1])


def test_a_row_depends_on_its_own_prompt_and_seed_alone():
    sampling = Sampling(temperature=1.5)
    together = _generate(PROMPTS, sampling=sampling, seeds=[3, 4, 5])
    alone = _generate([PROMPTS[1]] * 3, sampling=sampling, seeds=[4, 3, 4])
    np.testing.assert_array_equal(alone[0], together[1])
    np.testing.assert_array_equal(alone[2], together[1])
    assert (alone[1] != together[1]).any()


def test_one_program_per_prompt_bucket_and_one_for_every_step():
    sampling = Sampling(temperature=0.9)
    for prompts, num_tokens in ((PROMPTS, 4), ([[1], [2, 3], [4]], 5), ([[1] * 16, [2], [3]], 6)):
        list(generate(MODEL, PARAMS, prompts, num_tokens=num_tokens, sampling=sampling))
    programs = _programs(MODEL, sampling, None)
    sizes = programs.read._cache_size(), programs.next._cache_size()
    assert sizes[0] <= 2 and sizes[1] <= 2  # the last prompt fills its bucket, so its cache is one size larger


def test_a_row_ends_at_its_eos_and_the_batch_when_all_have_ended():
    free = _generate(PROMPTS)
    eos = int(free[0, 2])
    drawn = _generate(PROMPTS, eos=eos)
    first = [int(np.argmax(row == eos)) if eos in row else None for row in free]
    for row, at in enumerate(first):
        stop = drawn.shape[1] if at is None else at + 1
        np.testing.assert_array_equal(drawn[row, :stop], free[row, :stop])
        assert (drawn[row, stop:] == -1).all()
    only = _generate([PROMPTS[0]] * 2, eos=eos)
    assert only.shape[1] == first[0] + 1


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32)


@pytest.mark.parametrize(("sampling", "kept"), [
    (Sampling(), {0, 1, 2, 3, 4}), (Sampling(temperature=0), {0}), (Sampling(top_k=2), {0, 1}),
    (Sampling(top_p=0.65), {0, 1}), (Sampling(top_p=0.71), {0, 1, 2}), (Sampling(min_p=0.4), {0, 1, 2}),
    (Sampling(top_k=4, top_p=0.99, min_p=0.3), {0, 1, 2}),
])
def test_filters_keep_the_tokens_they_should_in_any_order_of_the_vocabulary(sampling, kept):
    order = np.array([3, 0, 4, 2, 1])
    logits = np.tile(np.log(PROBABILITIES[order]), (2000, 1))
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = order[np.asarray(jax.jit(sample, static_argnums=2)(logits, keys, sampling))]
    assert set(drawn.tolist()) == kept
    if len(kept) > 1:
        wanted = np.where(np.isin(np.arange(5), list(kept)), PROBABILITIES, 0)
        frequency = np.bincount(drawn, minlength=5) / 2000
        np.testing.assert_allclose(frequency, wanted / wanted.sum(), atol=0.04)


@pytest.mark.parametrize("fields", [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(min_p=2)])
def test_sampling_refuses_values_out_of_range(fields):
    with pytest.raises(ValueError, match="temperature and top_k must be >= 0"):
        Sampling(**fields)


def test_generate_refuses_empty_prompts_and_missing_seeds():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(MODEL, PARAMS, [[1], []], num_tokens=1))
    with pytest.raises(ValueError, match="2 prompts need as many seeds, not 1"):
        next(generate(MODEL, PARAMS, [[1], [2]], num_tokens=1, seeds=[0]))


@pytest.mark.slow  # the model reads prompts in pieces in test_decode.py
def test_long_prompts_are_read_in_pieces_with_the_same_result(monkeypatch):
    prompts = [list(range(40)), [7], list(range(17))]
    expected = _generate(prompts)
    monkeypatch.setattr("hnet.generation.LARGEST_PIECE", 16)
    np.testing.assert_array_equal(_generate(prompts), expected)


def test_max_length_must_hold_prompt_and_continuation():
    with pytest.raises(ValueError, match=r"max_length 10 has no room for 9 tokens and 8 more; it must be .* 17"):
        _generate(PROMPTS, max_length=10)
    np.testing.assert_array_equal(_generate(PROMPTS, max_length=17), _generate(PROMPTS))


def test_a_router_that_is_told_where_to_cut_cannot_generate():
    with pytest.raises(ValueError, match="loop over `step` with boundary_levels"):
        next(generate(HNetLM(CONFIG.with_chunking(router="given")), PARAMS, PROMPTS, num_tokens=1))


TEXT_CONFIG = HNetConfig(stages=CONFIG.stages[2:], vocab_size=260)  # a vocabulary with more than bytes
TEXT_PARAMS = random_params(TEXT_CONFIG)


def test_streamed_text_is_the_decoding_of_the_bytes_and_every_part_of_it_is_valid():
    prompts, sampling = ["gr\u00fc", "", "x\udcc3"], Sampling(temperature=2.0)  # the last ends within a character
    model = HNetLM(TEXT_CONFIG)
    parts = list(generate_text(model, TEXT_PARAMS, prompts, num_bytes=40, sampling=sampling))
    tokens = [[BOS, *prompt.encode("utf-8", "surrogateescape")] for prompt in prompts]
    drawn = np.stack(list(generate(
        model, TEXT_PARAMS, tokens, num_tokens=40, sampling=sampling, num_allowed=256)), axis=1)
    assert drawn.max() < 256
    for row, prompt in enumerate(prompts):
        text = "".join(part[row] for part in parts)
        whole = (prompt.encode("utf-8", "surrogateescape") + bytes(drawn[row].tolist())).decode("utf-8", "replace")
        kept = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "ignore")
        assert kept + text == whole
    assert any("\ufffd" in part for row in parts for part in row) and len(parts) == 41


class Pairs:
    """Tokens 0 to 99 stand for a byte and the space after it."""

    bos, eos, vocab_size = None, 24, 100

    def encode(self, text: bytes) -> list[int]:
        return [byte - 32 for byte in text[::2]]

    def decode(self, ids) -> bytes:
        return b"".join(bytes([index + 32, 32]) for index in ids)


def test_text_of_tokens_goes_through_a_tokenizer_up_to_its_end_token():
    model, sampling, tokenizer = HNetLM(TEXT_CONFIG), Sampling(temperature=2.0), Pairs()
    parts = list(generate_text(model, TEXT_PARAMS, ["a b ", "z "], tokenizer=tokenizer, num_tokens=60,
                               sampling=sampling, seeds=[3, 8]))
    drawn = np.stack(list(generate(
        model, TEXT_PARAMS, [[65, 66], [90]], num_tokens=60, sampling=sampling, num_allowed=100, seeds=[3, 8])), 1)
    for row, ids in enumerate(drawn.tolist()):
        kept = ids[: ids.index(24)] if 24 in ids else ids
        assert "".join(part[row] for part in parts) == tokenizer.decode(kept).decode("utf-8", "replace")
    assert (drawn == 24).any()


@pytest.mark.parametrize("counts", [
    {}, {"num_bytes": 3, "num_tokens": 3}, {"num_tokens": 3}, {"tokenizer": Pairs(), "num_bytes": 3},
    {"tokenizer": Pairs(), "num_bytes": 3, "num_tokens": 3}])
def test_text_has_one_count_that_fits_its_tokens(counts):
    with pytest.raises(ValueError, match="give num_bytes for a model of bytes, and num_tokens together with"):
        next(generate_text(HNetLM(TEXT_CONFIG), TEXT_PARAMS, ["a"], **counts))
