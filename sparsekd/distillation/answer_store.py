"""A teacher's answers on disk, for many processes at once and for the next run.

    folder/1f0c...-4711.answers      one file per process that writes; it alone appends, everybody reads all of them
      header, 256 bytes              JSON: whose answers, and in which form
      record, one per row            key [16 bytes] | answer [n bytes] | CRC-32 of both [4 bytes]

    answer, full:    the row's output in float16 (or float32)
    answer, top-k:   the k largest logits in float16, the mean logit of the rest, and the k classes in int32

Nothing is written twice and nothing is locked: a record counts when it is whole and its checksum is right, so that a
process that is killed loses the record in flight and nobody reads half of one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FORMAT = "sparsekd answers, version 1"
HEADER = 256  # bytes
KEY = 16
DTYPES = {torch.float16: "float16", torch.float32: "float32"}


def teacher_hash(teacher: nn.Module) -> str:
    """128 bits of a network's structure, parameters and buffers (those that are not in its state_dict too)."""
    found = hashlib.blake2b(re.sub(r" at 0x[0-9a-f]+", "", repr(teacher)).encode(), digest_size=16)
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(content.view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    return found.hexdigest()


class AnswerStore:
    """Keys of 16 bytes to answers in a folder.

    Args:
        folder: made where there is none. Holds the answers of one teacher in one form.
        teacher: :func:`teacher_hash` of the one who answers.
        max_bytes: of all files in the folder. Processes that write at the same time may each go beyond it by a batch.
        top_k: None keeps whole rows.
        dtype: of what is kept, float16 or float32.
        temperature: at which the mean logit of the rest keeps the rest's share of the probability.

    Raises:
        ValueError: the folder holds answers of another teacher or in another form; settings out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        teacher: str,
        max_bytes: int,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float16,
        temperature: float = 1.0,
    ) -> None:
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"Expected top_k to be a whole number of at least 1 or None, got {top_k!r}")
        if dtype not in DTYPES:
            raise ValueError(f"Expected dtype to be torch.float16 or torch.float32, got {dtype}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"Expected temperature to be positive and finite, got {temperature!r}")
        self.folder, self.max_bytes, self.top_k, self.dtype = Path(folder), max_bytes, top_k, dtype
        self.teacher, self.temperature = teacher, float(temperature)
        self._form = {"format": FORMAT, "teacher": teacher, "top_k": top_k, "dtype": DTYPES[dtype]}
        if top_k is not None:
            self._form["temperature"] = self.temperature
        self._shape: tuple[int, ...] | None = None  # of one row of the teacher's output
        self._places: dict[bytes, tuple[str, int]] = {}
        self._maps: dict[str, np.ndarray] = {}  # file name to its records as far as they are read
        self._read: dict[str, int] = {}  # file name to the number of records that were looked at
        self._id = uuid.uuid4().hex
        self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*.answers"))

    def refresh(self) -> None:
        """Takes notice of what has been written since, by whomever."""
        for file in sorted(self.folder.glob("*.answers")):
            size = file.stat().st_size
            if size >= HEADER and file.name not in self._read:
                self._check(file)
                self._read[file.name] = 0
            if size <= HEADER or self._shape is None:
                continue
            count, seen = (size - HEADER) // self._record.itemsize, self._read.get(file.name, 0)
            if count <= seen:
                continue
            records = np.memmap(file, self._record, "r", HEADER, (count,))
            for index in range(seen, count):
                content = records[index].tobytes()
                if zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little"):
                    self._places.setdefault(content[:KEY], (file.name, index))
            self._maps[file.name], self._read[file.name] = records, count

    def get(self, keys: list[bytes]) -> list[Tensor | None]:
        """float32 rows on the CPU, None where there is none yet."""
        if any(key not in self._places for key in keys):
            self.refresh()
        return [self._decoded(*self._places[key]) if key in self._places else None for key in keys]

    def put(self, keys: list[bytes], answers: Tensor) -> Tensor:
        """Keeps rows ``[N, ...]`` as far as there is room; returns all of them as :meth:`get` would, in float32.

        Raises:
            ValueError: rows of another shape than before, not finite in ``dtype``, or no ``[N, C]`` for top-k.
        """
        answers = answers.detach().cpu().float()
        shape = tuple(answers.shape[1:])
        if self._shape is not None and shape != self._shape:
            raise ValueError(f"Expected answers of shape {self._shape} a row, got {shape}")
        if self.top_k is not None and (len(shape) != 1 or shape[0] < self.top_k):
            raise ValueError(f"Expected answers [N, C] of at least {self.top_k} classes for top_k, got {shape} a row")
        limit = torch.finfo(self.dtype).max
        if not bool((answers.abs() <= limit).all()):
            raise ValueError(
                f"Expected answers within {limit:g}, the range of {self.dtype}, got {float(answers.abs().max())}"
            )
        if self._shape is None:
            self._set_shape(shape)
        rows = self._encoded(answers)  # [N, n] uint8
        room = self.max_bytes - self.bytes
        name = f"{self._id}-{os.getpid()}.answers"
        begun = (self.folder / name).exists()
        room = (room - (0 if begun else HEADER)) // self._record.itemsize
        kept = {}  # a key may come twice in a batch
        for key, row in zip(keys, rows, strict=True):
            if len(kept) < room and key not in self._places and key not in kept:
                content = key + row.tobytes()
                kept[key] = content + zlib.crc32(content).to_bytes(4, "little")
        if kept:
            self._append(self.folder / name, (b"" if begun else self._header()) + b"".join(kept.values()))
        return torch.stack([self._unpacked(row) for row in rows]) if len(rows) else answers

    @staticmethod
    def _append(file: Path, content: bytes) -> None:
        before = file.stat().st_size if file.exists() else 0
        try:
            with open(file, "ab") as opened:
                opened.write(content)
        except BaseException:  # a full disk, an interrupt: half a record would put all that follow out of place
            if file.exists():
                os.truncate(file, before)
            raise

    # --- one answer as bytes ---

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        item = torch.finfo(self.dtype).bits // 8
        size = math.prod(shape) * item if self.top_k is None else (self.top_k + 1) * item + 4 * self.top_k
        self._record = np.dtype([("key", f"V{KEY}"), ("answer", "u1", (size,)), ("crc", "<u4")])

    def _encoded(self, answers: Tensor) -> np.ndarray:
        if self.top_k is None:
            return answers.flatten(1).to(self.dtype).contiguous().view(torch.uint8).numpy()
        values, classes = answers.topk(self.top_k, dim=1)
        rest, others = answers.scatter(1, classes, -math.inf), answers.shape[1] - self.top_k
        mean = (rest / self.temperature).logsumexp(1, keepdim=True) - math.log(max(others, 1))
        mean = (mean * self.temperature).clamp(min=torch.finfo(self.dtype).min)
        numbers = torch.cat([values, mean], 1).to(self.dtype).contiguous().view(torch.uint8)
        return torch.cat([numbers, classes.to(torch.int32).contiguous().view(torch.uint8)], 1).numpy()

    def _decoded(self, name: str, index: int) -> Tensor:
        return self._unpacked(self._maps[name][index]["answer"])

    def _unpacked(self, row: np.ndarray) -> Tensor:
        content = torch.from_numpy(row.copy())
        if self.top_k is None:
            return content.view(self.dtype).float().view(self._shape)
        split = content.numel() - 4 * self.top_k
        numbers, classes = content[:split].view(self.dtype).float(), content[split:].clone().view(torch.int32).long()
        return torch.full(self._shape, float(numbers[-1])).scatter_(0, classes, numbers[:-1])

    # --- whose they are ---

    def _header(self) -> bytes:
        content = json.dumps(self._form | {"shape": self._shape}).encode()
        if len(content) >= HEADER:
            raise ValueError(f"Expected answers of fewer dimensions, got a shape of {self._shape} a row")
        return content.ljust(HEADER - 1) + b"\n"

    def _check(self, file: Path) -> None:
        with open(file, "rb") as opened:
            content = opened.read(HEADER)
        try:
            found = json.loads(content)
            shape = tuple(found.pop("shape"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"Expected a teacher's answers in {file}, got another file") from None
        for key, own in self._form.items():
            if found.get(key) != own:
                whose = "this teacher" if key == "teacher" else f"{key}={own}"
                raise ValueError(
                    f"Expected answers of {whose} in {self.folder}, got those of {found.get(key)}: choose another "
                    "folder"
                )
        if self._shape is None:
            self._set_shape(shape)
        elif shape != self._shape:
            raise ValueError(f"Expected answers of shape {self._shape} a row in {file}, got {shape}")
