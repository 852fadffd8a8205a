"""Activations' memory: used again, never twice at once, given back, and only inside a network's own forward."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import fx, nn

import sparsekd
from sparsekd.sparse.arena import reuse_memory, reuses

MIB = 2**18  # float32 elements


class Net(nn.Module):
    """Results of 1 MiB, their addresses noted."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = x + 1
        z = y * 2
        self.seen.append((y.data_ptr(), z.data_ptr()))
        return z


@pytest.fixture
def net():
    return Net().eval()


def test_the_next_forward_has_the_memory_of_the_last(net):
    arena = reuse_memory(net)
    x = torch.zeros(MIB)
    assert arena.idle() == 0
    for _ in range(4):
        net(x)
    assert arena.idle() == 2 * 4 * MIB
    assert len({address for pair in net.seen for address in pair}) == 2
    assert all(y != z for y, z in net.seen)


def test_what_is_kept_is_not_written_again(net):
    arena = reuse_memory(net)
    kept = [net(torch.full((MIB,), float(i))) for i in range(4)]
    assert len({result.data_ptr() for result in kept}) == 4
    assert all(bool((result == 2 * (i + 1)).all()) for i, result in enumerate(kept))
    view = kept[0][5:7]
    del kept
    gc.collect()
    net(torch.zeros(MIB))
    net(torch.zeros(MIB))
    assert view.tolist() == [2.0, 2.0] and arena.idle() == 2 * 4 * MIB


def test_small_tensors_and_those_outside_are_mallocs(net):
    arena = reuse_memory(net)
    assert reuse_memory(net) is arena
    net(torch.zeros(MIB // 2))
    torch.zeros(MIB) + 1
    assert arena.idle() == 0


def test_memory_that_torchs_convolution_takes_for_itself():
    """oneDNN frees by the pointer alone."""
    conv, x = nn.Conv2d(16, 64, 3, padding=1).eval(), torch.randn(2, 16, 96, 96)
    with torch.no_grad():
        expected = conv(x)
        arena = reuse_memory(conv)
        for _ in range(3):
            assert torch.equal(conv(x), expected)
    assert arena.idle() >= expected.nbytes


def test_whether_it_would_be_of_use(net):
    assert reuses(lambda: net(torch.zeros(MIB))) and not reuses(lambda: net(torch.zeros(MIB // 2)))
    with pytest.raises(ZeroDivisionError):
        reuses(lambda: 1 / 0)


def test_blocks_without_use_are_given_back(net):
    arena = reuse_memory(net)
    net(torch.zeros(8 * MIB))
    assert arena.idle() == 2 * 8 * 4 * MIB
    net(torch.zeros(2 * MIB))  # too small for those
    assert arena.idle() == 2 * 8 * 4 * MIB + 2 * 2 * 4 * MIB
    net(torch.zeros(2 * MIB))
    assert arena.idle() == 2 * 2 * 4 * MIB
    net(torch.zeros(2 * MIB - 9))  # a little smaller: the same blocks
    assert len({address for pair in net.seen[1:] for address in pair}) == 2


def test_an_error_ends_the_forward(net):
    arena = reuse_memory(net)
    with pytest.raises(RuntimeError):
        net(torch.zeros(MIB, dtype=torch.bool).view(2, -1) @ torch.zeros(3))
    inner = nn.Sequential(net, nn.Linear(3, 3))
    outer = reuse_memory(inner)
    with pytest.raises(RuntimeError):
        inner(torch.zeros(MIB))
    before = outer.idle(), arena.idle()
    torch.zeros(MIB) + 1
    assert (outer.idle(), arena.idle()) == before
    assert arena.idle() > 0  # the inner one served, as it was entered last


def test_results_outlive_the_network(net):
    reuse_memory(net)
    result = net(torch.ones(MIB))
    del net
    gc.collect()
    assert bool((result == 4).all())


def test_threads_share_an_arena(net):
    reuse_memory(net)
    wrong = []

    def work(value):
        for _ in range(20):
            if not bool((net(torch.full((MIB,), value)) == 2 * (value + 1)).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("graph", [False, True])
def test_copies_have_an_arena_of_their_own(graph):
    model = nn.Sequential(nn.ReLU())
    model = fx.symbolic_trace(model) if graph else model
    arena = reuse_memory(model)
    twin = copy.deepcopy(copy.deepcopy(model))
    (other,) = {hook.__self__ for hooks in (twin._forward_hooks, twin._forward_pre_hooks) for hook in hooks.values()}
    twin(torch.zeros(MIB))
    assert other.idle() == 4 * MIB and arena.idle() == 0
    assert torch.equal(pickle.loads(pickle.dumps(model))(torch.ones(MIB)), torch.ones(MIB))


def test_in_place_resizing_and_compiling(net):
    class Resizes(nn.Module):
        def forward(self, x):
            y = torch.empty(0)
            torch.add(x, 1, out=y)  # a resize inside of the forward
            return y.resize_(2 * MIB)

    model = Resizes()
    arena = reuse_memory(model)
    assert bool((model(torch.ones(MIB))[:MIB] == 2).all())
    assert arena.idle() == 3 * 4 * MIB
    exported = torch.export.export(reused := nn.Sequential(nn.ReLU()), (torch.zeros(MIB),))
    reuse_memory(reused)
    with_hooks = torch.export.export(reused, (torch.zeros(MIB),))
    assert str(with_hooks.graph) == str(exported.graph)
    compiled = torch.compile(reused, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(MIB)), torch.ones(MIB))


def test_a_users_hooks_of_the_root_are_called():
    """A trace loses them, which is no matter for an arena's own."""
    model, seen = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()).eval(), []
    x = torch.randn(1, 3, 9, 9)
    reuse_memory(model)
    assert isinstance(sparsekd.optimize_for_inference(model, x), fx.GraphModule)
    model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="the model: its hooks would be lost"):
        fast = sparsekd.optimize_for_inference(model, x)
    seen.clear()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert seen == [1, 1] and isinstance(fast[0], fx.GraphModule)
