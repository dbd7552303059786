"""Puts a data set on disk: ``python -m fastlm.data.prepare lm1b --data_dir D``.

The only code of the project that lets TFDS use the network. Training and evaluation read what lies
under the data directory and nothing else. What ships with fastlm needs no such call (it is
prepared on first use) but may be named too. Public data sets may need TensorFlow to be built (and
Apache Beam, for the largest); reading them later needs neither.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from fastlm.data import sources, tfds_documents
from fastlm.data.directory import data_directory
from fastlm.errors import UserError, exit_on_user_error


def prepare(name: str, data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Prepares data set `name` (``lm1b``, ``wiki40b/en``, ``state_of_the_union``); returns its folder.

    A data set that is there in another file format is converted and stays where it is.

    Raises:
      UserError: TFDS does not know the name, or needs a package that is not installed.
    """
    root = data_directory(data_dir)
    if name in sources.BUILT_IN:
        return sources.prepare(name, root)
    if folder := tfds_documents.find_folder(name, root):
        _convert(folder)
        return folder
    return _download(name, root)


def _convert(folder: Path) -> None:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    if "array_record" in {file_format.value for file_format in builder.info.available_file_formats()}:
        return
    from tensorflow_datasets.scripts.cli import convert_format_utils

    try:
        convert_format_utils.convert_dataset(
            out_dir=None, out_file_format="array_record", dataset_version_dir=folder, num_workers=1
        )
    except ImportError as error:
        raise _missing_package(folder.name, error) from None


def _download(name: str, root: Path) -> Path:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        raise _unknown(name) from None
    except ImportError as error:
        raise _missing_package(name, error) from None
    except OSError as error:  # requests' connection errors are OSErrors
        raise UserError(f"'{name}' could not be fetched to {root} ({error}): check the network and the disk") from None
    return Path(builder.data_path)


def _unknown(name: str) -> UserError:
    if importlib.util.find_spec("tensorflow") is None:
        # TFDS skips, without a word, the builders that import it.
        return UserError(
            f"TFDS finds no data set '{name}', but without TensorFlow it sees only part of its catalogue: "
            "pip install tensorflow-cpu (only to prepare; reading needs none) or check the name"
        )
    return UserError(f"TFDS knows no data set '{name}': the names are at https://www.tensorflow.org/datasets/catalog")


def _missing_package(name: str, error: ImportError) -> UserError:
    missing = (error.name or "tensorflow").split(".")[0]
    package = {"tensorflow": "tensorflow-cpu", "apache_beam": "apache-beam"}.get(missing, missing)
    return UserError(
        f"preparing '{name}' needs the package {package}, once (reading it does not): pip install {package}, "
        "or prepare it elsewhere as array_record and copy the folder"
    )


def main() -> None:
    """Prepares the data sets named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastlm.data.prepare", description="Puts data sets on disk.")
    parser.add_argument("names", nargs="+", metavar="NAME", help="lm1b, c4/en, wiki40b/en, state_of_the_union, ...")
    parser.add_argument("--data_dir", default=None, help="default: FASTLM_DATA or ~/.cache/fastlm/data")
    arguments = parser.parse_args()
    with exit_on_user_error():
        for name in arguments.names:
            print(f"{name}: {prepare(name, arguments.data_dir)}")


if __name__ == "__main__":
    main()
