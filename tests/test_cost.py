"""What the loss costs, without a clock: which operations read or write the maps, the bytes and multiplications, what is
kept for the backward pass, and that the host never waits for a GPU. benchmarks/cost.py measures the seconds."""

import subprocess, sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gini_loss.fused import mean_rectified
from gini_loss.targets import MixedTargets
from gini_loss.losses import GiniKLLoss
from gini_loss.tap import FeatureTap

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def plain_terms(A, y, n):
    "Equations 1 to 8 with a one-hot matrix of all n classes"
    M, Y = A.abs().mean((2, 3)), F.one_hot(y, n).to(A.dtype)
    S = M.T @ (Y / Y.sum(0).clamp(min=1))
    P = S / S.sum(1, keepdim=True)
    hS, hY = P.sum(0) / P.sum(), Y.sum(0) / len(Y)
    used = hS > 0
    return (1 - P.square().sum(1)).mean(), torch.where(
        used, hS * (torch.where(used, hS, 1) / torch.where(used, hY, 1)).log(), 0
    ).sum()


class Watch(TorchDispatchMode):
    """Bytes of the new arrays, and names of the operations that read or write at least `big` numbers; views are not
    counted"""

    def __init__(self, big):
        super().__init__()
        self.big, self.bytes, self.names = big, 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.is_view:
            return out
        given = [t for t in args if isinstance(t, torch.Tensor)]
        results = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        before = {t.untyped_storage().data_ptr() for t in given}
        new = [t for t in results if t.untyped_storage().data_ptr() not in before]
        self.bytes += sum(t.untyped_storage().nbytes() for t in new)
        if any(t.numel() >= self.big for t in (*given, *new)):
            self.names.append(op.__name__.split('.')[0])
        return out


def watch(terms, A):
    "Forward, backward"
    x = A.clone().requires_grad_()
    with Watch(A.numel()) as forward:
        loss = sum(terms(x))
    with Watch(A.numel()) as backward:
        torch.autograd.grad(loss, x)
    return forward, backward


