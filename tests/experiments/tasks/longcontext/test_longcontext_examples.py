"""Examples have exact lengths and depths, name the place of their answers, and are functions of seed and draw."""
import hashlib
import re
from itertools import pairwise

import numpy as np
import pytest

from experiments.data.tokenizer import ByteTokenizer, open_tokenizer
from experiments.errors import UsageError
from experiments.tasks.longcontext.examples import ROOM, Example, insert, split_answer
from experiments.tasks.longcontext.generators import CUE, KEYS, TASKS, Choices, Maker
from experiments.tasks.longcontext.prose import TOPICS, Prose
from experiments.tasks.longcontext.suite import plan, shared_contexts
from tests.support.small_tokenizer import write_tokenizer

DOCUMENTS = ["".join(f"Rule {number} holds.\n" for number in range(first, first + 50)).encode()
             for first in range(1000, 3000, 50)]
LENGTHS = (512, 700)


@pytest.fixture(scope="module", params=["bytes", "tokens"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return ByteTokenizer()
    pytest.importorskip("tokenizers")
    return open_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def _make(tokenizer, **choices) -> Maker:
    prose = Prose(DOCUMENTS, tokenizer, seed=choices.get("seed", 0), name="test")
    return Maker(prose, tokenizer, Choices(**choices))


def _all(make: Maker, tasks=tuple(TASKS), lengths=LENGTHS, draws=2) -> list[tuple[int, Example]]:
    return [(name.length, example) for name, examples in plan(make, tasks, dict.fromkeys(lengths, draws)).items()
            for example in examples]


@pytest.mark.parametrize("task", TASKS)
def test_a_context_has_its_length_and_leaves_room_for_question_and_answer(tokenizer, task):
    for length, example in _all(_make(tokenizer), [task]):
        assert len(example.context) == length - ROOM
        assert len(example.question) + len(example.answer) <= ROOM
        assert (example.context[0] == tokenizer.bos) == (tokenizer.bos is not None)


@pytest.mark.parametrize("task", ["needle", "multi_needle", "key_value"])
def test_the_fact_stands_once_where_the_example_says_and_is_answered_by_its_digits(tokenizer, task):
    for _, example in _all(_make(tokenizer), [task]):
        start, stop = example.origin
        passage, whole = (tokenizer.decode(ids) for ids in (example.context[start:stop], example.context))
        asked, answer = tokenizer.decode(example.question).strip(), tokenizer.decode(example.answer)
        assert re.fullmatch(rb"\d+", answer) and len(answer) == example.num_units
        assert whole.count(asked) == 1 and (asked + b" " + answer) in passage
        # The ids of question and answer are those of the passage, which induction could copy.
        ids = np.concatenate([example.question[-2:], example.answer])
        assert any((example.context[at : at + len(ids)] == ids).all() for at in range(start, stop))


def test_needles_are_at_their_depths_to_the_token(tokenizer):
    for _, example in _all(_make(tokenizer, depths=(0.0, 0.3, 1.0)), ["needle"]):
        start, stop = example.origin
        num_before = len(example.context) - (stop - start) - (tokenizer.bos is not None)
        assert start == round(example.depth * num_before) + (tokenizer.bos is not None)


def test_four_different_facts_are_spread_over_one_context(tokenizer):
    for name, examples in plan(_make(tokenizer), ["multi_needle"], {512: 2}).items():
        assert len(examples) == 4 and name.part == ""
        assert len({tuple(example.question) for example in examples}) == 4
        assert len({example.context.tobytes() for example in examples}) == 1
        starts = [example.origin[0] for example in examples]
        assert starts == sorted(starts) and min(b - a for a, b in pairwise(starts)) > 50


def test_keys_and_values_are_different(tokenizer):
    [(_, examples)] = TASKS["key_value"](_make(tokenizer, num_pairs=len(KEYS)), 900, 0)
    pairs = re.findall(rb"\n(\w+): (\d{3})(?=\n)", tokenizer.decode(examples[0].context))
    assert len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) == len(KEYS)


def test_a_copy_is_a_passage_of_the_text_and_is_not_in_the_text_of_its_control(tokenizer):
    (_, found), (part, without) = TASKS["copy"](_make(tokenizer), 700, 1)
    assert part == "control" and len(found) == len(without) == 3
    for example, control in zip(found, without, strict=True):
        passage = np.concatenate([example.question[-CUE:], example.answer])
        assert (example.context[slice(*example.origin)] == passage).all()
        assert (control.question == example.question).all() and (control.answer == example.answer).all()
        assert control.origin is None and len(control.context) == len(example.context)
        assert passage.tobytes() in example.context.tobytes()
        assert passage.tobytes() not in control.context.tobytes()
    text = found[0].context
    kept = np.delete(text, np.concatenate([np.arange(*example.origin) for example in found]))
    shift = int(tokenizer.bos is not None)
    assert (without[0].context[-len(kept) + shift :] == kept[shift:]).all()


def test_the_answer_of_position_is_the_same_for_all_lengths_and_follows_the_context(tokenizer):
    (_, short), (_, long) = _all(_make(tokenizer), ["position"], draws=1)
    assert (short.answer == long.answer).all() and (short.question == long.question).all()
    shift = int(tokenizer.bos is not None)
    assert (long.context[-len(short.context) + shift :] == short.context[shift:]).all()
    prose = _make(tokenizer).prose.last(0, len(long.context) + len(long.question) + len(long.answer) - shift)
    whole = np.concatenate([long.context[shift:], long.question, long.answer])
    assert (whole == prose).all()


def test_copy_and_position_read_one_context(tokenizer):
    groups = list(shared_contexts(plan(_make(tokenizer), ["copy", "position"], {512: 2})))
    assert [[(name.task, name.part) for name, _ in group] for group in groups] == 2 * [
        [("copy", ""), ("position", "")], [("copy", "control")]]


def test_examples_are_functions_of_the_seed_and_the_draw(tokenizer):
    def digest(seed):
        ids = [np.concatenate([example.context, example.question, example.answer])
               for _, example in _all(_make(tokenizer, seed=seed))]
        return [hashlib.sha256(each.tobytes()).hexdigest() for each in ids]

    assert digest(3) == digest(3)
    assert not set(digest(3)) & set(digest(4))
    assert len(set(digest(3))) == len(digest(3)), "draws, depths and lengths differ"


def test_a_test_does_not_depend_on_the_others_that_are_asked():
    make = _make(ByteTokenizer())
    alone = plan(make, ["key_value"], {512: 1})
    [name] = alone
    among = plan(make, list(TASKS), {512: 2, 700: 1})
    assert all((a.context == b.context).all() for a, b in zip(alone[name], among[name], strict=True))


def test_text_of_a_draw_is_whole_documents_with_one_end_for_all_lengths():
    prose = Prose(DOCUMENTS, ByteTokenizer())
    text = prose.last(0, 5000).tobytes()
    assert prose.last(0, 300).tobytes() == text[-4 * 300 :]
    articles = bytes(prose.last(0, 5000).astype(np.uint8)).split(b"\n\n")
    assert articles[-1] == b"" and all(article in {d.strip() for d in DOCUMENTS} for article in articles[1:-1])
    assert len(set(articles[1:-1])) == len(articles) - 2
    assert not (prose.last(1, 300) == prose.last(0, 300)).all()


def test_a_token_with_bytes_of_question_and_answer_belongs_to_the_answer():
    class Pairs(ByteTokenizer):
        """Tokens of two bytes."""
        num_bytes = np.full(65536, 2, np.int32)

        def encode(self, text):
            return np.frombuffer(text, np.uint16).astype(np.int32)

    question, answer = split_answer(Pairs(), b"abc", b"123")
    assert (len(question), len(answer)) == (1, 2)


def test_pieces_are_put_in_order_of_depth():
    ids, spans = insert(np.arange(10), [np.array([77, 78]), np.array([99])], [0.5, 0.5])
    assert ids.tolist() == [0, 1, 2, 3, 4, 77, 78, 99, 5, 6, 7, 8, 9] and spans == [(5, 7), (7, 8)]


@pytest.mark.parametrize(("change", "message"), [
    (lambda: Prose([b" \n", b""], ByteTokenizer(), name="files:x"), "--source=files:x has no text"),
    (lambda: Prose.of_source("", ByteTokenizer(), seed=0, held_out=False), "--source is empty; it can be topics"),
    (lambda: Prose([b"abc"], ByteTokenizer(), name="x").last(0, 100), "--source=x has 5 tokens of text, and a"),
    (lambda: TASKS["copy"](_make(ByteTokenizer()), 200, 0), "200 tokens are too few for the test copy"),
    (lambda: TASKS["key_value"](_make(ByteTokenizer()), 200, 0), "200 tokens have no room for"),
])
def test_texts_that_do_not_suffice_are_refused(change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        change()


def test_the_help_articles_of_python_are_text():
    prose = Prose.of_source(TOPICS, ByteTokenizer(), seed=0, held_out=False)
    assert prose.facts["documents"] > 50 and len(prose.facts["sha256"]) == 64
    assert re.search(r"articles of Python 3\.\d+\.\d+", prose.facts["source"])


@pytest.mark.parametrize(("question", "answer"), [(0, 5), (5, 0), (50, 50)])
def test_impossible_examples_are_refused(question, answer):
    with pytest.raises(ValueError, match=r"needle: a question"):
        Example("needle", *(np.zeros(size, np.int32) for size in (10, question, answer)), num_units=5)
