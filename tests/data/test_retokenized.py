"""Batches in another tokenizer's tokens: spans by hand, and that they are what both write of the same bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.evaluation import windows
from fastlm.data.packing import Piece, build_row, empty_row
from fastlm.data.retokenized import Retokenized, Retokenizer, spelled
from fastlm.data.tokenized import encode_documents
from fastlm.data.tokenizers.byte_level import ByteTokenizer
from tests.data.pieces import Pieces, packed


def rows(tokenizer, texts, length, overlap=0):
    """A batch whose rows have one window of a document each, first tokens of later windows unscored."""
    made = []
    for tokens in encode_documents(texts, tokenizer):
        for piece, context in windows(0, len(tokens) - 1, length, overlap):
            row = build_row([(tokens, piece)], length, tokenizer.pad)
            row["loss_mask"][:context] = 0
            made.append(row)
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


def written(tokenizer, ids, spans):
    """{span: what its tokens spell}"""
    return {n: b"".join(tokenizer.pieces[i] for i in ids[spans == n].tolist()) for n in np.unique(spans[spans > 0])}


def test_spans_by_hand_with_characters_of_several_bytes():
    """'aé€b' as a|é€|b| and as aé|€b|: one span of all the text, and one of the end."""
    own, other = Pieces("é€"), Pieces("aé", "€b")
    added = Retokenizer(own, other, 6)(packed(own, ["aé€b"], 5))
    assert [own.pieces[i].decode() for i in added["targets"][0, :4]] == ["a", "é€", "b", ""]
    assert [other.pieces[i].decode() for i in added["other_targets"][0, :3]] == ["aé", "€b", ""]
    assert added["spans"].tolist() == [[1, 1, 1, 2, 0]]
    assert added["other_spans"].tolist() == [[1, 1, 2, 0, 0, 0]]
    assert added["other_tokens"][0, 0] == other.bos and added["other_targets"][0, 2] == other.eos
    assert added["other_segment_ids"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert added["other_positions"].tolist() == [[0, 1, 2, 0, 0, 0]]
    assert added["other_loss_mask"].tolist() == [[1, 1, 1, 0, 0, 0]]


def test_one_tokenizer_has_a_span_for_every_token():
    one = Pieces("the", " state")
    batch = packed(one, ["the state", "of the state"], 24)
    added = Retokenizer(one, one, 24)(batch)
    scored = int(batch["loss_mask"].sum())
    assert (
        added["spans"][0, :scored].tolist() == list(range(1, scored + 1)) == added["other_spans"][0, :scored].tolist()
    )
    for name in ("tokens", "targets", "positions", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(added[f"other_{name}"], batch[name], err_msg=name)


def test_a_piece_may_begin_and_end_inside_a_character():
    """From the second byte of '€ab€' to its last but one 'ab' is read alone; the halves belong to no span."""
    own, other = ByteTokenizer(), Pieces("a€", "€")
    tokens = encode_documents(["€ab€"], own)[0]
    row = build_row([(tokens, Piece(0, 2, 8))], 6, own.pad)  # reads the second byte of the first €, ends in the last
    added = Retokenizer(own, other, 8)({name: value[None] for name, value in row.items()})
    assert [own.pieces[i] for i in tokens[2:9]] == [b"\x82", b"\xac", b"a", b"b", b"\xe2", b"\x82", b"\xac"]
    assert added["other_tokens"][0, 0] == ord("a"), "what is only half there is not read"
    assert added["spans"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert added["other_spans"].tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    short = build_row([(tokens, Piece(0, 2, 7))], 6, own.pad)
    added = Retokenizer(own, other, 8)({name: value[None] for name, value in short.items()})
    assert added["spans"].tolist() == [[0, 0, 1, 0, 0, 0]]


def test_starts_and_ends_are_each_tokenizers_own():
    """Without a start token the first token is predicted by nobody; the end follows the same bytes in both."""
    own, other = Pieces("ab"), Pieces("abc", bos=False)
    added = Retokenizer(own, other, 6)(packed(own, ["abcd"], 6))
    assert [own.pieces[i] for i in added["targets"][0, :4]] == [b"ab", b"c", b"d", b""]
    assert added["other_tokens"][0, 0] == other.numbers[b"abc"]
    assert added["spans"].tolist() == [[0, 0, 1, 2, 0, 0]]
    assert added["other_spans"].tolist() == [[1, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize("spaced", ["own", "other"])
def test_a_space_that_only_the_token_has_is_no_text(spaced):
    own, other = (Pieces(" a", "a", opens_with_space=name == spaced) for name in ("own", "other"))
    added = Retokenizer(own, other, 6)(packed(own, ["ab"], 4))
    assert added["spans"].tolist() == [[1, 2, 3, 0]]
    assert added["other_spans"].tolist() == [[1, 2, 3, 0, 0, 0]]


def test_what_is_spelled_otherwise_has_no_spans():
    own, other = Pieces(), Pieces(lower=True)
    added = Retokenizer(own, other, 20)(packed(own, ["Ab", "ab"], 8))
    assert added["spans"].tolist() == [[0, 0, 0, 1, 2, 3, 0, 0]]
    assert added["other_segment_ids"].tolist() == [[1] * 3 + [0] * 17]


def test_what_does_not_fit_is_cut_and_what_is_not_scored_left_out():
    own, other = Pieces("abcd", "ef"), Pieces()
    batch = packed(own, ["abcdef", "ef"], 6)
    assert Retokenizer(own, other, 5)(batch)["spans"].tolist() == [[1, 0, 0, 0, 0, 0]]
    assert Retokenizer(own, other, 8)(batch)["spans"].tolist() == [[1, 2, 3, 0, 0, 0]]
    batch["loss_mask"][0, 1] = 0
    added = Retokenizer(own, other, 12)(batch)
    assert added["spans"].tolist() == [[1, 0, 3, 4, 5, 0]]
    assert added["other_spans"].tolist() == [[1, 1, 1, 1, 0, 0, 3, 4, 4, 5, 0, 0]]


def test_rows_of_padding_stay_that():
    own = Pieces()
    row = empty_row(4, own.pad)
    added = Retokenizer(own, Pieces("ab"), 4)({name: value[None] for name, value in row.items()})
    assert not added["spans"].any() and not added["other_loss_mask"].any()


TEXT = st.text(st.sampled_from("abcé€😀 "), min_size=1, max_size=30)
VOCABULARY = st.lists(st.text(st.sampled_from("abcé€😀 "), min_size=2, max_size=4), max_size=6, unique=True)


@given(TEXT, VOCABULARY, VOCABULARY, st.booleans(), st.integers(2, 9), st.integers(0, 1))
@settings(deadline=None, max_examples=150)
def test_spans_partition_what_both_write(text, longer, others, opens, length, overlap):
    """Both write the same bytes in each span, spans follow each other without a gap, and none could be shorter."""
    own, other = Pieces(*longer), Pieces(*others, bos=opens)
    batch = rows(own, [text], length, overlap)
    added = Retokenizer(own, other, 200)(batch)
    for row in range(len(batch["tokens"])):
        spans, theirs = added["spans"][row], added["other_spans"][row]
        assert written(own, batch["targets"][row], spans) == written(other, added["other_targets"][row], theirs)
        for numbers in (spans, theirs):
            inside = numbers[np.flatnonzero(numbers)[0] : np.flatnonzero(numbers)[-1] + 1] if numbers.any() else []
            assert np.isin(np.diff(inside), (0, 1)).all(), "neighbours, in order"
        assert not (spans[batch["loss_mask"][row] == 0]).any()
        for number in np.unique(spans[spans > 0]):
            ends = [
                set(spelled(tokenizer, ids[numbers == number])[1].tolist())
                for tokenizer, ids, numbers in (
                    (own, batch["targets"][row], spans),
                    (other, added["other_targets"][row], theirs),
                )
            ]
            assert len(ends[0] & ends[1]) == 1, "no end in common but that of the span"
    if length > 2 * len(text.encode()) and opens:  # a document in one piece, predicted from its first byte
        assert len(written(own, batch["targets"][0], added["spans"][0])) >= 2
        whole = b"".join(written(own, batch["targets"][0], added["spans"][0]).values())
        assert whole == text.encode()


def test_the_position_is_that_of_the_batches():
    class Batches:
        identity, state, closed = "these", 0, False

        def __next__(self):
            self.state += 1
            return packed(Pieces(), ["ab" * self.state], 12)

        def get_state(self):
            return {"0": self.state}

        def set_state(self, state):
            self.state = state["0"]

        def close(self):
            self.closed = True

    own = Batches()
    joined = Retokenized(own, Retokenizer(Pieces(), Pieces("ab"), 12))
    assert joined.identity == own.identity
    first, state, second = next(joined), joined.get_state(), next(iter(joined))
    assert first["spans"].max() == 2 and second["spans"].max() == 3
    joined.set_state(state)
    again = next(joined)
    assert all(np.array_equal(again[name], second[name]) for name in second)
    joined.close()
    assert own.closed
