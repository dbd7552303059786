"""Data sets prepared by TensorFlow Datasets, read from disk without TensorFlow.

Notable: a data set that is not on disk is an error at once. TFDS itself would ask the network for
minutes and leave partial folders, so the folder is looked for first and training never prepares
anything but what ships with the project. Files must be `array_record`, the format that has random
access; `tfds` is imported late because it takes a second.
"""

import contextlib
import io
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlm.data.directory import create_once
from fastlm.data.documents import Documents, check_split, digest
from fastlm.errors import UserError

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_logger = logging.getLogger(__name__)


class TfdsDocuments(Documents):
    """The text field of one split of a prepared data set.

    Attributes:
      field: The feature that holds the text.
    """

    def __init__(self, folder: Path, source: str, split: str, field: str = "text") -> None:
        """Opens `split` of the data set in `folder` (which holds `dataset_info.json`).

        Raises:
          UserError: not in a format with random access, no such split or field, or no examples.
        """
        self._folder, self._split, self.field = folder, split, field
        self._opened: Any = None
        builder = open_builder(folder, source)
        check_split(split, builder.info.splits, source)
        _check_field(builder, field, source)
        info = builder.info.splits[split]
        if not info.num_examples:
            raise UserError(f"split '{split}' of '{source}' in {folder} is empty: prepare the data set again")
        self._length = info.num_examples
        self.name = f"{source}/{split}"
        self.num_bytes = int(info.num_bytes)
        # The builder's own name and version, not the bytes on disk: compression differs between machines.
        self.fingerprint = digest(builder.info.full_name, split, field, f"{self._length} {self.num_bytes}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> str:
        if self._opened is None:
            self._opened = open_builder(self._folder, self.name).as_data_source(split=self._split)
        value = self._opened[index][self.field]
        try:
            return value.decode("utf-8") if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError as error:
            raise UserError(
                f"record {index} of {self.name} is not valid UTF-8 at byte {error.start}: prepare the data set again"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}  # readers hold file handles


def find_folder(name: str, data_dir: Path) -> Path | None:
    """Returns the newest version folder of data set `name` (as ``c4/en``) under `data_dir`, or None.

    Raises:
      UserError: the data set is there in several configurations and `name` does not choose one.
    """
    root = data_dir / name
    versions = {folder: _VERSION.fullmatch(folder.name) for folder in _data_sets(root)}
    numbered = [(tuple(map(int, match.groups())), folder) for folder, match in versions.items() if match]
    if numbered:
        return max(numbered)[1]
    if (root / "dataset_info.json").exists():
        return root
    configurations = sorted({folder.parent.name for child in _folders(root) for folder in _data_sets(child)})
    if configurations:
        choices = ", ".join(f"'{name}/{configuration}'" for configuration in configurations)
        raise UserError(f"data set '{name}' under {data_dir} has configurations: name one of {choices}")
    return None


def prepare_built_in(builder_class: Any, configuration: str | None, data_dir: Path) -> Path:
    """Writes one of our own data sets under `data_dir` unless it is there; returns its folder.

    Raises:
      UserError: the folder cannot be written.
    """
    import tensorflow_datasets as tfds

    final = Path(builder_class(data_dir=str(data_dir), config=configuration).data_path)

    def write(aside: Path) -> None:
        _logger.info("preparing %s", final)
        builder = builder_class(data_dir=str(aside / "root"), config=configuration, file_format="array_record")
        settings = tfds.download.DownloadConfig(try_download_gcs=False)
        with _quiet_tfds():
            builder.download_and_prepare(download_config=settings)
        # `aside` itself becomes the version folder.
        for path in list(Path(builder.data_path).iterdir()):
            path.rename(aside / path.name)
        shutil.rmtree(aside / "root")

    return create_once(final, write)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS's progress bars and notices off the screen; seconds of work need none."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def open_builder(folder: Path, source: str) -> Any:
    """Returns the TFDS builder of the data set in `folder`; `source` is what messages call it.

    Raises:
      UserError: the folder holds no data set, or one in a format without random access.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(folder))
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
    except Exception as error:
        raise UserError(
            f"{folder} is no readable TFDS data set ({type(error).__name__}: {str(error).splitlines()[0]}): "
            "remove the folder and prepare it again"
        ) from error
    if "array_record" not in formats:
        names = builder.info.full_name.split("/")  # name, configuration if any, version
        raise UserError(
            f"data set '{source}' in {folder} is stored as {builder.info.file_format.value}, which has no random "
            f"access; convert it: {prepare_command('/'.join(names[:-1]), folder.parents[len(names) - 1])}"
        )
    return builder


def prepare_command(name: str, data_dir: Path) -> str:
    """Returns the command that puts data set `name` under `data_dir`."""
    return f"python -m fastlm.data.prepare {name} --data_dir {data_dir}"


def _check_field(builder: Any, field: str, source: str) -> None:
    features = builder.info.features
    texts = sorted(name for name, feature in features.items() if type(feature).__name__ == "Text")
    if field not in texts:
        raise UserError(
            f"data set '{source}' has no text field '{field}': name one as '{source}#FIELD': {', '.join(texts)}"
        )


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _data_sets(root: Path) -> list[Path]:
    return [path for path in _folders(root) if (path / "dataset_info.json").exists()]
