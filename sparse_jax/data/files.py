"""Files from the net: only with a checksum, and whole or not at all."""

import hashlib
import http.client
import os
import pathlib
import urllib.request
from collections.abc import Mapping, Sequence


def check_md5(content: bytes, md5: str, name: str, remedy: str) -> None:
    """Raises ValueError where a file's content is not the one expected."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f'{name} has the MD5 {found}, expected {md5}: {remedy}')


def download(folder: str | os.PathLike, files: Mapping[str, str], mirrors: Sequence[str], timeout: float = 30) -> None:
    """Fetches the files that are missing in a folder, checks them, and only then gives them their names.

    Args:
      folder: where to; made if need be.
      files: MD5 by file name.
      mirrors: addresses to try in this order, each ending in ``/``.
      timeout: seconds to wait for a mirror.

    Raises:
      ValueError: if no mirror gives a file with its checksum, or the folder cannot be written.
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
