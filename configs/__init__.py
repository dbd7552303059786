"""Configs: values only; `base.py` has every key once, the others override it."""
