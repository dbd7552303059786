"""Tokenizer files laid out as Helsinki-NLP's: two small SentencePiece models, one vocabulary in an order of its own."""

import io
import json

import sentencepiece

ENGLISH = ["the cat sat on the mat", "a dog in the fog", "the cat and the dog"] * 10
SPANISH = ["el gato en la casa", "un perro en el mar", "el gato y el perro"] * 10


def write(folder, codes=(">>spa<<",)):
    """Writes source.spm, target.spm and vocab.json, and returns what `vocab.json` holds."""
    pieces = []
    for name, sentences in {"source": ENGLISH, "target": SPANISH}.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )
        (folder / f"{name}.spm").write_bytes(model.getvalue())
        library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces += [library.id_to_piece(i) for i in range(3, library.get_piece_size())]
    pieces = ["</s>", "<unk>", *sorted({*pieces}), *codes, "<pad>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return vocabulary