def batch(n, m=256, c=64, size=4, present=None):
    "Maps, and labels drawn from all n classes, or from `present` of them, spread over the n"
    torch.manual_seed(0)
    present = present or n
    return torch.randn(m, c, size, size), torch.randint(0, present, (m,)) * (n // present)


# ---- Only the pooling touches the maps ----


@pytest.mark.parametrize(
    'rectify, forward, backward',
    [('abs', ['abs', 'mean'], ['sgn', 'mul_']), ('relu', ['amin', 'relu', 'mean'], ['sgn', 'clamp', 'mul_'])],
)
@pytest.mark.parametrize('n', [10, 10**6])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_only_the_pooling_touches_the_maps(rectify, forward, backward, n, layout):
    A, y = batch(n)
    seen = watch(lambda x: GiniKLLoss(rectify=rectify).terms(x, y), A.to(memory_format=layout))
    assert seen[0].names == forward and seen[1].names == backward


def test_the_plain_form_touches_them_more_often():
    "The test above can fail: the plain form uses more operations"
    A, y = batch(10)
    assert len(watch(lambda x: plain_terms(x, y, 10), A)[1].names) > 2


def test_nothing_as_large_as_the_maps_is_kept():
    """Between the passes, the loss keeps the maps, which the network keeps anyway, and a few numbers per image and
    channel"""
    A, y = batch(10**6)
    A.requires_grad_()
    kept = {}

    def note(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = GiniKLLoss()(A, y)
    loss.backward()
    others = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p != A.untyped_storage().data_ptr())
    assert A.untyped_storage().data_ptr() in kept and others <= 4 * 8 * len(A) * A.shape[1]


# ---- Nothing grows with the number of classes ----

GIVEN = pytest.mark.parametrize('given', [False, True], ids=['n_classes not given', 'n_classes given'])


def bytes_made(A, y, n_classes=None):
    "Bytes of all arrays that are made, forward and backward"
    return sum(w.bytes for w in watch(lambda x: GiniKLLoss(n_classes=n_classes).terms(x, y), A))


@GIVEN
@pytest.mark.parametrize('size', [1, 14], ids=['features', 'maps'])
@pytest.mark.parametrize('present', [10, 100])
def test_the_same_images_take_the_same_bytes_for_any_number_of_classes(present, size, given):
    "Images of ten classes, or of a hundred: not one byte more if the network has a million classes"

    def total(n):
        return bytes_made(*batch(n, 128, 64, size, present), n if given else None)

    assert total(100) == total(1000) == total(21_841) == total(10**6)


@GIVEN
def test_bytes_do_not_grow_with_the_number_of_classes(given):
    "Labels drawn from up to a million classes: on maps at most 5 % more than with 100, and less than the plain form"

    def total(n):
        return bytes_made(*batch(n, 128, 64, 14), n if given else None)

    A, y = batch(100, 128, 64, 14)
    plain = sum(w.bytes for w in watch(lambda x: plain_terms(x, y, 100), A))
    for n in (1000, 21_841, 10**6):
        assert total(n) <= min(1.05 * total(100), plain)


def peak_bytes(f):
    "Peak of the bytes that `f` allocates, beyond those allocated before"
    f()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        f()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    now = peak = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        peak = max(peak, now)
    return peak


def peak(n, m, c, size, given=True, mixed=False, terms=None, present=None):
    "Peak memory of the loss, or of `terms`, forward and backward"
    A, y = batch(n, m, c, size, present)
    A.requires_grad_()
    targets = MixedTargets(y, y.flip(0), torch.linspace(0, 1, m)) if mixed else y
    loss = GiniKLLoss(n_classes=n if given else None)

    def both():
        return terms(A, y, n) if terms else loss.terms(A, targets)

    return peak_bytes(lambda: torch.autograd.grad(sum(both()), A))


@GIVEN
@pytest.mark.parametrize('m, c, size', [(256, 512, 4), (64, 512, 4), (256, 128, 7)])
def test_peak_memory_of_maps_does_not_depend_on_the_number_of_classes(m, c, size, given):
    "Ten classes or a million: little more than the gradient of the maps, and a third of the plain form"
    few, plain = peak(10, m, c, size, given), peak(100, m, c, size, terms=plain_terms)
    for n in (100, 1000, 10**6):
        assert peak(n, m, c, size, given) <= 1.02 * few < 0.5 * plain


FEATURES = pytest.mark.parametrize('m, c', [(256, 512), (512, 2048)])


@GIVEN
@FEATURES
def test_peak_memory_of_features_does_not_depend_on_the_number_of_classes(m, c, given):
    "The same images, of a hundred classes: the same memory if the network has a million"
    few = peak(100, m, c, 1, given, present=100)
    for n in (1000, 10**6):
        assert peak(n, m, c, 1, given, present=100) == pytest.approx(few, rel=0.01)


@GIVEN
@FEATURES
def test_peak_memory_of_features_grows_with_the_classes_in_the_batch(m, c, given):
    "S has a column for each class of the batch. The most there can be is about a class for each image"
    most, features = peak(10**6, m, c, 1, given), 4 * m * c
    assert most <= 15 * features and most <= 2.6 * peak(100, m, c, 1, given)


@pytest.mark.parametrize('m, c, size', [(256, 512, 4), (256, 512, 1)])
def test_peak_memory_of_mixed_labels(m, c, size):
    "Two labels for each image: at most twice the memory, whatever the number of classes"
    most = peak(10**6, m, c, size, mixed=True)
    assert peak(10**4, m, c, size, mixed=True) == pytest.approx(most, rel=0.01) and most <= 2.1 * peak(
        10**6, m, c, size
    )


def test_no_multiplication_depends_on_the_number_of_classes():
    "Rows are added up by class; only soft targets need a product"

    def flops(n, soft=False):
        A, y = batch(n)
        A.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            GiniKLLoss(n_classes=n)(A, F.one_hot(y, n).float() if soft else y).backward()
        return counter.get_total_flops()

    assert flops(10) == flops(1000) == flops(10**6) == 0 < flops(10, soft=True)


@pytest.mark.parametrize('n', [20, 299, 300, 301])
@pytest.mark.parametrize('ignored', [False, True])
def test_rows_added_equal_the_product(n, ignored):
    "For about as many classes as images, and fewer, sums of rows by class agree with the plain form"
    torch.manual_seed(0)
    A, y = torch.randn(300, 12, 2, 2, dtype=torch.float64), torch.randint(0, n, (300,))
    y[-1] = n - 1 if n <= 300 else y[-1]
    kept = torch.rand(300) < (0.7 if ignored else 2)
    kept[-1] = True
    x = A.clone().requires_grad_()
    got, expected = GiniKLLoss().terms(x, torch.where(kept, y, -100)), plain_terms(x[kept], y[kept], n)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-13)
        torch.testing.assert_close(
            torch.autograd.grad(g, x, retain_graph=True)[0],
            torch.autograd.grad(e, x, retain_graph=True)[0],
            rtol=0,
            atol=1e-14,
        )


