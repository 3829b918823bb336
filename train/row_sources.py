"""Where the rows of a run come from: a data file with its image folder, or a prepared dataset."""

from typing import Any, Protocol

import numpy as np

from llava_jax.console import InputError, first_line, shorten
from llava_jax.data.conversations import Conversation, read_conversation
from llava_jax.data.data_files import read_rows, summarize
from llava_jax.data.image_folder import ImageFolder
from llava_jax.data.images import image_size
from llava_jax.data.urls import NamedBytes
from train.prepared import PreparedDataset, first_images, is_prepared


class RowSource(Protocol):
    """Rows, and the images that they name.

    Attributes:
      path: the file or directory.
      image_counts: uint16 [n], the number of images of each row.
      system: whether a row has its own system message.
    """

    path: str
    image_counts: np.ndarray
    system: bool

    def __len__(self) -> int: ...

    def id(self, row: int) -> Any:
        """The id of a row; its number if it has none."""

    def conversation(self, row: int) -> Conversation:
        """Read a row.

        Raises:
          InputError: the row is invalid.
        """

    def check_image(self, name: str) -> None:
        """
        Raises:
          InputError: the source has no image with this name, as far as that is known without opening it.
        """

    def image_size(self, row: int, place: int, name: str | None) -> tuple[int, int]:
        """Width and height of the image at a `place` among those of a valid row.

        Args:
          name: of the image, so that the row need not be parsed for it; None if its size has been read before.

        Raises:
          InputError: the image is missing or broken.
        """

    def image(self, row: int, place: int, name: str) -> str | NamedBytes:
        """The path or the bytes of that image.

        Raises:
          InputError: as `image_size`.
        """


def row_id(row: Any, number: int) -> Any:
    """The id of a parsed row; its number if it has none."""
    name = row.get("id", number) if isinstance(row, dict) else number
    return name if isinstance(name, str | int | float) else number


class DataFile:
    """The rows of a data file, and an image folder."""

    def __init__(self, path: str, folder: ImageFolder):
        """
        Raises:
          InputError: the file cannot be read.
        """
        self.path, self._folder = path, folder
        self._rows = read_rows(path)
        summary = summarize(path, self._rows)
        self.image_counts, self.system = summary.image_counts, summary.system
        self._first_image = first_images(self.image_counts)
        self._sizes = np.zeros((self._first_image[-1], 2), np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, row: int) -> Any:
        """A row, parsed; an invalid one is an `InputError`."""
        return self._rows[row]

    def id(self, row: int) -> Any:
        return row_id(self._rows[row], row)

    def conversation(self, row: int) -> Conversation:
        return read_conversation(self._rows[row])

    def check_image(self, name: str) -> None:
        self._folder.find(name)

    def image_size(self, row: int, place: int, name: str | None) -> tuple[int, int]:
        size = self._sizes[self._first_image[row] + place]
        if not size.any():  # not read before
            assert name is not None
            size[:] = image_size(self.image(row, place, name))
        return int(size[0]), int(size[1])

    def image(self, row: int, place: int, name: str) -> str | NamedBytes:
        return self._folder.find(name)


class PreparedRows:
    """The rows of a prepared dataset, with the sizes of their images in its index."""

    def __init__(self, path: str):
        """
        Raises:
          InputError, OSError: as `PreparedDataset`.
        """
        self.path = path
        self.dataset = PreparedDataset(path)
        self.image_counts, self.system = self.dataset.image_counts, self.dataset.described["system"]

    def __len__(self) -> int:
        return len(self.dataset)

    def id(self, row: int) -> Any:
        return self.dataset.id(row)

    def conversation(self, row: int) -> Conversation:
        conversation = read_conversation(self.dataset.row(row))
        if len(conversation.images) != self.image_counts[row]:
            raise InputError(f"{shorten(self.path)}: row {row} has other images than the index; prepare it again")
        return conversation

    def check_image(self, name: str) -> None:
        pass

    def image_size(self, row: int, place: int, name: str | None) -> tuple[int, int]:
        width, height = self.dataset.sizes[self.dataset.first_image[row] + place]
        return int(width), int(height)

    def image(self, row: int, place: int, name: str) -> str | NamedBytes:
        return self.dataset.image(row, place)


def open_source(path: str, folder: ImageFolder) -> RowSource:
    """
    Raises:
      InputError: `path` cannot be read.
    """
    try:
        return PreparedRows(path) if is_prepared(path) else DataFile(path, folder)
    except OSError as error:
        raise InputError(f"--data {first_line(error)}") from None
