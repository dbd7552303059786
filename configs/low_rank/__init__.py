"""Zeros while a language model trains: one config per way, each with what its paper reached in the docstring."""
