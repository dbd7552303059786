"""Turning a language model into text."""
