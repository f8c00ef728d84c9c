"""Downloads files and verifies their checksums; a file appears in the folder only when it is complete."""

import hashlib
import http.client
import os
import pathlib
import urllib.request
from collections.abc import Mapping, Sequence


def read(path: pathlib.Path) -> bytes:
    """A file's content; raises ValueError, which names it, where it cannot be read, as where it is a folder."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}): put the right file there.') from error


def check_md5(content: bytes, md5: str, name: str, remedy: str) -> None:
    """Raises ValueError if the MD5 of a file's content is not the one expected."""
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise ValueError(f'{name} has the MD5 {actual}, expected {md5}: {remedy}')


def download(folder: str | os.PathLike, files: Mapping[str, str], mirrors: Sequence[str], timeout: float = 30) -> None:
    """Downloads the files that are missing in a folder, and renames each to its final name only after its checksum is verified.

    Args:
      folder: folder to download to; created if it does not exist.
      files: mapping from file name to expected MD5.
      mirrors: addresses to try in this order, each ending in ``/``.
      timeout: seconds to wait for each mirror.

    Raises:
      ValueError: if no mirror provides a file with the expected checksum, or the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    for name, md5 in files.items():
        if (folder / name).exists():
            continue
        reasons = []
        for mirror in mirrors:
            try:
                with urllib.request.urlopen(mirror + name, timeout=timeout) as response:
                    content = response.read()
                check_md5(content, md5, mirror + name, 'not used.')
                break
            except (http.client.HTTPException, OSError, ValueError) as error:  # URLError is an OSError
                reasons.append(f'{mirror}: {error}')
        else:
            raise ValueError(
                f'data.download: no mirror gave {name} ({"; ".join(reasons)}). Put the file into data.dir={folder} by hand.'
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f'{name}.{os.getpid()}.partial'
            partial.write_bytes(content)
            os.replace(partial, folder / name)
        except OSError as error:
            raise ValueError(f'data.dir={str(folder)!r} cannot be written ({error}): give another folder.') from error
