"""Find the images that a data file or a file of questions names, in their folder and nowhere else."""

import os
from pathlib import Path, PurePath

from llava_jax.console import InputError, shorten
from llava_jax.data.urls import NamedBytes, fetch, is_url


class ImageFolder:
    """The folder of the images that a file names; names cannot escape it."""

    def __init__(self, folder: str | os.PathLike | None, *, follow_links: bool = False):
        """
        Args:
          folder: None or "" for the current directory.
          follow_links: also allow links in the folder that point outside it.

        Raises:
          InputError: the directory does not exist.
        """
        self.folder, self.follow_links = Path(folder or "."), follow_links
        if not self.folder.is_dir():
            raise InputError(f"--image-folder {shorten(self.folder)}: no such directory")
        self._absolute, self._real = os.path.abspath(self.folder), os.path.realpath(self.folder)

    def find(self, name: str) -> str | NamedBytes:
        """Resolve a name: a path relative to the folder, or an absolute path or a `file:` URL inside it, to a path; a
        `data:` URL to its bytes.

        Raises:
          InputError: the name escapes the folder, needs a download, or is a URL but not of an image.
        """
        if is_url(name):
            raise InputError(f"{shorten(name)}: images in data files are not downloaded; save it in the image folder")
        found = fetch(name)
        if isinstance(found, NamedBytes):
            return found
        path = PurePath(found)
        if ".." in path.parts:
            raise InputError(f"{shorten(name)}: is outside the image folder")
        file = str(self.folder / path)
        if self.follow_links and not path.is_absolute():
            return file
        try:
            real = PurePath(os.path.realpath(file))
        except ValueError:  # an invalid file name; opening it raises a better error
            return file
        inside = real.is_relative_to(self._real)
        if path.is_absolute() and not (inside or any(map(path.is_relative_to, (self._absolute, self._real)))):
            raise InputError(f"{shorten(name)}: is outside the image folder {shorten(self._absolute)}")
        if not (inside or self.follow_links):
            raise InputError(
                f"{shorten(name)}: is outside the image folder, through a link to {shorten(real)} "
                "(--follow-links allows it)"
            )
        return file
