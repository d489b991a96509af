import numpy as np

from layers import segment_ordinals, segment_positions, segment_starts

IDS = np.array([[0, 5, 5, 0, 0, 2, 9, 9, 9, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3], [0] * 10])


def test_starts_are_the_first_tokens_of_segments_and_never_padding():
    starts = np.asarray(segment_starts(IDS))
    assert [list(np.flatnonzero(row)) for row in starts] == [[1, 5, 6], [0], []]


def test_positions_restart_with_every_segment():
    positions = np.asarray(segment_positions(IDS))
    assert list(positions[0][[1, 2, 5, 6, 7, 8]]) == [0, 1, 0, 0, 1, 2]
    assert list(positions[1]) == list(range(10))


def test_ordinals_number_segments_and_padding_belongs_to_the_one_before():
    ordinals = np.asarray(segment_ordinals(IDS))
    assert list(ordinals[0]) == [1, 1, 1, 1, 1, 2, 3, 3, 3, 3]
    assert set(ordinals[1]) == set(ordinals[2]) == {1}
