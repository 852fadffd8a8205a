"""convert on other people's models: torchvision's zoos and timm's families, every layer that can be sparse made so."""

import warnings

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.sparse.dispatch import KINDS
from sparsekd.sparse.modules import SparseModule

torchvision = pytest.importorskip("torchvision")

ZOO = torchvision.models
CLASSIFIERS = ZOO.list_models(module=ZOO)
SEGMENTERS = ZOO.list_models(module=ZOO.segmentation)
DETECTORS = ZOO.list_models(module=ZOO.detection)
FAMILIES = (
    "resnet18", "resnext50_32x4d", "seresnet50", "resnest14d", "res2net50_26w_4s", "densenet121", "dla34", "dpn68",
    "vgg11_bn", "inception_v3", "xception41", "efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv2_100",
    "mobilenetv3_small_100", "mobileone_s0", "mnasnet_100", "ghostnet_100", "repvgg_a0", "regnetx_002", "cspresnet50",
    "hrnet_w18_small", "lcnet_050", "convnext_atto", "edgenext_xx_small", "mobilevit_xxs", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "mixer_s16_224", "poolformer_s12", "swin_tiny_patch4_window7_224", "levit_128s",
    "efficientformer_l1", "fastvit_t8", "nfnet_f0", "skresnet18",
)  # fmt: skip
SAMPLE = (
    "torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "torchvision:mobilenet_v3_small",
    "torchvision:googlenet", "torchvision:mnasnet0_5",
)  # fmt: skip
OPTIMIZED_SAMPLE = ("torchvision:squeezenet1_1", "torchvision:regnet_x_400mf")
ALL = [
    *(f"torchvision:{name}" for name in (*CLASSIFIERS, *SEGMENTERS, *DETECTORS)),
    *(f"timm:{name}" for name in FAMILIES),
]
# Sizes that a model insists on; the others take 64 pixels.
SIZES = {"torchvision:vit_h_14": 224, "torchvision:inception_v3": 96, "torchvision:maxvit_t": 224}
SIZES |= dict.fromkeys(("timm:inception_v3", "timm:levit_128s", "timm:efficientformer_l1"), 224)
PREFIXES = {"torchvision:vit_": 224, "timm:vit_": 224, "timm:deit_": 224, "timm:mixer_": 224, "timm:swin_": 224}


def made(name):
    source, _, factory = name.partition(":")
    torch.manual_seed(0)
    if source == "timm":
        return pytest.importorskip("timm").create_model(factory, pretrained=False)
    options = {"weights": None}
    if factory in SEGMENTERS + DETECTORS:
        options["weights_backbone"] = None
    if factory in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return ZOO.get_model(factory, **options)


def inputs(name):
    size = SIZES.get(name) or next((size for start, size in PREFIXES.items() if name.startswith(start)), 64)
    if name.partition(":")[2] in DETECTORS:
        return [torch.rand(3, 96, 96)]
    return torch.randn(1, 3, size, size)


def masked(model):
    """90% of each weight removed, what is left scaled so that activations neither die nor run away."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, KINDS):
                keep = torch.rand_like(module.weight) < 0.1
                module.weight.mul_(keep).mul_(3)
    return model.eval()


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


@torch.no_grad()
def check(name):
    model, x = masked(made(name)), inputs(name)
    if name.partition(":")[2] in DETECTORS:
        x = (x,)

    def answer(network):
        return tensors(network(*x) if isinstance(x, tuple) else network(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparsekd.convert(model, x, mapping={"*": {"kernel": "sparse"}})
    swapped = [module for module in fast.modules() if isinstance(module, SparseModule)]
    left = {c.name: c.reason for c in sparsekd.choices(fast).values() if c.kernel == "dense"}
    plain = [m for n, m in fast.named_modules() if type(m) in KINDS and n not in left]
    assert swapped and not plain, f"{len(swapped)} swapped, {len(plain)} left without a reason"
    expected = answer(model)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in expected)
    if name.partition(":")[2] not in DETECTORS:  # where a last bit decides which boxes are kept
        for want, got in zip(expected, answer(fast), strict=True):
            error = float((want - got).abs().max() / want.abs().max().clamp_min(1e-30))
            assert error <= 1e-4, f"{error:.2g} off"
    dense, state = sparsekd.to_dense(fast), model.state_dict()
    for found in (dense.state_dict(), sparsekd.dense_state_dict(fast)):
        assert list(found) == list(state)
        assert all(torch.equal(found[key], state[key]) for key in state)
    for want, got in zip(expected, answer(dense), strict=True):
        assert torch.equal(want, got)
    dense.load_state_dict(sparsekd.dense_state_dict(fast), strict=True)
    fast.load_state_dict(state, strict=True)
    assert {type(m) for m in dense.modules()} == {type(m) for m in model.modules()}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in SAMPLE])
def test_zoo(name):
    check(name)


@torch.no_grad()
def check_optimized(name):
    """From the third forward on layers run in sequence, and in strips: with the same bits as before."""
    model, x = masked(made(name)), inputs(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparsekd.optimize_for_inference(model, x, mapping={"*": {"kernel": "sparse"}})
    results = [tensors(fast(x)) for _ in range(5)]
    for want, *got in zip(tensors(model(x)), *results, strict=True):
        assert all(torch.equal(got[0], other) for other in got)
        error = float((want - got[0]).abs().max() / want.abs().max().clamp_min(1e-30))
        assert error <= 1e-4, f"{error:.2g} off"


@pytest.mark.parametrize("name", OPTIMIZED_SAMPLE)
def test_optimized_sample(name):
    check_optimized(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in ALL if name.partition(":")[2] not in DETECTORS and name not in OPTIMIZED_SAMPLE]
)
def test_optimized_zoo(name):
    check_optimized(name)


def test_every_family_is_known():
    assert len(CLASSIFIERS) >= 70 and len(SEGMENTERS) >= 6 and len(DETECTORS) >= 8 and len(set(FAMILIES)) >= 30


def test_masked_leaves_a_tenth():
    conv = masked(nn.Conv2d(64, 64, 3))
    assert float((conv.weight != 0).float().mean()) == pytest.approx(0.1, abs=0.01)
