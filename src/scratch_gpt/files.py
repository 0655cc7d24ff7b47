"""Writing files so that a crash at any moment leaves either the old state or the new one."""

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
    """A temporary sibling to fill; flushed to disk and renamed to ``target`` when the block ends well, else removed."""
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
    """Delete ``folder``, if it is there, so that at no moment a part of it goes by its name."""
    if folder.is_dir():
        doomed = _partial(folder.with_name(f"{folder.name}.old"))
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        flush(folder.parent)
        shutil.rmtree(doomed)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in ``folder``."""
    for path in filter(is_partial, folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_partial(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def write_text(target: Path, text: str) -> None:
    """Replace ``target`` in one step."""
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
    write_text(target, json.dumps(value, indent=2) + "\n")


def flush(path: Path) -> None:
    """Ask the operating system to put a file or folder entry on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` for this process alone; the kernel frees it however the process ends.

    Raises:
        UserError: another process holds it; ``what`` is what that process is writing.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {what}: wait for it or choose another folder") from error
        yield


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a full disk or a missing permission into one message; ``what`` is what was being written and what is safe."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports operating-system errors as text
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) or "Os {" in reason or "os error" in reason.lower():
            raise UserError(f"could not write {what}: {reason}. Free some space or choose another folder.") from error
        raise
