"""linear_kd_loss, which never has the logits in memory, against linear layers and the loss in float64."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import check_op
from torch import nn
from torch.autograd import gradcheck

import sparsekd
from sparsekd.sparse import ops, reference

OPS = torch.ops.sparsekd

# Of the loss, and of each gradient's largest element. float16 and bfloat16: logits are rounded as torch's would be, and
# so is the logits' gradient before the products.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    leading: tuple = (12,)  # the hidden states' shape without the features
    features: int = 6
    teacher_features: int = 5
    classes: int = 10
    maps: bool = False  # features in dimension 1
    biases: tuple = (True, True)
    labels: str = "some"  # all; some, the others ignored; none; absent: no target
    temperature: float = 4.0
    alpha: float = 0.5
    divergence: str = "forward_kl"
    beta: float = 0.3
    label_smoothing: float = 0.0
    distill_ignored: bool = False
    chunk_rows: int | None = None
    dtype: torch.dtype = torch.float32
    turned: bool = False  # features not the fastest dimension in memory
    seed: int = 0

    @property
    def settings(self):
        names = ("temperature", "divergence", "beta", "label_smoothing", "distill_ignored")
        return {name: getattr(self, name) for name in names} | {"alpha": 1.0 if self.labels == "absent" else self.alpha}


def make(case):
    """(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias), target"""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype)

    tensors = []
    for features, bias in zip((case.features, case.teacher_features), case.biases, strict=True):
        hidden = normal(*case.leading, features)
        if case.turned:
            hidden = hidden.transpose(-1, 0).contiguous().transpose(-1, 0)
        if case.maps:
            hidden = hidden.movedim(-1, 1).contiguous()
        tensors += [hidden, normal(case.classes, features), normal(case.classes) if bias else None]
    target = torch.randint(case.classes, case.leading, generator=generator)
    if case.labels == "absent":
        target = None
    elif case.labels != "all":
        target[torch.rand(case.leading, generator=generator) < (0.4 if case.labels == "some" else 2)] = -100
    return tensors, target


def learned(tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors[:3]] + list(tensors[3:])


def gradients(loss, tensors):
    return torch.autograd.grad(loss, [t for t in tensors[:3] if t is not None])


def run(case, tensors, target, **more):
    s, ws, bs, t, wt, bt = tensors
    dim = 1 if case.maps else -1
    options = dict(student_bias=bs, teacher_bias=bt, features_dim=dim, chunk_rows=case.chunk_rows)
    return ops.linear_kd_loss(s, ws, t, wt, target, **options, **case.settings, **more)


def run_reference(case, tensors, target):
    wide = [None if t is None else t.double() for t in tensors]
    for i in (0, 3):
        rows = wide[i].movedim(1, -1) if case.maps else wide[i]
        wide[i] = rows.reshape(-1, rows.shape[-1])
    target = None if target is None else target.reshape(-1)
    # A loss without a term has no gradient either.
    nothing = sum(0 * t.sum() for t in wide[:3] if t is not None)
    return reference.linear_kd_loss_reference(*wide, target, **case.settings) + nothing


def check_case(case):
    made, target = make(case)
    tensors = learned(made)
    got = run(case, tensors, target)
    assert got.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    assert torch.equal(run(case, made, target), got) or got.isnan()  # without gradients
    wide = learned(made)
    want = run_reference(case, wide, target)
    if want.isnan():
        assert got.isnan()
        return
    tolerance = TOLERANCE[case.dtype]
    off = abs(got.item() - want.item())
    assert off <= tolerance * max(want.item(), 0.1), (case, off, want.item())
    names = [n for n, t in zip(("student", "weight", "bias"), tensors[:3], strict=True) if t is not None]
    pairs = zip(gradients(got, tensors), gradients(want, wide), strict=True)
    for what, (got_grad, want_grad) in zip(names, pairs, strict=True):
        assert got_grad.dtype == case.dtype and got_grad.shape == want_grad.shape
        if want_grad.numel():
            error = float((got_grad.double() - want_grad).abs().max())
            size = float(want_grad.abs().max())
            # q - p cancels where the teacher is near: what is lost is of the terms' size.
            terms = max(size, 0.05 / max(got_grad.shape[0], 1))
            assert error <= tolerance * terms + torch.finfo(case.dtype).tiny, (case, what, error, size)


def random_case(seed):
    r = random.Random(seed)
    maps = r.random() < 0.3
    of_maps, of_rows = [(2, 3, 4), (3, 1, 1), (1, 5, 7), (2, 9)], [(1,), (7,), (40,), (3, 11), (2, 3, 4), (0,)]
    return Case(
        leading=r.choice(of_maps if maps else of_rows),
        features=r.choice([1, 5, 8, 33]),
        teacher_features=r.choice([1, 4, 17]),
        classes=r.choice([1, 2, 10, 33, 100]),
        maps=maps,
        biases=(r.random() < 0.5, r.random() < 0.5),
        labels=r.choice(["all", "all", "some", "some", "none", "absent"]),
        temperature=r.choice([1.0, 2.0, 4.0, 0.7]),
        alpha=r.choice([0.0, 0.3, 0.5, 1.0]),
        divergence=r.choice(["forward_kl", "reverse_kl", "jsd"]),
        beta=r.choice([0.1, 0.5, 0.9]),
        label_smoothing=r.choice([0.0, 0.0, 0.1, 1.0]),
        distill_ignored=r.random() < 0.3,
        chunk_rows=r.choice([None, None, 1, 3, 16, 1000]),
        dtype=r.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        turned=r.random() < 0.2,
        seed=seed,
    )  # fmt: skip


def test_worked_by_hand():
    # Heads that copy: the logits are the hidden states of test_kd_loss.test_worked_by_hand.
    import test_kd_loss

    def as_linear(student, teacher, target, **settings):
        eye = torch.eye(2, dtype=student.dtype)
        return ops.linear_kd_loss(student, eye, teacher, eye, target, chunk_rows=1, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_kd_loss.ops, "kd_loss", as_linear)
        test_kd_loss.test_worked_by_hand(torch.float64)


@pytest.mark.parametrize("seed", range(120))
def test_random_configurations(seed):
    check_case(random_case(seed))


LOSSES = {
    "ce": dict(alpha=0.0),
    "forward_kl": dict(divergence="forward_kl"),
    "reverse_kl": dict(divergence="reverse_kl"),
    "jsd": dict(divergence="jsd", beta=0.5),
    "jsd, mostly the student's": dict(divergence="jsd", beta=0.1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(512, 192, 2000), pytest.param((1024, 512, 4000), marks=pytest.mark.slow)])
def test_a_large_head_to_five_digits(sizes, loss):
    """A language model's head, (8192, 4096, 32000), scaled down; default chunks."""
    rows, features, classes = sizes
    case = Case((2, rows // 2), features, features, classes, labels="all", temperature=2.0, seed=1, **LOSSES[loss])
    made, target = make(case)
    made = [None if t is None else t / 8 if t.dim() == 2 and t.shape[0] == case.classes else t for t in made]
    tensors, wide = learned(made), learned(made)
    got, want = run(case, tensors, target), run_reference(case, wide, target)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for got_grad, want_grad in zip(gradients(got, tensors), gradients(want, wide), strict=True):
        assert float((got_grad - want_grad).abs().max()) <= 1e-5 * float(want_grad.abs().max())


# Each thread of torch's matrix product has some MiB of its own, which are much of a small problem.
HARDEST = ("jsd", 2, (1024, 512, 4000))
# Of the process, so that what libraries take counts too. VmHWM starts anew by writing 5 (proc(5)).
PEAK = """
import json, sys, torch
from sparsekd.sparse import ops
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) << 10
def run(rows, features, classes, loss):
    learned = [torch.randn(s).requires_grad_() for s in ((rows, features), (classes, features))]
    taught = [torch.randn(s) for s in ((rows, features), (classes, features))]
    target = torch.randint(classes, (rows,))
    ops.linear_kd_loss(*learned, *taught, target, **loss).backward()
    return sum(t.nbytes for t in (*learned, *taught, target, *(t.grad for t in learned)))
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
loss = json.loads(sys.argv[1])
run(300, 64, 200, loss)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
held = run(*map(int, sys.argv[3:]), loss)
print(held, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what was freed")
@pytest.mark.parametrize(
    "loss, threads, sizes",
    [
        pytest.param(loss, threads, sizes, marks=() if (loss, threads, sizes) == HARDEST else pytest.mark.slow)
        for sizes in ((1024, 512, 4000), (2048, 512, 8000), (4096, 1024, 16000))
        for threads in (1, 2)
        for loss in LOSSES
    ],
)
def test_peak_memory_is_that_of_inputs_gradients_and_one_chunk(loss, threads, sizes):
    """The logits alone would take 16 to 250 MiB, of which eager PyTorch has several."""
    command = [sys.executable, "-c", PEAK, json.dumps(LOSSES[loss]), *map(str, (threads, *sizes))]
    ran = subprocess.run(command, capture_output=True, text=True, env=None)
    assert ran.returncode == 0, ran.stderr
    held, peak = map(int, ran.stdout.split())
    chunk = held / 8  # kernels/linear_kd_loss.py
    assert held < peak <= 1.2 * (held + chunk), f"{peak / 2**20:.1f} MiB for {held / 2**20:.1f} MiB and one chunk"


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_logits_of_minus_infinity_mask_a_class(divergence):
    bias = torch.tensor([0.0, -torch.inf, 1.0], dtype=torch.float64)
    student, weight = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)

    def loss(kept, labels):
        w, b = weight[kept], bias[kept]
        options = dict(divergence=divergence, student_bias=b, teacher_bias=b)
        return ops.linear_kd_loss(student, w, student * 2, w, torch.tensor(labels), **options)

    assert float(loss([0, 1, 2], [0, 2, 2, -100])) == pytest.approx(float(loss([0, 2], [0, 1, 1, -100])), rel=1e-12)


def arguments(case, wanted=(True, True, True)):
    tensors, target = make(case)
    for i in (0, 3):
        tensors[i] = tensors[i].reshape(1, -1, tensors[i].shape[-1])
    target = None if target is None else target.reshape(-1)
    s = case.settings
    order = ("temperature", "alpha", "divergence", "beta")
    return [*tensors, target, *(s[n] for n in order), -100, s["label_smoothing"], s["distill_ignored"], 5, list(wanted)]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_opcheck(divergence):
    check_op(OPS.linear_kd_loss, arguments(Case(divergence=divergence, dtype=torch.float64)), (0, 1, 2))


@pytest.mark.parametrize("sample", [Case(biases=(False, False)), Case(labels="absent", dtype=torch.float16)])
def test_opcheck_of_odd_calls(sample):
    check_op(OPS.linear_kd_loss, arguments(sample, (True, True, sample.biases[0])), (0, 1, 2))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("maps", [False, True])
def test_gradcheck(divergence, maps):
    leading = (2, 2, 1) if maps else (3,)
    case = Case(leading, 2, 3, 4, maps, divergence=divergence, dtype=torch.float64, label_smoothing=0.1, chunk_rows=2)
    made, target = make(case)
    tensors = [t.requires_grad_() for t in made[:3]]
    assert gradcheck(lambda s, w, b: run(case, [s, w, b, *made[3:]], target), tensors)


def test_differentiated_twice_is_an_error():
    case = Case()
    made, target = make(case)
    tensors = learned(made)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(run(case, tensors, target), tensors[0], create_graph=True)


def test_a_factor_reaches_the_gradients_and_only_those_asked_for_are_made():
    case = Case(biases=(False, True))
    made, target = make(case)
    tensors = learned(made)
    plain = gradients(run(case, tensors, target), tensors)
    for got, want in zip(gradients(run(case, tensors, target) * 3, tensors), plain, strict=True):
        torch.testing.assert_close(got, 3 * want)
    frozen = [tensors[0], made[1], None, *made[3:]]
    (alone,) = torch.autograd.grad(run(case, frozen, target), tensors[0])
    assert torch.equal(alone, plain[0])
    raw = arguments(case, (False, False, False))
    assert [g.numel() for g in OPS.linear_kd_loss(*raw)[1:]] == [0, 0, 0]
    raw[0] = raw[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"Expected wanted\[0\] of an input that requires a gradient"):
        OPS.linear_kd_loss(*raw)[0].backward()


@pytest.mark.parametrize("maps", [False, True])
def test_compiled_equals_eager(maps):
    torch._dynamo.reset()
    case = Case((2, 3, 4), maps=maps)
    made, target = make(case)

    def function(s, w, b, t, wt, bt):
        return run(case, [s * 2, w, b, t, wt, bt], target) * 0.5

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors, again = learned(made), learned(made)
    want, got = function(*tensors), compiled(*again)
    assert torch.equal(want, got)
    for one, other in zip(gradients(want, tensors), gradients(got, again), strict=True):
        torch.testing.assert_close(one, other)


def test_the_module_takes_heads():
    torch.manual_seed(0)
    linear, other = nn.Linear(6, 10), nn.Linear(5, 10, bias=False)
    student, teacher = torch.randn(2, 3, 6), torch.randn(2, 3, 5)
    target = torch.randint(10, (2, 3))
    loss = sparsekd.LinearKDLoss(temperature=2.0, alpha=0.3)
    want = sparsekd.KDLoss(2.0, 0.3)(linear(student).movedim(-1, 1), other(teacher).movedim(-1, 1), target)
    torch.testing.assert_close(loss(student, linear, teacher, other, target), want)
    conv, conv_other = nn.Conv2d(6, 10, 1), nn.Conv2d(5, 10, (1, 1), padding="same")
    student, teacher, target = torch.randn(2, 6, 4, 3), torch.randn(2, 5, 4, 3), torch.randint(10, (2, 4, 3))
    want = sparsekd.KDLoss(2.0, 0.3)(conv(student), conv_other(teacher), target)
    got = loss(student, conv, teacher, conv_other, target)
    torch.testing.assert_close(got, want)
    got.backward()
    got_grad, conv.weight.grad = conv.weight.grad, None
    want.backward()
    torch.testing.assert_close(got_grad, conv.weight.grad)
    for wrong, error in ((nn.Conv2d(6, 10, 3), ValueError), (nn.ReLU(), TypeError), (linear, ValueError)):
        with pytest.raises(error, match="Expected"):
            loss(student, wrong, teacher, conv_other, target)
    for settings in (dict(divergence="kl"), dict(beta=1.0), dict(chunk_rows=0), dict(alpha=2)):
        with pytest.raises(ValueError, match="Expected"):
            sparsekd.LinearKDLoss(**settings)


def test_autocast_takes_the_lower_dtype():
    case = Case((64,), 32, 32, 50)
    made, target = make(case)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(case, made, target)
    lower = [None if t is None else t.bfloat16() for t in made]
    assert torch.equal(got, run(case, lower, target)) and got.dtype == torch.float32


@pytest.mark.parametrize(
    "change, error, said",
    [
        (dict(student=torch.ones(4)), ValueError, r"Expected student of shape \[..., features\]"),
        (dict(teacher=torch.ones(5, 3)), ValueError, "Expected student and teacher of the same rows"),
        (dict(student_weight=torch.ones(5, 4)), ValueError, r"Expected student_weight of shape \[classes, 3\]"),
        (dict(student_weight=torch.ones(5, 3).double()), TypeError, "Expected student_weight of dtype torch.float32"),
        (dict(teacher_weight=torch.ones(6, 3)), ValueError, "as many classes, got 5 and 6"),
        (dict(student_bias=torch.ones(4)), ValueError, r"Expected student_bias of shape \(5,\), got \(4,\)"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, r"Expected target of shape \(4,\), got \(3,\)"),
        (dict(target=torch.zeros(4)), TypeError, "Expected target of dtype torch.int64"),
        (dict(target=torch.tensor([0, 5, 0, 0])), IndexError, r"Expected targets in 0..4 .*, got 5"),
        (dict(target=None), ValueError, "Expected a target unless alpha is 1"),
        (dict(divergence="kl"), ValueError, "Expected divergence to be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        (dict(divergence="jsd", beta=0.0), ValueError, r"Expected beta in \(0, 1\), got 0.0"),
        (dict(temperature=0.0), ValueError, "Expected temperature to be positive"),
        (dict(chunk_rows=0), ValueError, "Expected chunk_rows of at least 1"),
        (dict(student=torch.ones(4, 3, dtype=torch.int32)), TypeError, "Expected student of dtype"),
        (dict(teacher=torch.ones(4, 3, device="meta")), ValueError, "Expected teacher on cpu, got meta"),
    ],
)
def test_what_it_refuses(change, error, said):
    good = dict(student=torch.ones(4, 3), student_weight=torch.ones(5, 3), teacher=torch.ones(4, 3))
    good |= dict(teacher_weight=torch.ones(5, 3), target=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(error, match=said):
        ops.linear_kd_loss(**(good | change))
