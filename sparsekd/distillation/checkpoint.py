"""The file that a training run is kept in.

It is torch.save's, of tensors and plain types only, so that reading it runs no code (``weights_only=True``). It is
replaced in one move. Under torch.distributed each rank has its own and keeps the two before it: a rank that is killed
while it writes leaves others ahead by a step, which may end an epoch, and all go on from the last step that all have.

    run.rank0                epoch 4               run.rank1                epoch 3, 16 batches
    run.rank0.previous       epoch 3, 17 batches   run.rank1.previous       epoch 3, 15 batches
    run.rank0.previous2      epoch 3, 16 batches   run.rank1.previous2      epoch 3, 14 batches
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from .training_state import EpochRecord, TrainingState


class Checkpoint:
    """The file of a run.

    ``save`` takes the state to memory first and then writes it, so that an interrupt finds, in the file or in memory,
    a whole state and nothing of the step under way.

    Args:
        every: steps of the optimizer between two saves within an epoch; None saves at the end of epochs only.
    """

    def __init__(self, path: str | os.PathLike, state: TrainingState, every: int | None = None) -> None:
        self.path, self.state, self.every, self._steps = Path(path), state, every, 0
        self._ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self._ranks > 1:
            self.path = self.path.with_name(f"{self.path.name}.rank{dist.get_rank()}")
        kept = ("", ".previous", ".previous2") if self._ranks > 1 else ("",)
        self._files = [self.path.with_name(self.path.name + suffix) for suffix in kept]  # the newest first
        self._pending: bytes | None = None
        if not self.path.parent.is_dir():
            raise ValueError(f"Expected a checkpoint in a folder that exists, got {self.path}")
        for name, part in (("scheduler", state.scheduler), ("pruner", state.pruner)):
            if part is not None and not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                got = type(part).__name__
                raise TypeError(
                    f"Expected a {name} with state_dict and load_state_dict to keep a checkpoint, got {got}"
                )

    def resume(self) -> list[EpochRecord]:
        """Puts the file's state in place where there is a file; the records of the epochs that it has behind it.

        Raises:
            ValueError: the file can't be read, or is of another training; nothing is changed then.
        """
        if self._ranks == 1:
            if self.path.exists():
                return self._put(self.path, self._read(self.path))
        else:
            found = {path: self._read(path) for path in self._files if path.exists()}
            chosen = self._agreed({path: _position(state) for path, state in found.items()})
            if chosen is not None:
                return self._put(chosen, found[chosen])
        self._pending = self._packed([])
        try:
            _unpacked(self._pending)
        except Exception as error:
            raise ValueError(
                "Expected optimizer, scheduler and pruner states of tensors and plain types to keep a checkpoint, "
                f"got others: {_first_line(error)}"
            ) from error
        return []

    def _agreed(self, own: dict[Path, tuple[int, int]]) -> Path | None:
        """Which of this rank's files all go on from; None where that is the start."""
        # Before a rank's first file was the start.
        offered = set(own.values()) | (set() if self._files[-1] in own else {(0, 0)})
        everyone: list = [None] * self._ranks
        dist.all_gather_object(everyone, offered)
        common = set.intersection(*everyone)
        if not common:
            said = "; ".join(f"rank {rank}: {sorted(places)}" for rank, places in enumerate(everyone))
            raise ValueError(
                f"Expected a step that every rank has a checkpoint of, got none in common (epochs, batches of {said})"
            )
        return next((path for path, place in own.items() if place == max(common)), None)

    def _expected(self, path: Path) -> str:
        return f"Expected a checkpoint of this training of {type(self.state.student).__name__} in {path}"

    def _read(self, path: Path) -> dict:
        try:
            return _unpacked(path.read_bytes())
        except Exception as error:  # a torn file raises one of many kinds
            raise ValueError(f"{self._expected(path)}, got a file that can't be read: {_first_line(error)}") from error

    def _put(self, path: Path, found: dict) -> list[EpochRecord]:
        try:
            wrong = self.state.misfit(found)
            history = [] if wrong else [EpochRecord(**fields) for fields in found["history"]]
            if wrong is None:
                self.state.put(found)
        except Exception as error:
            raise ValueError(f"{self._expected(path)}, got one that does not fit: {_first_line(error)}") from error
        if wrong is not None:
            raise ValueError(f"{self._expected(path)}, got {wrong}")
        return history

    def after_step(self, history: list[EpochRecord]) -> None:
        """Saves, when it is time, the state within an epoch."""
        self._steps += 1
        if self.every is not None and self._steps % self.every == 0:
            self.save(history)

    def save(self, history: list[EpochRecord]) -> None:
        """Replaces the file by the state after the epochs of ``history`` and what is begun of the next."""
        self._pending = self._packed(history)
        self.flush()

    def flush(self) -> None:
        """Writes what ``save``, or the start of the run, has taken and not yet written."""
        if self._pending is None:
            return
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as file:
                file.write(self._pending)
                file.flush()
                os.fsync(file.fileno())
            for older, newer in zip(self._files[:0:-1], self._files[-2::-1], strict=True):
                if newer.exists():
                    os.replace(newer, older)
            os.replace(aside, self.path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        self._pending = None

    def _packed(self, history: list[EpochRecord]) -> bytes:
        buffer = io.BytesIO()
        torch.save(self.state.take(history), buffer)
        return buffer.getvalue()


def put_aside(path: Path) -> None:
    """Renames what an earlier run left, so that a new one can begin and nothing is lost; the newest is kept."""
    if path.exists():
        aside = path.with_name(f"{path.name}.old")
        if aside.is_dir():
            shutil.rmtree(aside)
        path.replace(aside)
        print(f"an earlier run's {path.name} was there (--resume goes on with it); it is kept as {aside}")


def _unpacked(content: bytes) -> object:
    # torch.load does not look at the checksums that torch.save writes.
    broken = zipfile.ZipFile(io.BytesIO(content)).testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is wrong")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _position(state: object) -> tuple[int, int]:
    """Epochs, and batches of the next, that are done."""
    try:
        return state["epoch"], 0 if state["begun"] is None else state["begun"]["batches"]
    except (TypeError, KeyError):
        return -1, -1  # another kind of file, which _put refuses


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
