"""Text or rows of fields in, batches out: sources, tokenizers, packing or bucketing, and resumable iterators.

The calls that the rest of the project needs: for text, `sources.load` with `tokenizers.make`, and
`pipeline.training_batches` with `pipeline.evaluation_batches`; for rows (pairs, labelled examples, questions),
`examples.load`, and `bucketing.training_batches` with `bucketing.evaluation_batches`.
"""
