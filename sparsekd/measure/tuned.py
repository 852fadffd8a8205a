"""Figures measured on this machine, kept on disk between processes.

One JSON file holds those of one machine, build and number of threads. It is written aside and renamed, under a lock,
together with what other processes have added since; a file that is broken is set aside, reported, and begun anew.

    SPARSEKD_TUNE=off       nothing is measured or looked up: the cost model decides
    SPARSEKD_TUNE=cached    what `convert` measures is kept and looked up (the default)
    SPARSEKD_TUNE=full      and so are shapes that converted layers first meet later
    SPARSEKD_CACHE_DIR      the folder; else $XDG_CACHE_HOME/sparsekd, else ~/.cache/sparsekd
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from .report import write_text

__all__ = ["MODES", "Tuned", "flush", "folder", "mode", "of", "read"]

MODES = ("off", "cached", "full")
VERSION = 1
MOST = 20_000  # figures in a file; the oldest go first

Figures = dict[str, "float | str"]


def mode(environ: Mapping[str, str] = os.environ) -> str:
    """SPARSEKD_TUNE: "off", "cached" or "full"."""
    found = environ.get("SPARSEKD_TUNE") or "cached"
    if found not in MODES:
        raise ValueError(f"Expected SPARSEKD_TUNE to be {', '.join(MODES[:-1])} or {MODES[-1]}, got {found!r}")
    return found


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the files are."""
    if asked := environ.get("SPARSEKD_CACHE_DIR"):
        return Path(asked).expanduser()
    base = Path(environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "sparsekd"


def read(path: Path) -> dict[str, Figures]:
    """What a file holds; nothing when there is none. ValueError: it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except RecursionError as error:
        raise ValueError("lists within lists without end") from error
    found = content.get("figures") if isinstance(content, dict) else None
    if not isinstance(found, dict) or content.get("version") != VERSION:
        raise ValueError(f"no figures of version {VERSION}")
    for key, figures in found.items():
        if not isinstance(figures, dict) or not all(map(_sound, figures.values())):
            raise ValueError(f"no figures under {key[:80]!r}")
    return found


def _sound(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


class Tuned:
    """The figures of one machine: `get`, `put`, and `flush` to disk."""

    def __init__(self, path: Path, machine: Mapping[str, str]) -> None:
        self.path, self.machine = path, dict(machine)
        self._new: dict[str, Figures] = {}
        self._known = self._read()
        self._told = False

    def _read(self) -> dict[str, Figures]:
        try:
            return read(self.path)
        except (ValueError, OSError) as error:  # JSON's and Unicode's errors are ValueErrors
            aside = self.path.with_suffix(".broken")
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
            warnings.warn(
                f"Expected figures measured before in {self.path}, got {error}: it is set aside as {aside.name}, and "
                "they are measured anew",
                stacklevel=2,
            )
            return {}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Figures | None:
        return self._known.get(key)

    def put(self, key: str, figures: Figures) -> None:
        """Known at once, on disk after `flush`."""
        bad = [value for value in figures.values() if not _sound(value)]
        if bad:
            raise ValueError(f"Expected finite times of at least 0 and texts, got {bad[0]!r}")
        self._known[key] = self._new[key] = dict(figures)

    def flush(self) -> None:
        """Writes what is new, beside what others have written since. What can't be written is said once."""
        if not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                merged = {**self._read(), **self._new}
                merged = dict(list(merged.items())[-MOST:])
                write_text(self.path, json.dumps({"version": VERSION, "machine": self.machine, "figures": merged}))
        except OSError as error:
            if not self._told:
                said = (
                    f"Expected to keep measured times in {self.path}, got: {error}; they are measured again next time"
                )
                warnings.warn(f"{said} (SPARSEKD_CACHE_DIR names another folder)", stacklevel=2)
            self._told = True
            return
        self._known, self._new = {**self._known, **merged}, {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a process that dies
        yield


_open: dict[Path, Tuned] = {}


def of(machine: Mapping[str, str]) -> Tuned:
    """The figures of a machine, read once per process."""
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
    path = folder() / f"tuned-{digest}.json"
    if path not in _open:
        _open[path] = Tuned(path, machine)
    return _open[path]


def flush() -> None:
    """Writes what is new of every machine: of the processor, and of each GPU that was measured."""
    for known in _open.values():
        known.flush()
