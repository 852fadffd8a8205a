"""The teacher's answers, kept: a frozen teacher says the same of the same image in each epoch.

    batch x --hash of each row--> seen before? -- yes --> its logits from memory
                                      |
                                      no --> one forward of the teacher over the rows that are new

It pays where images come back unchanged (no augmentation) and the teacher's forward is a good part of a step.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class TeacherCache(nn.Module):
    """A teacher that is asked once for each row of input and answers from memory afterwards.

    Takes the place of the teacher in :class:`sparsekd.Distiller`. A row is known by a 128-bit hash (BLAKE2b) of its
    bytes, shape and dtype, so that an augmented image is another row, and no numbering of the samples is needed. When
    the teacher's parameters or buffers change, what is kept is forgotten. In train mode the teacher itself answers each
    time (dropout, batch statistics), and nothing is kept.

    Args:
        teacher: takes one tensor ``[N, ...]``; its output is a tensor ``[N, ...]`` that depends on each row alone. As
            convolutions of other batch sizes round otherwise, answers may differ in the last digits from those of the
            batch at hand.
        max_bytes: of answers in memory (on the teacher's device); what would go beyond it is computed each time.

    ``hits`` and ``misses`` count rows.

    Raises:
        TypeError: a teacher that is no module; input or output that is no tensor. ValueError: a negative ``max_bytes``;
            an output of another number of rows than its input.
    """

    def __init__(self, teacher: nn.Module, max_bytes: int = 1 << 30) -> None:
        super().__init__()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"Expected teacher to be a torch.nn.Module, got {type(teacher).__name__}")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"Expected max_bytes to be an int of at least 0, got {max_bytes!r}")
        self.teacher, self.max_bytes = teacher, max_bytes
        self.hits = self.misses = 0
        self.forget()

    def forget(self) -> None:
        """Drops all answers."""
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
            self.forget()
        keys = _keys(x)
        kept = [self._kept.get(key) for key in keys]
        new = [row for row, answer in enumerate(kept) if answer is None]
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        if new:
            with torch.no_grad():
                answers = self.teacher(x if len(new) == len(keys) else x[new])
            if not isinstance(answers, Tensor):
                raise TypeError(f"Expected the teacher to give one tensor, got {type(answers).__name__}")
            if answers.dim() == 0 or answers.shape[0] != len(new):
                raise ValueError(f"Expected {len(new)} rows from the teacher, got a shape of {tuple(answers.shape)}")
            for row, answer in zip(new, answers, strict=True):
                kept[row] = answer
                self._keep(keys[row], answer)
        return torch.stack(kept)

    def _keep(self, key: bytes, answer: Tensor) -> None:
        size = answer.numel() * answer.element_size()
        if key not in self._kept and self._bytes + size <= self.max_bytes:
            self._kept[key] = answer.clone()  # a view would hold the whole batch
            self._bytes += size

    def extra_repr(self) -> str:
        return f"kept={len(self._kept)}, max_bytes={self.max_bytes}"


def _keys(x: Tensor) -> list[bytes]:
    kind = f"{tuple(x.shape[1:])} {x.dtype}".encode()
    rows = x.detach().to("cpu").contiguous().view(x.shape[0], -1).view(torch.uint8).numpy()
    return [
        hashlib.blake2b(row, digest_size=16, key=hashlib.blake2b(kind, digest_size=16).digest()).digest()
        for row in rows
    ]
