"""The lowest floor: arithmetic on arrays, masks and caches, with no knowledge of models."""
