"""Crash-safe file operations: a crash at any moment leaves either the old state or the new one."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scratch_gpt.errors import UserError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success flush it and rename it to ``target``, otherwise delete it."""
    temporary = _partial(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            flush(path)
        remove_folder(target)
        temporary.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Delete ``folder`` if it exists; renamed first, so that a crash leaves no half-deleted folder of that name."""
    if folder.is_dir():
        renamed = _partial(folder.with_name(f"{folder.name}.old"))
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
        flush(folder.parent)
        shutil.rmtree(renamed)


def remove_partial(folder: Path) -> None:
    """Delete half-written and half-deleted files that a killed process left in ``folder``."""
    for path in filter(is_partial, folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_partial(path: Path) -> bool:
    """Return whether ``path`` has the name of a half-written or half-deleted file."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def write_text(target: Path, text: str) -> None:
    """Replace the content of ``target`` atomically."""
    temporary = _partial(target)
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(target: Path, value: Any) -> None:
    """Replace the content of ``target`` with ``value`` as JSON, atomically."""
    write_text(target, json.dumps(value, indent=2) + "\n")


def flush(path: Path) -> None:
    """Flush a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Lock the file ``path`` exclusively; the kernel releases the lock however the process ends.

    ``what``: what the lock protects, for the message.

    Raises:
        UserError: another process holds the lock.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {what}: wait for it or choose another folder") from error
        yield


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk or a missing permission into a :class:`UserError` that says that ``what`` was not written."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports errors of the operating system as text
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) or "Os {" in reason or "os error" in reason.lower():
            raise UserError(f"could not write {what}: {reason}. Free some space or choose another folder.") from error
        raise
