"""TFDS builders for the data that works with no network: shipped files and the standard library.

A builder is an ordinary `GeneratorBasedBuilder`: of documents, with a `text` feature, or of rows with
several fields (pairs, labelled examples), which `fastlm.data.examples` reads. To add one, write its
file here and its line in `sources.BUILT_IN`. `dataset_info` is shared because the usual
`dataset_info_from_configs` looks for metadata files in a TFDS source tree.
"""

from pathlib import Path

import tensorflow_datasets as tfds

FILES = Path(__file__).parent.parent / "files"


def dataset_info(
    builder: tfds.core.DatasetBuilder, description: str, **features: tfds.features.FeatureConnector
) -> tfds.core.DatasetInfo:
    """Returns the info of a data set with these `features`."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(features),
    )
