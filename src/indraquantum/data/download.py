"""What is fetched from the network, at pinned revisions, and what to say where there is none.

Files of the Hugging Face hub come through huggingface_hub (cache, resume, progress); a plain URL comes through urllib.
Being offline must show within seconds, so one quick request decides before the libraries begin their retries.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from indraquantum.config import ALPACA, TINYLLAMA, WIKITEXT
from indraquantum.errors import UserError
from indraquantum.files import atomic_file

# Pinned so that the same command gets the same bytes next year; other ids are taken at their newest state.
REVISIONS = {
    TINYLLAMA: "fe8a4ea1ffedaf415f4da2f062534de366a451e6",
    WIKITEXT: "b08601e04326c79dfdd32d625aee71d232d685c3",
}
# Git's blob id, as `git hash-object` computes it, pins a file's content.
GIT_BLOBS = {ALPACA: "3779ddbc040543ab1834ef216c983d6fcc06cc9a"}
TIMEOUT_SECONDS = 10
CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Folder of the files downloaded by URL: $INDRAQUANTUM_CACHE, or ~/.cache/indraquantum."""
    return Path(os.environ.get("INDRAQUANTUM_CACHE") or Path.home() / ".cache" / "indraquantum")


def git_blob_id(content: bytes) -> str:
    """Git's id of a file with this content, in hex."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def hub_files(field: str, repository: str, patterns: list[str], repo_type: str, remedy: str) -> Path:
    """Download the files of a hub repository that match `patterns`, or take them from the hub's cache.

    Args:
        field: The option to name in an error.
        repository: The repository's id, `owner/name`, or `owner/name@revision` for one of its states.
        patterns: Shell patterns of the files wanted.
        repo_type: "model" or "dataset".
        remedy: What the user can do without the hub.

    Returns:
        The folder that holds the files; it may lack those that the repository does not have.

    Raises:
        UserError: no network and nothing in the cache, or the hub does not know the repository.
    """
    import huggingface_hub

    name, _, revision = repository.partition("@")
    options = {"repo_type": repo_type, "revision": revision or REVISIONS.get(name), "allow_patterns": patterns}
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=not _hub_answers(), **options))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        reason = "is no local file, and the Hugging Face hub can't be reached"
    except huggingface_hub.errors.HfHubHTTPError as error:
        reason = f"is no local file, and the Hugging Face hub refuses it ({type(error).__name__})"
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        reason = f"is no local file, and could not be downloaded ({type(error).__name__})"
    raise UserError(field, repository, f"{reason}; {remedy}")


def _hub_answers() -> bool:
    """Whether the hub answers at all, by one quick request through the library's own client and its proxies."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS / 2)
    except (OSError, huggingface_hub.errors.HTTPError):
        return False
    return True


def download_url(field: str, url: str, remedy: str) -> Path:
    """Download `url` into the cache with a progress bar, atomically; a pinned file that is there is taken as it is.

    Args:
        field: The option to name in an error.
        url: http, https or file address.
        remedy: What the user can do without the network.

    Returns:
        The file in the cache.

    Raises:
        UserError: the address can't be read, the answer ends early, or its content is not the pinned one.
    """
    folder = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / (Path(urllib.parse.urlsplit(url).path).name or "download")
    pinned = GIT_BLOBS.get(url)
    if pinned and path.is_file() and git_blob_id(path.read_bytes()) == pinned:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            _fetch(field, url, temporary, path.name, remedy)
            if pinned and git_blob_id(temporary.read_bytes()) != pinned:
                raise UserError(field, url, f"its content is not the pinned one (git blob {pinned}); {remedy}")
    except (OSError, ValueError, http.client.HTTPException) as error:  # a malformed address is a ValueError
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(field, url, f"could not be downloaded ({reason}); {remedy}") from None
    return path


def _fetch(field: str, url: str, target: Path, name: str, remedy: str) -> None:
    """Copy the answer of `url` to `target`, and check that it is as long as the server said."""
    from tqdm import tqdm

    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "wb") as file:
        declared = answer.headers.get("Content-Length")
        total = int(declared) if declared and declared.isdigit() else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"download {name}", disable=None) as bar:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and file.tell() != total:
            raise UserError(field, url, f"ended after {file.tell()} of {total} bytes; try again, or {remedy}")
