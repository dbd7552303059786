"""Text in, batches out: sources, tokenizers, packing, and the resumable pipeline.

The two calls that the rest of the project needs are `sources.load` with `tokenizers.make`, and
`pipeline.training_batches` with `pipeline.evaluation_batches`.
"""
