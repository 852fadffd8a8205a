"""Models by name, for the command line and the benchmarks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def model_of(name: str, num_classes: int):
    """A model by name: of this package, torchvision (``torchvision:`` may be left out), ``timm:name`` or
    ``package.module:factory``. Random weights."""
    from torch import nn

    from . import reference_models

    package, _, factory = name.rpartition(":")
    if package == "timm":
        timm = _imported("timm")
        if not timm.is_model(factory):
            raise ValueError(f"Expected a model of timm's (timm.list_models()), got {factory!r}")
        return timm.create_model(factory, pretrained=False, num_classes=num_classes)
    if package == "torchvision":
        return _of_torchvision(factory, num_classes)
    if package:
        make = getattr(_imported(package), factory, None)
        if not callable(make):
            raise ValueError(f"Expected a function {factory} in {package} that makes the model, got none")
        model = make()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Expected {name} to make a torch.nn.Module, got {type(model).__name__}")
        return model
    ours = {
        "reference_teacher": reference_models.reference_teacher,
        "reference_student": reference_models.reference_student,
        "cifar_resnet20": reference_models.cifar_resnet20,
        "cifar_resnet20x4": lambda num_classes: reference_models.cifar_resnet20(width=64, num_classes=num_classes),
    }
    if name in ours:
        return ours[name](num_classes=num_classes)
    return _of_torchvision(name, num_classes, tuple(ours))


def _of_torchvision(name: str, num_classes: int, others: tuple[str, ...] = ()):
    models = _imported("torchvision").models
    if name not in models.list_models():
        own = f"{', '.join(others)}, " if others else ""
        raise ValueError(
            f"Expected a model out of {own}torchvision's, timm:NAME or package.module:factory, got {name!r}"
        )
    parts = name in models.list_models(module=models.segmentation) + models.list_models(module=models.detection)
    options = {"weights_backbone": None} if parts else {}
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def _imported(package: str):
    # As `python -m` does: a file in the folder where one stands can be named.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"Expected the package {package} to be importable, got: {error}") from error
