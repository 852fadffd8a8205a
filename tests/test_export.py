"""Converted models elsewhere: ONNX by way of to_dense, torch.export with our ops inside."""

import warnings

import pytest
import torch
from torch import nn

import sparsekd
from sparsekd.measure.engines import exported
from sparsekd.reference_models import ReferenceNet


class Small(nn.Module):
    """Convolutions with a residual, depthwise, batch-norm, and a linear layer: 8 channels of 12 x 12."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.point(self.depthwise(x)) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def fast():
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight[torch.rand_like(module.weight) < 0.7] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsekd.convert(model, torch.randn(2, 3, 12, 12), mapping={"*": {"kernel": "sparse"}})


@torch.no_grad()
@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_gives_the_same(fast, tmp_path, dynamo):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    x, dense = torch.randn(2, 3, 12, 12), sparsekd.to_dense(fast)
    path = tmp_path / "model.onnx"
    if dynamo:
        pytest.importorskip("onnxscript")
        torch.onnx.export(dense, (x,), path, dynamo=True)
    else:
        path.write_bytes(exported(dense, x))
    onnx.checker.check_model(onnx.load(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), fast(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(dense.point.weight, fast.point.weight)


@torch.no_grad()
def test_export_keeps_our_ops_and_a_dynamic_batch(fast, tmp_path):
    x = torch.randn(2, 3, 12, 12)
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    ours = [node for node in program.graph.nodes if "sparsekd" in str(node.target)]
    assert len(ours) == 4
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        torch.testing.assert_close(loaded(x), fast(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_export_of_a_model_that_chooses_by_shape():
    """What was measured is nothing for a compiler: the sparse ops are exported."""
    torch.manual_seed(0)
    model, x = ReferenceNet(8, 32).eval(), torch.randn(1, 3, 32, 32)
    model.fc1.weight[torch.rand_like(model.fc1.weight) < 0.95] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = sparsekd.convert(model, x)
    if isinstance(fast.fc1, sparsekd.SparseLinear):
        assert sparsekd.choices_by_shape(fast)
    loaded = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_torch_jit_trace_is_told_of_those_who_can():
    model = sparsekd.convert(
        nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), torch.randn(1, 4, 9, 9), mapping={"*": {"kernel": "sparse"}}
    )
    for x in (torch.randn(1, 4, 9, 9), torch.randn(2, 4, 9, 9)):
        for _ in range(3):
            model(x)
        with pytest.raises(RuntimeError, match="Expected torch.export or torch.compile to trace a sparse convolution"):
            torch.jit.trace(model, x)