# ---- Closed forms ----


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rectify', ['abs', 'relu'])
@pytest.mark.parametrize(
    'shape, dims', [((3, 4, 5, 2), [2, 3]), ((3, 5, 2, 4), [1, 2]), ((3, 4), []), ((0, 4, 3), [2]), ((3, 7, 4), [1])]
)
def test_mean_of_rectified_maps(dtype, rectify, shape, dims):
    "Value, gradient and its dtype, with activations of zero and a gradient that is too large for float16"
    torch.manual_seed(0)
    A = torch.randn(shape).to(dtype)
    A[torch.rand(shape) < 0.3] = 0
    wide = torch.promote_types(dtype, torch.float32)
    x, judge = A.clone().requires_grad_(), A.to(wide).requires_grad_()
    M = mean_rectified(x, rectify, dims)
    R = judge.abs() if rectify == 'abs' else judge.relu()
    expected = R.mean(dims) if dims else R
    grad = torch.randn(M.shape, dtype=wide) * 1e6
    torch.testing.assert_close(M, expected)
    got, g = torch.autograd.grad(M, x, grad)[0], torch.autograd.grad(expected, judge, grad)[0].to(dtype)
    assert got.dtype == dtype and got.isnan().sum() == 0 and (got[A == 0] == 0).all()
    torch.testing.assert_close(got, g)


def test_second_derivative_of_a_pipeline():
    "A gradient penalty agrees with the plain form, also for the parameters of a network"
    torch.manual_seed(0)
    net, x, y = (
        torch.nn.Conv2d(2, 5, 3, padding=1).double(),
        torch.randn(40, 2, 4, 4, dtype=torch.float64),
        torch.randint(0, 6, (40,)),
    )

    def penalty(terms):
        A = net(x)
        (g,) = torch.autograd.grad(sum(terms(A)), A, create_graph=True)
        return torch.autograd.grad(g.square().sum(), net.weight)[0]

    got, expected = penalty(lambda A: GiniKLLoss().terms(A, y)), penalty(lambda A: plain_terms(A, y, 6))
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_functional_gradient():
    "The loss works with torch.func"
    A, y = batch(10, m=40, c=6, size=2)
    x = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(GiniKLLoss()(x, y), x)
    torch.testing.assert_close(torch.func.grad(lambda A: GiniKLLoss()(A, y))(A), expected)


# ---- Nothing makes the host wait ----

SETTINGS = [
    {},
    dict(n_classes=10),
    dict(n_classes=10**6),
    dict(rectify='relu'),
    dict(rectify='none', n_classes=200),
    dict(reverse_kl=True, channel_dim=-1),
]


@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
@pytest.mark.parametrize('soft', [False, True])
def test_no_shape_or_branch_depends_on_values(kwargs, soft):
    "Fake tensors on a GPU have no values: an operation that needs a value raises an error"
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    with FakeTensorMode():
        try:
            A = torch.empty(64, 32, 4, 4, device='cuda')
            ((A > 0) | ~(A > 1)).all(), A.sum() != 0, ~(A.amin() < 0)  # with torch 2.6 some of these wake the driver
        except (RuntimeError, AssertionError) as e:
            pytest.skip(f"this torch cannot pretend to have a GPU: {str(e).splitlines()[0]}")
        y = (
            torch.empty(64, kwargs.get('n_classes', 20), device='cuda')
            if soft
            else torch.empty(64, dtype=torch.int64, device='cuda')
        )
        if soft and kwargs.get('n_classes', 0) > 10**4:
            kwargs = {}
            y = y[:, :20]
        terms = GiniKLLoss(**kwargs).measure(A, y)
        assert [t.shape for t in terms[:3]] == [(), (), (4 if 'channel_dim' in kwargs else 32,)]
        assert all(t.device.type == 'cuda' for t in terms)
        if not soft:
            assert len(terms.mass) == min(64, kwargs.get('n_classes', 64))  # columns: images or classes
        if not soft:
            mixed = GiniKLLoss(**kwargs).measure(A, MixedTargets(y, y.flip(0), torch.empty(64, device='cuda')))
            assert [(t.shape, t.device.type) for t in mixed[:3]] == [(t.shape, "cuda") for t in terms[:3]]
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            torch.unique(y)
        with pytest.raises(DataDependentOutputException):
            bool((A > 0).all())


