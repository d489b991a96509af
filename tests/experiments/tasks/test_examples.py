"""Draws of tasks, the settings built from them, and the model that is asked."""
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.config import MQARConfig, SelectivBenchConfig, TaskConfig
from experiments.tasks.examples import SPLITS, sample_batch, split_key
from experiments.tasks.model import TaskModel
from experiments.tasks.mqar import MQAR
from experiments.tasks.settings import Setting, settings_of
from experiments.tasks.training import _sources_of_calls, in_turn
from tests.support.models import make_stack


def test_splits_seeds_and_batches_share_no_sequence():
    draw = jax.jit(lambda key, index: sample_batch((MQAR(64, 16, 4),), 0, key, index, 20).inputs)
    batches = [draw(split_key(seed, split, source), index)
               for seed in (0, 1) for split in SPLITS for source in (0, 1) for index in (0, 1)]
    sequences = {sequence.tobytes() for batch in batches for sequence in np.asarray(batch)}
    assert len(sequences) == 20 * len(batches) == 20 * 32
    assert (draw(split_key(1, "test", 1), 1) == batches[-5]).all()


def test_sources_of_one_length_are_padded_to_the_most_questions():
    sources, key = (MQAR(64, 16, 4), MQAR(64, 16, 1)), split_key(0, "train")
    full, padded, alone = jax.jit(lambda: (
        sample_batch(sources, 0, key, 0, 3), sample_batch(sources, 1, key, 0, 3),
        sample_batch(sources[1:], 0, key, 0, 3)))()
    assert (full.labels >= 32).all()
    assert (padded.labels[:, :1] == alone.labels).all() and (padded.labels[:, 1:] == -1).all()
    assert (padded.inputs == alone.inputs).all() and (padded.positions[:, :1] == alone.positions).all()


def test_every_start_of_training_draws_from_sources_by_their_shares():
    drawn = np.array(list(itertools.islice(in_turn((5.0, 1.0, 2.0)), 160)))
    for length in (8, 40, 160):
        counts = np.bincount(drawn[:length], minlength=3)
        np.testing.assert_allclose(counts, np.array([5, 1, 2]) * length / 8, atol=1)


def test_a_call_draws_from_sources_of_one_length_and_each_as_often_as_its_share_says():
    sources = (MQAR(64, 16, 1), MQAR(64, 32, 2), MQAR(64, 16, 3))
    setting = Setting("x", sources, (2.0, 4.0, 2.0), (), 64, 64)
    drawn = [[members[index] for index in chosen]
             for members, chosen in itertools.islice(_sources_of_calls(setting, 5), 16)]
    assert all(len({source.length for source in call}) == 1 for call in drawn)
    counts = [sum(call.count(source) for call in drawn) for source in sources]
    assert counts == [20, 40, 20]


def test_selectivbench_has_the_settings_and_columns_of_its_kinds():
    data = SelectivBenchConfig(alphabets=(4, 5), depth=2, longer_gaps=(7,))
    config = TaskConfig(data=data, stack=make_stack(8, head_width=8), mixers=("m",))
    columns = {setting.name: [column.name for column in setting.columns] for setting in settings_of(config, 0)}
    assert columns["gaps5"] == ["gaps, 5 symbols", "gaps of 7, 5 symbols"]
    kinds = ("complexity", "gaps", "distractors")
    assert list(columns) == [f"{kind}{symbols}" for symbols in (4, 5) for kind in kinds]
    only = dataclasses.replace(data, kinds=("generalisation",), alphabets=(4,))
    [setting] = settings_of(dataclasses.replace(config, data=only), 0)
    trained, [tested] = setting.sources[0], setting.columns
    assert trained.gaps == (1, 10) and tested.source.gaps == (7, 7) and tested.source.noise == trained.noise == 0.2


def test_one_model_per_kind_is_tested_on_its_own_kind():
    data = MQARConfig(
        one_model=False, train_lengths=(64, 128), train_pairs=(4, 8), train_shares=(1.0, 1.0),
        test_lengths=(64, 128), test_pairs=(4, 8))
    settings = settings_of(TaskConfig(
        data=data, stack=make_stack(8, head_width=8), mixers=("m",)), 0)
    assert [setting.name for setting in settings] == ["64x4", "128x8"]
    assert all(setting.sources == (setting.columns[0].source,) for setting in settings)


def test_logits_at_positions_are_those_of_these_steps():
    model = TaskModel("t1", make_stack(8, num_heads=1), 8, 8, conv_taps=2)
    inputs = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)

    @jax.jit
    def logits():
        params = model.init(jax.random.key(0), *inputs)
        return model.apply(params, *inputs), model.apply(params, *inputs, jnp.array([[4, 1]]))

    everywhere, there = logits()
    np.testing.assert_allclose(there, everywhere[:, [4, 1]], atol=1e-6)
    assert np.ptp(everywhere, axis=1).min() > 0
