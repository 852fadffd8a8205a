"""Feature hints: the loss by hand and by formula, adapters, pooling, and that the hooks go."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekd.distillation import FEATURE_LOSSES, Distiller, FeatureHints, KDLoss

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def network(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, CLASSES))


class Convolutional(nn.Module):
    def __init__(self, channels, stride=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def batches(*shape, count=2):
    return [(torch.randn(5, *shape), torch.randint(CLASSES, (5,))) for _ in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def hint_of(student, teacher, pairs, x):
    with FeatureHints(student, teacher, pairs) as hints:
        student(x)
        with torch.no_grad():
            teacher(x)
        return hints.loss(), hints


def test_two_pairs_by_hand():
    # Differences 1 and -3 at the first pair, 2 at the second: ((1 + 9) / 2 + 4) / 2 = 4.5.
    hints = FeatureHints(
        *(nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()}) for _ in range(2)), {"a": "b", "b": "a"}
    )
    with hints:
        (own_a, taught_b), (own_b, taught_a) = hints._modules
        own_a(torch.tensor([[3.0, 0.0]])), taught_b(torch.tensor([[2.0, 3.0]]))
        own_b(torch.tensor([[1.0]])), taught_a(torch.tensor([[-1.0]]))
        assert hints.loss().item() == 4.5


def test_features_of_one_shape():
    student, teacher, x = network(), network(), torch.randn(5, 4)
    student.eval(), teacher.eval()
    loss, hints = hint_of(student, teacher, {"0": "0", "3": "3"}, x)
    want = (F.mse_loss(student[0](x), teacher[0](x)) + F.mse_loss(student(x), teacher(x))) / 2
    assert loss.item() == pytest.approx(want.item(), rel=1e-6) and len(hints.adapters) == 0
    loss.backward()
    assert student[0].weight.grad is not None and teacher[0].weight.grad is None


def test_feature_is_the_output_before_it_is_changed_in_place():
    student, teacher, x = Convolutional(4).eval(), Convolutional(4).eval(), torch.randn(5, 1, 8, 8)
    want = F.mse_loss(student.stem[:2](x), teacher.stem[:2](x))
    assert want.item() == pytest.approx(hint_of(student, teacher, {"stem.1": "stem.1"}, x)[0].item(), rel=1e-6)


@pytest.mark.parametrize("own, taught", [((4, 1), (4, 2)), ((4, 2), (4, 1))], ids=["student larger", "teacher larger"])
def test_features_of_other_sizes_are_pooled_down(own, taught):
    student, teacher, x = Convolutional(*own).eval(), Convolutional(*taught).eval(), torch.randn(5, 1, 8, 8)
    pooled = [F.adaptive_avg_pool2d(model.stem(x), (4, 4)) for model in (student, teacher)]
    got, hints = hint_of(student, teacher, {"stem": "stem"}, x)
    assert got.item() == pytest.approx(F.mse_loss(*pooled).item(), rel=1e-6) and len(hints.adapters) == 0


def test_adapters_are_made_trained_and_taken_back():
    student, teacher = Convolutional(3), Convolutional(5, stride=2)
    optimizer = sgd(student)
    given = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    distiller = Distiller(student, teacher, features={"stem": "stem", "head": "head"})
    distiller.fit(batches(1, 8, 8), 1, optimizer)
    assert list(distiller.hints.adapters) == ["0"]  # heads have one width
    adapter = distiller.hints.adapters["0"]
    assert isinstance(adapter, nn.Conv2d) and tuple(adapter.weight.shape) == (5, 3, 1, 1)
    before = adapter.weight.detach().clone()
    distiller.fit(batches(1, 8, 8), 1, optimizer)
    assert distiller.hints.adapters["0"] is adapter and not torch.equal(adapter.weight, before)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == given
    assert set(map(id, optimizer.state)) <= set(given)


def test_flat_features_take_a_linear_adapter():
    _, hints = hint_of(network(6), network(10), {"0": "0"}, torch.randn(5, 4))
    assert isinstance(hints.adapters["0"], nn.Linear) and tuple(hints.adapters["0"].weight.shape) == (10, 6)


def test_objective_has_all_its_terms():
    student, teacher = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    (x, y), *_ = loader = batches(4, count=1)
    with torch.no_grad():
        logits, taught = student(x), teacher(x)
        want = KDLoss()(logits, taught, y) + 0.5 * F.mse_loss(logits, taught) + 0.01 * student[0].weight.abs().sum()
    distiller = Distiller(student, teacher, features={"0": "0"}, penalty="l1", penalty_weight=0.01, feature_weight=0.5)
    (record,) = distiller.fit(loader, 1, sgd(student))
    assert record.loss == pytest.approx(want.item(), rel=1e-5)
    assert record.val_accuracy is None


def test_hooks_are_removed_also_after_an_error():
    student, teacher = network(), network()
    distiller = Distiller(student, teacher, features={"0": "0"})
    distiller.fit(batches(4), 1, sgd(student))
    with pytest.raises(TypeError):
        distiller.fit([None], 1, sgd(student))
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_features_that_do_not_fit():
    student, teacher, x = network(), network(), torch.randn(5, 4)
    with pytest.raises(ValueError, match="Expected features to name modules of the student, such as .*, got 'layer3'"):
        Distiller(student, teacher, features={"layer3": "0"})
    with pytest.raises(
        ValueError, match="Expected features to name modules of the teacher, such as .*, got '0.weight'"
    ):
        Distiller(student, teacher, features={"0": "0.weight"})
    with pytest.raises(TypeError, match="Expected features as a dict from student paths to teacher paths, got list"):
        Distiller(student, teacher, features=["0"])
    with pytest.raises(ValueError, match="Expected a teacher to take features from, got none"):
        Distiller(student, None, features={"0": "0"})
    with pytest.raises(ValueError, match=r"at '0' and 'stem', got \(5, 6\) and \(5, 3, 4, 1\)"):
        with FeatureHints(student, Convolutional(3), {"0": "stem"}) as hints:
            student(x), hints._modules[0][1](x[:, None, :, None])
            hints.loss()
    with pytest.raises(RuntimeError, match="Expected '3' of the teacher to run in its forward, got no output of it"):
        with FeatureHints(student, teacher, {"0": "3"}) as hints:
            student(x)
            hints.loss()
    with pytest.raises(TypeError, match="Expected '0' of the student to give a tensor, or a tuple .*, got tuple"):
        with FeatureHints(nn.Sequential(Giving(lambda x: (None, x))), teacher, {"0": "3"}) as hints:
            hints._modules[0][0](x)
    with pytest.raises(ValueError, match="Expected a feature loss out of fitnet, at, rkd, sp or a callable, got 'crd'"):
        Distiller(student, teacher, features={"0": "0"}, feature_loss="crd")
    with pytest.raises(TypeError, match="Expected a feature loss as a name or a callable, got int"):
        Distiller(student, teacher, features={"0": "0"}, feature_loss=3)
    with pytest.raises(ValueError, match="Expected features for feature_loss='at', got none"):
        Distiller(student, teacher, feature_loss="at")


class Giving(nn.Module):
    """A linear layer whose output is wrapped."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


