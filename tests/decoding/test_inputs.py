"""What decoding starts from: padding, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.decoding import inputs
from fastlm.errors import UserError
from fastlm.models import ModelConfig

DECODER = ModelConfig(vocab_size=11, max_length=40, layers=1, width=8, heads=1)
PAIR = dataclasses.replace(DECODER, family="encoder_decoder", encoder_layers=1)
ENCODER = dataclasses.replace(DECODER, family="encoder", head="masked_language_model")


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1, max_size=4))
def test_padding_keeps_every_row(rows):
    padded, lengths = inputs.pad(rows)
    assert [row[:n].tolist() for row, n in zip(padded, lengths)] == rows
    assert padded.shape[1] in (16, 32, 64)
    assert padded.shape[1] // 2 < max(map(len, rows)) or padded.shape[1] == 16
    assert all(not row[n:].any() for row, n in zip(padded, lengths))


def test_sources_are_real_up_to_their_length_and_the_decoder_begins_with_its_start_token():
    made = inputs.make(PAIR, [np.array([3, 4]), [5]], 7, 4)
    assert made.prompts.tolist() == [[7], [7]]
    assert made.lengths.tolist() == [1, 1]
    assert made.segments.sum(axis=1).tolist() == [2, 1]
    np.testing.assert_array_equal(made.sources[:, :2] * made.segments[:, :2], [[3, 4], [5, 0]])


@pytest.mark.parametrize(
    ("cfg", "rows", "start", "message"),
    [
        (ENCODER, [[1]], None, "family 'encoder' with head 'masked_language_model' writes no text"),
        (dataclasses.replace(PAIR, head="none"), [[1]], 0, "with head 'none' writes no text"),
        (PAIR, [[1]], None, "start: an encoder-decoder needs the token"),
        (PAIR, [[1]], 11, "start: token 11 is outside the model's vocabulary of 11"),
        (PAIR, [], 0, "a source has no tokens"),
        (PAIR, [[1], []], 0, "a source has no tokens"),
        (PAIR, [[1] * 41], 0, "the longest source has 41 tokens, but the model's context is 40"),
        (PAIR, [[1], [3, 11]], 0, "input 1 has token 11, but the model's vocabulary has 11"),
        (DECODER, [[-1, 3]], None, "input 0 has token -1"),
        (DECODER, [[]], None, "a prompt has no tokens"),
        (dataclasses.replace(DECODER, attention="lsh"), [[1]], None, "kind 'lsh' cannot run step by step"),
        (
            dataclasses.replace(PAIR, cross_attention="linformer"),
            [[1]],
            0,
            "cross_attention: kind 'linformer' cannot run",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(cfg, rows, start, message):
    with pytest.raises(UserError, match=message):
        inputs.make(cfg, rows, start, 4)
