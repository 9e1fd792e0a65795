"""A folder on object storage, read and written through pyarrow.

Keys come from where the clouds' own tools take them: environment variables, their files, or the machine's role. An S3
server that is not Amazon's is named by `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from otpo.errors import UserError, WorkError, first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SCHEMES = ("s3", "gs")
CONNECT_SECONDS, REQUEST_SECONDS = 10, 60
BLOCK = 8 * 2**20  # bytes that are copied at a time
READS = 20  # of an object that others replace meanwhile


def check_address(address: str) -> tuple[str, str]:
    """Scheme, and bucket with folder, of an address.

    Raises:
        UserError: another scheme, no bucket, or something besides bucket and folder.
    """
    parts = urlsplit(address)
    if address != address.strip() or not parts.scheme or "://" not in address or "\\" in address:
        shown = "..." if "@" in address else address
        raise UserError(f"--runs '{shown}': expected s3://BUCKET/FOLDER, without spaces.")
    if parts.scheme not in SCHEMES:
        raise UserError(
            f"--runs {address}: expected a folder of a file system, or an address that begins with"
            f" {' or '.join(f'{scheme}://' for scheme in SCHEMES)}."
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"--runs {parts.scheme}://...: expected a bucket and a folder alone. Keys and the server's address belong"
            " into environment variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL."
        )
    folder = "/".join(part for part in parts.path.split("/") if part)
    if not parts.netloc or ".." in folder.split("/"):
        raise UserError(f"--runs {address}: expected {parts.scheme}://BUCKET/FOLDER.")
    return parts.scheme, "/".join(filter(None, [parts.netloc, folder]))


class Remote:
    """A folder on object storage. An object appears there whole or not at all, and everybody sees it at once.

    Attributes:
        address: of the folder, as a person writes it.
    """

    def __init__(self, address: str, files: FileSystem, root: str):
        self.address, self._files, self._root = address, files, root

    def folder(self, name: str) -> Remote:
        """A folder inside."""
        return Remote(f"{self.address}/{name}", self._files, f"{self._root}/{name}")

    def objects(self) -> list[str]:
        """Paths of all objects, relative to the folder."""
        from pyarrow.fs import FileSelector, FileType

        with _in_words(self.address):
            found = self._files.get_file_info(FileSelector(self._root, recursive=True, allow_not_found=True))
        return sorted(info.path.removeprefix(f"{self._root}/") for info in found if info.type == FileType.File)

    def read(self, path: str) -> bytes | None:
        """The content of an object; None if there is none.

        pyarrow asks for the size first. Where another process replaces the object in between, it reads as much of the
        new one; it is then read again.
        """
        place = f"{self._root}/{path}"
        for _ in range(READS):
            try:
                with _in_words(self.address):
                    with self._files.open_input_stream(place) as stream:
                        content = stream.read()
                    size = self._files.get_file_info(place).size
            except FileNotFoundError:
                return None
            if size == len(content):
                return content
        raise WorkError(f"{self.address}/{path} is replaced again and again while it is read: who else writes it?")

    def write(self, path: str, content: bytes) -> None:
        """Make an object, or replace it."""
        with _in_words(self.address), self._files.open_output_stream(f"{self._root}/{path}") as stream:
            stream.write(content)

    def upload(self, file: Path, path: str) -> None:
        """Copy a local file there.

        Raises:
            FileNotFoundError: the local file is gone.
        """
        with file.open("rb") as source, _in_words(self.address):  # a part that fails leaves no object
            with self._files.open_output_stream(f"{self._root}/{path}") as stream:
                shutil.copyfileobj(source, stream, BLOCK)

    def download(self, path: str, file: Path) -> None:
        """Copy an object into a local file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with _in_words(self.address), self._files.open_input_stream(f"{self._root}/{path}") as stream:
            with file.open("wb") as target:
                shutil.copyfileobj(stream, target, BLOCK)

    def delete(self, path: str) -> None:
        """Delete an object, if it is there."""
        try:
            with _in_words(self.address):
                self._files.delete_file(f"{self._root}/{path}")
        except FileNotFoundError:
            pass


@contextmanager
def _in_words(address: str) -> Iterator[None]:
    """Raise what the storage's client says as a `WorkError`; an object or file that is missing stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.filename is not None:  # a local file
            raise
        raise WorkError(f"{address}: {first_line(error)}") from error


def open_remote(address: str) -> Remote:
    """The folder on object storage at an address. Nothing is asked yet but a bucket's region, where it is not given.

    Raises:
        UserError: not such an address, or its bucket cannot be found.
    """
    scheme, root = check_address(address)
    try:
        files = _s3(root.split("/")[0]) if scheme == "s3" else _gs()
    except OSError as error:
        raise UserError(f"--runs {address}: {first_line(error)}. Is the bucket's name right?") from error
    return Remote(address.rstrip("/"), files, root)


def _s3(bucket: str) -> FileSystem:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if server else resolve_s3_region(bucket)
    parts = urlsplit(server)
    return S3FileSystem(
        region=region,
        endpoint_override=f"{parts.netloc}{parts.path}".rstrip("/") or None,
        scheme=parts.scheme or "https",
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=3),
    )


def _gs() -> FileSystem:
    from datetime import timedelta

    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem(retry_time_limit=timedelta(seconds=REQUEST_SECONDS))
