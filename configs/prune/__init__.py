"""Students: one config per recipe, each with what its paper reached in the docstring."""
