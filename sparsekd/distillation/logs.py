"""Records of epochs kept outside the terminal, for ``Distiller.fit(on_epoch=...)``."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, fields
from pathlib import Path

from .training_state import EpochRecord

NAMES = [field.name for field in fields(EpochRecord)]


class CSVLog:
    """One line per epoch in a CSV file, with a head; None is an empty field.

    A training that is resumed writes its epochs over those of the same number, so that each is there once.

    Args:
        path: of the file; it is replaced in one move.

    Raises:
        ValueError: the file there has other columns.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._read()

    def __call__(self, record: EpochRecord) -> None:
        rows = [row for row in self._read() if int(row["epoch"]) < record.epoch] + [asdict(record)]
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, NAMES)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(aside, self.path)

    def _read(self) -> list[dict]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != NAMES:
                raise ValueError(f"Expected columns {', '.join(NAMES)} in {self.path}, got {reader.fieldnames}")
            return list(reader)


class TensorBoardLog:
    """The same as scalars for TensorBoard, whose package has to be installed.

    Args:
        folder: of the run.
        first_epoch: what an earlier run wrote from this epoch on is hidden; give ``len(history)`` to go on.

    Raises:
        ImportError: without tensorboard.
    """

    def __init__(self, folder: str | os.PathLike, first_epoch: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"Expected the package tensorboard for TensorBoardLog, got none: {error}") from None
        self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def __call__(self, record: EpochRecord) -> None:
        for name, value in asdict(record).items():
            if name != "epoch" and value is not None:
                self._writer.add_scalar(name.replace("_", "/", 1), value, record.epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
