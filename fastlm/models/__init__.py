"""Model definitions: one Transformer, configured by `ModelConfig`."""

from fastlm.models.config import Compute, LayerConfig, ModelConfig
from fastlm.models.transformer import Model, abstract

__all__ = ["Compute", "LayerConfig", "Model", "ModelConfig", "abstract"]