OUTPUTS = {
    "tuple": lambda x: (x, "state"),
    "list": lambda x: [x],
    "dict": lambda x: {"logits": x},
    "hidden before logits": lambda x: {"logits": x + 9, "last_hidden_state": x},
    "object": lambda x: SimpleNamespace(logits=x),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_taps_of_what_is_no_tensor(kind):
    """KD_Lib#128: outputs of Hugging Face's modules. An LSTM, an attention and a block give tuples."""
    student, teacher, x = Giving(OUTPUTS[kind]), nn.Linear(4, 3), torch.randn(5, 4)
    outer = nn.ModuleDict({"block": student})
    with FeatureHints(outer, teacher, {"block": ""}) as hints:
        student(x), teacher(x)
        got = hints.loss()
    assert got.item() == pytest.approx(F.mse_loss(student.inner(x), teacher(x)).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["at", "rkd", "sp", "own"])
def test_other_losses_of_features(name):
    """Of other widths, without adapters; attention maps of other sizes are pooled down."""
    of = FEATURE_LOSSES.get(name, lambda own, taught: (own.mean() - taught.mean()).abs())
    student, teacher, x = Convolutional(3, 2), Convolutional(5, 1 if name == "at" else 2), torch.randn(5, 1, 8, 8)
    own, taught = student.stem(x), teacher.eval().stem(x).detach()
    y, want = torch.zeros(5, dtype=torch.int64), of(own, F.adaptive_avg_pool2d(taught, 4) if name == "at" else taught)
    want = KDLoss()(student(x), teacher(x).detach(), y) + 0.5 * want
    chosen = of if name == "own" else name
    distiller = Distiller(student, teacher, features={"stem": "stem"}, feature_weight=0.5, feature_loss=chosen)
    (record,) = distiller.fit([(x, y)], 1, sgd(student))
    assert record.loss == pytest.approx(want.item(), rel=1e-5) and len(distiller.hints.adapters) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_adapters_are_trained_in_float32(dtype):
    """A GradScaler refuses gradients in float16, and steps of bfloat16 weights are lost in rounding."""
    student = Convolutional(3)
    distiller = Distiller(student, Convolutional(5), features={"stem": "stem"})
    distiller.fit(batches(1, 8, 8), 1, sgd(student), amp=dtype, clip_norm=1.0)
    assert distiller.hints.adapters["0"].weight.dtype == torch.float32
