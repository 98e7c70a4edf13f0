"""Which code a run ran: its difference to another run may be that of the code."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def code_version(root: Path = ROOT) -> dict[str, str | None]:
    """A hash of this package's source files, which an edited checkout changes too, and the commit.

    Args:
        root: the package's folder.

    Returns:
        ``sha256``, and ``commit``: None where the files are in no git repository, with "+changes"
        behind it where some of them are not as committed.
    """
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return {"sha256": digest.hexdigest(), "commit": _commit(root)}


def _commit(root: Path) -> str | None:
    # A package that is installed within some other repository is not one of its files.
    if _git(root, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", ".")
    return f"{commit}+changes" if commit and changes else commit


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None if it fails, or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
