"""Meshes, the rules that place arrays on them, and runs over several processes."""
