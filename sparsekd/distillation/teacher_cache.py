"""The teacher's answers, kept: a frozen teacher says the same of the same image in each epoch.

    batch x --hash of each row--> seen before? -- yes --> its logits from memory or from disk
                                      |
                                      no --> one forward of the teacher over the rows that are new

It pays where images come back unchanged and the teacher's forward is a good part of a step. Milliseconds a batch on one
thread of an AVX2 machine (``benchmarks/teacher_cache.py``; 64 images of 32 x 32, 8 of 224 x 224), and what an epoch
from disk takes of one that asks the teacher:

    teacher / student        teacher    memory   disk   disk, top 5   student's step   epoch
    reference                  134        1.8     3.3       7.0             92          42%
    resnet20x4 / resnet20     1545        2.9     4.8       5.2            404          21%
    resnet50 / resnet18       1286        8.6    10.4       9.2           1842          59%

What memory takes is nearly all hashing, some 2 to 4 ms a megabyte of input. On disk a row takes 20 bytes and 2 a class,
or 22 and 6 for each of the top k. An augmented image is another image; it comes back when its sample comes back with
the same augmentation seed, so that a loader that takes one of a few seeds for each sample asks about each once. (Beyer
et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022, say why both networks are to see
the same view.) Where each view is new, every epoch asks the teacher and the cache only costs.
"""

from __future__ import annotations

import hashlib
import os

import torch
from torch import Tensor, nn

from .answer_store import AnswerStore, teacher_hash
from .outputs import logits_of


class TeacherCache(nn.Module):
    """A teacher that is asked once for each row of input and answers from memory afterwards.

    Takes the place of the teacher in :class:`sparsekd.Distiller`. A row is known by a 128-bit hash (BLAKE2b) of its
    bytes, shape and dtype, so that an augmented image is another row, and no numbering of the samples is needed. When
    the teacher's parameters or buffers change, what is kept is forgotten. In train mode the teacher itself answers each
    time (dropout, batch statistics), and nothing is kept.

    Args:
        teacher: takes one tensor ``[N, ...]``; its output is a tensor ``[N, ...]`` that depends on each row alone, or a
            tuple that starts with one, or an object or dict with ``logits``, of which the logits alone are kept and
            given. As convolutions of other batch sizes round otherwise, answers may differ in the last digits from
            those of the batch at hand.
        max_bytes: of answers in memory (on the teacher's device) or in the folder; what would go beyond it is computed
            each time.
        folder: keep the answers here instead, as float32 for the student but in ``dtype`` on disk, for the next run and
            for other processes, which may read and write at the same time (ranks of DDP on one file system, say). The
            answers are those of one teacher, known by a hash of its structure, parameters and buffers; when it changes,
            that is an error. A run that is stopped loses the batch in flight. The keys take some 200 bytes of memory a
            row.
        top_k: of ``[N, C]`` logits keep the k largest and the mean of the rest, in the folder only.
        dtype: on disk, torch.float16 or torch.float32.
        temperature: at which the rest of the top-k keeps its share of the probability; that of the loss.

    ``hits`` and ``misses`` count rows.

    Raises:
        TypeError: a teacher that is no module; input that is no tensor, output without one. ValueError: a negative
            ``max_bytes``; an output of another number of rows than its input, or beyond the range of ``dtype``; a
            folder with answers of another teacher or in another form. RuntimeError: a teacher with a folder has
            changed.
    """

    def __init__(
        self,
        teacher: nn.Module,
        max_bytes: int = 1 << 30,
        folder: str | os.PathLike | None = None,
        top_k: int | None = None,
        dtype: torch.dtype = torch.float16,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"Expected teacher to be a torch.nn.Module, got {type(teacher).__name__}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"Expected max_bytes to be an int of at least 0, got {max_bytes!r}")
        if folder is None and top_k is not None:
            raise ValueError(f"Expected a folder for top_k={top_k}, got none")
        self.teacher, self.max_bytes = teacher, max_bytes
        self.hits = self.misses = 0
        self._store = None
        if folder is not None:
            self._store = AnswerStore(folder, teacher_hash(teacher), max_bytes, top_k, dtype, temperature)
        self.forget()

    def forget(self) -> None:
        """Drops all answers in memory; those in a folder stay."""
        self._kept: dict[bytes, Tensor] = {}
        self._bytes = 0
        self._version = self._versions()

    def _versions(self) -> tuple:
        """Changes whenever a weight does: in place (the version) or by another tensor in its place (the address)."""
        tensors = (*self.teacher.parameters(), *self.teacher.buffers())
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a batch as one tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[0] == 0 or any(module.training for module in self.teacher.modules()):
            return self.teacher(x)
        if self._versions() != self._version:
            self._meet_change()
        keys = _keys(x)
        kept = [self._kept.get(key) for key in keys] if self._store is None else self._store.get(keys)
        new = [row for row, answer in enumerate(kept) if answer is None]
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        if new:
            with torch.no_grad():
                answers = logits_of(self.teacher(x if len(new) == len(keys) else x[new]), "teacher")
            if answers.dim() == 0 or answers.shape[0] != len(new):
                raise ValueError(f"Expected {len(new)} rows from the teacher, got a shape of {tuple(answers.shape)}")
            if self._store is not None:
                answers = self._store.put([keys[row] for row in new], answers)
            for row, answer in zip(new, answers, strict=True):
                kept[row] = answer
                if self._store is None:
                    self._keep(keys[row], answer)
        answers = torch.stack(kept)
        return answers if self._store is None else answers.to(x.device)

    def _meet_change(self) -> None:
        if self._store is not None:
            # Moved to another device or loaded with what it had is no change.
            if teacher_hash(self.teacher) != self._store.teacher:
                raise RuntimeError(
                    f"Expected the teacher whose answers are in {self._store.folder}, got one that has changed: make a "
                    "new TeacherCache with another folder"
                )
        self.forget()

    def _keep(self, key: bytes, answer: Tensor) -> None:
        size = answer.numel() * answer.element_size()
        if key not in self._kept and self._bytes + size <= self.max_bytes:
            self._kept[key] = answer.clone()  # a view would hold the whole batch
            self._bytes += size

    def extra_repr(self) -> str:
        if self._store is not None:
            return f"kept={len(self._store)}, max_bytes={self.max_bytes}, folder={self._store.folder}"
        return f"kept={len(self._kept)}, max_bytes={self.max_bytes}"


def _keys(x: Tensor) -> list[bytes]:
    kind = f"{tuple(x.shape[1:])} {x.dtype}".encode()
    rows = x.detach().to("cpu").contiguous().view(x.shape[0], -1).view(torch.uint8).numpy()
    return [
        hashlib.blake2b(row, digest_size=16, key=hashlib.blake2b(kind, digest_size=16).digest()).digest()
        for row in rows
    ]
