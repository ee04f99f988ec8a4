"""The versions that a result depends on, for manifests and reports."""

from __future__ import annotations

from importlib.metadata import version

from indraquantum import __version__


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of this program and of `packages`, by name."""
    return {"indraquantum": __version__} | {name: version(name) for name in packages}