@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
def test_traced_graphs_are_static(kwargs):
    "The forward and backward graphs of a compiler have static shapes, and the host reads no value"
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    A, y = batch(10, m=200)
    x = A.abs().requires_grad_()
    loss = torch.compile(
        GiniKLLoss(**kwargs), fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )(x, y)
    loss.backward()
    torch.testing.assert_close(
        x.grad, torch.autograd.grad(GiniKLLoss(**kwargs)(z := A.abs().requires_grad_(), y), z)[0], rtol=1e-4, atol=1e-8
    )
    assert len(graphs) == 2
    for graph in graphs:
        nodes = [n for n in graph.graph.nodes if n.op == 'call_function']
        names = {str(n.target) for n in nodes}
        assert nodes and not any(
            bad in name
            for name in names
            for bad in ('local_scalar', 'aten.item', 'nonzero', 'unique', 'masked_select', 'sym_')
        )
        assert all(
            isinstance(s, int)
            for n in nodes
            for t in [n.meta.get('val')]
            if isinstance(t, torch.Tensor)
            for s in t.shape
        )


@cuda
@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
@pytest.mark.parametrize('soft', [False, True])
def test_no_synchronisation_on_a_gpu(kwargs, soft):
    A, y = (t.cuda() for t in batch(10))
    if soft:
        y = F.one_hot(y, 10).float()
        kwargs = {**kwargs, 'n_classes': 10}
    loss, x = GiniKLLoss(**kwargs), A.abs().requires_grad_()
    loss(x, y).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        loss(x, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@cuda
@pytest.mark.parametrize('kwargs', SETTINGS, ids=str)
def test_cuda_graph(kwargs):
    "Captured once, replayed on other values: what a fresh call gives"
    A, y = (t.cuda() for t in batch(10))
    A = A.abs()
    x, labels, loss = A.clone().requires_grad_(), y.clone(), GiniKLLoss(**kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(x, labels), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(x, labels)
        (gradient,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        x.copy_(A.flip(0) * 2)
        labels.copy_(y.roll(3))
    graph.replay()
    torch.cuda.synchronize()
    z = (A.flip(0) * 2).requires_grad_()
    expected = loss(z, y.roll(3))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


@cuda
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('rectify', ['abs', 'relu'])
def test_a_gpu_gives_what_the_cpu_gives(dtype, rectify):
    A, y = batch(200)
    A = A.to(dtype)
    x, z, loss = A.cuda().requires_grad_(), A.clone().requires_grad_(), GiniKLLoss(rectify=rectify)
    for got, expected in zip(loss.terms(x, y.cuda()), loss.terms(z, y)):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(got, x, retain_graph=True)[0].cpu(),
            torch.autograd.grad(expected, z, retain_graph=True)[0],
            rtol=1e-2,
            atol=1e-7,
        )


# ---- Inference, and importing ----


def test_inference_is_the_same_program():
    "A network that was trained with a tap exports to the very graph of one that was not"

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)
        )

    tapped, never = network(), network()
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6,))
    with FeatureTap(tapped, '1') as tap:
        logits = tapped(x)
        (F.cross_entropy(logits, y) + GiniKLLoss()(tap.pop(), y)).backward()
    tapped.zero_grad()

    def program(net):
        return str(torch.export.export(net.eval(), (x,)).graph_module.code)

    assert program(tapped) == program(never) and torch.equal(tapped(x), never(x))


def test_importing_needs_torch_alone():
    heavy = (
        'fastai',
        'fastcore',
        'torchvision',
        'pandas',
        'matplotlib',
        'seaborn',
        'scipy',
        'statsmodels',
        'PIL',
        'sklearn',
        'timm',
    )
    code = f"import sys, gini_loss; print(sorted(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '[]'
