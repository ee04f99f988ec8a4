"""What an exported page needs to run a model: onnxruntime for browsers, and Hugging Face's tokenizers in JavaScript.

They are npm packages, and too large for this package: 33 MB to download. `npm pack` downloads them once into the cache
folder, or you give a folder that has them. Their SHA-512 is pinned here, so both ways give the same files.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from indraquantum.errors import UserError, reason
from indraquantum.files import atomic_file, cache_folder
from indraquantum.progress import tell

SECONDS = 600  # for npm to download them


@dataclass(frozen=True)
class Package:
    """A version of an npm package."""

    name: str
    version: str
    sha512: str  # of the packed file in base64, as npm's `integrity` has it
    files: Mapping[str, str]  # path in the packed file: name in the page's folder `runtime`

    @property
    def packed(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


# Plain .js and .wasm: servers know their types, and .mjs not always.
PACKAGES = (
    Package(
        "onnxruntime-web", "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {"package/dist/ort.wasm.bundle.min.mjs": "ort.js", "package/dist/ort-wasm-simd-threaded.wasm": "ort.wasm"},
    ),
    Package(
        "@huggingface/tokenizers", "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"package/dist/tokenizers.min.mjs": "tokenizers.js", "package/LICENSE": "tokenizers.LICENSE"},
    ),
)  # fmt: skip


def packed_runtime(given: Path | None) -> list[Path]:
    """Return the packed file of each package, checked: from the folder `given`, the cache, or from npm into the cache.

    Raises:
        UserError: one is missing or damaged, or npm can't download it.
    """
    return [_packed(package, given) for package in PACKAGES]


def unpack_runtime(packed: list[Path], folder: Path) -> None:
    """Write the files that a page needs into `folder`."""
    for package, path in zip(PACKAGES, packed, strict=True):
        with tarfile.open(path) as archive:
            for member, name in package.files.items():
                content = archive.extractfile(member)
                assert content is not None  # its SHA-512 is known
                with content, (folder / name).open("wb") as file:
                    shutil.copyfileobj(content, file)


def _packed(package: Package, given: Path | None) -> Path:
    if given is not None:
        path = given / package.packed
        if not path.is_file():
            raise UserError("--runtime", given, f"must be a folder with {_all_names()}, which `npm pack` writes")
        if _sha512(path) != package.sha512:
            raise UserError("--runtime", path, "is damaged or another version: its SHA-512 is not the one of npm")
        return path
    path = cache_folder() / "browser" / package.packed
    if not path.is_file() or _sha512(path) != package.sha512:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(package, path)
    return path


def _download(package: Package, path: Path) -> None:
    """Download `package` with npm to `path`.

    Raises:
        UserError: there is no npm, or it failed, or what came is something else.
    """
    wanted = f"{package.name}@{package.version}"
    remedy = f"give --runtime FOLDER with {_all_names()}, which `npm pack` writes where there is a network"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("--as", "page", f"needs npm, which is not installed, to download {wanted}; or {remedy}")
    tell(f"Downloading {wanted} with npm into {path.parent}.")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", wanted, "--silent", "--ignore-scripts", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS, cwd=folder)
            downloaded = Path(folder) / package.packed
            if _sha512(downloaded) != package.sha512:
                raise UserError("--as", "page", f"needs {wanted}, but npm gave another file; {remedy}")
        except (OSError, subprocess.SubprocessError) as error:
            said = reason(OSError(getattr(error, "stderr", None) or str(error)))
            raise UserError("--as", "page", f"needs {wanted}, but npm failed ({said}); {remedy}") from None
        with atomic_file(path) as temporary:
            shutil.copyfile(downloaded, temporary)


def _all_names() -> str:
    return " and ".join(package.packed for package in PACKAGES)


def _sha512(path: Path) -> str:
    """Return the SHA-512 of a file in base64."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
