"""Pruning in a Lightning ``Trainer``; needs the package lightning (or pytorch_lightning).

    trainer = lightning.Trainer(callbacks=[PruningCallback(sparsity=0.9, schedule=sparsekd.CubicSL(100, 1000))])

Distillation needs no callback: call :class:`sparsekd.KDLoss` in ``training_step``.
"""

from __future__ import annotations

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError as error:
        raise ImportError(f"Expected the package lightning for sparsekd.lightning, got none: {error}") from None

from .pruning import Pruner


class PruningCallback(Callback):
    """Prunes the module while it is fitted, and holds the masks through checkpoints.

    Args:
        sparsity, settings: of :class:`sparsekd.Pruner`; the optimizer is the Trainer's first. The Pruner's step is that
            of the optimizer, so schedules count ``trainer.global_step``.
        squash: drop masks and hooks at the end of the fit; the zeros stay. Else ``callback.pruner`` goes on holding.
        module: path of what is pruned within the LightningModule, all of it by default. One that holds a teacher beside
            the student names the student here: whatever it holds is pruned, frozen or not.

    Raises:
        TypeError, ValueError, AttributeError: as the Pruner does, or for a path that is none, when the fit begins.
    """

    def __init__(self, sparsity: float, squash: bool = True, module: str = "", **settings: object) -> None:
        self.sparsity, self.squash, self.module, self.settings = sparsity, squash, module, settings
        self.pruner: Pruner | None = None
        self._saved: dict | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here the weights and the optimizer's state of a checkpoint are in place.
        pruned = pl_module.get_submodule(self.module)
        self.pruner = Pruner(pruned, self.sparsity, optimizer=trainer.optimizers[0], **self.settings)
        if self._saved is not None:
            self.pruner.load_state_dict(self._saved)
            self._saved = None
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step > self._step:  # gradients may be accumulated over several batches
            self._step = trainer.global_step
            self.pruner.step()
            pl_module.log("sparsity", self.pruner.sparsity(), prog_bar=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.squash:
            self.pruner.squash_mask()

    def state_dict(self) -> dict:
        if self.pruner is None:
            return {}
        try:
            return self.pruner.state_dict()
        except RuntimeError:  # squashed: nothing is left to hold
            return {}

    def load_state_dict(self, state_dict: dict) -> None:
        self._saved = dict(state_dict) or None
