"""A step on 2 and 3 processes equals the same step on one: gloo on the CPU."""

import os, socket, sys, time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy

from gini_loss.losses import GiniKLLoss, gini_loss
from gini_loss.ranks import Ranks
from gini_loss.targets import MixedTargets, label_matrix
from gini_loss.running import RunningGiniKLLoss
from gini_loss.tap import FeatureTap

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo backend"
)
TIMEOUT = 600  # seconds until processes that hang are ended; a run takes less than a tenth of that

# ---- Scenarios: how a batch is made and split, and how the loss is set up ----


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).to(dtype)


def make_batch(step, kind, dtype=torch.float64):
    "A batch of 24 with its targets for the auxiliary loss, and labels for cross-entropy"
    g = torch.Generator().manual_seed(100 + step)
    x, labels = torch.randn(24, 6, generator=g).to(dtype), torch.randint(0, 5, (24,), generator=g)
    if kind == 'soft':
        return x, (torch.randn(24, 5, generator=g) * 3).softmax(1).to(dtype), labels
    if kind == 'multihot':
        return x, (torch.rand(24, 5, generator=g) < 0.4).to(dtype), labels
    if kind == 'ignored':
        return x, torch.where(torch.rand(24, generator=g) < 0.4, -100, labels), labels
    if kind == 'all ignored':
        return x, torch.full_like(labels, -100), labels
    if kind == 'sorted':
        labels = labels.sort().values  # most classes on one process only
    if kind == 'far apart':
        return x, labels * 99_991 + 17, labels
    if kind in ('mixed', 'mixed far apart'):
        other, lam = torch.randint(0, 5, (24,), generator=g), torch.rand(24, generator=g, dtype=torch.float64)
        return (
            x,
            torch.stack(
                [*(t * (99_991 if 'far' in kind else 1) for t in (labels.sort().values.double(), other.double())), lam],
                1,
            ),
            labels,
        )
    return x, labels, labels


SPLITS = {
    'even': lambda world: [24 // world] * world,
    'uneven': lambda world: [24 - 5 * (world - 1)] + [5] * (world - 1),
    'one image': lambda world: [1] * (world - 1) + [25 - world],
    'one empty': lambda world: [0] + [24 // (world - 1)] * (world - 1),
}

SCENARIOS = {  # name: (split, targets, keyword arguments of the loss)
    'even': ('even', 'hard', dict(n_classes=5)),
    'uneven': ('uneven', 'hard', dict(n_classes=5)),
    'n_classes not given': ('uneven', 'hard', {}),
    'a class on one process only': ('uneven', 'sorted', {}),
    'a class on one process only, n_classes given': ('even', 'sorted', dict(n_classes=5)),
    'more classes than columns': ('uneven', 'far apart', dict(n_classes=500_000)),
    'far apart, n_classes not given': ('one image', 'far apart', {}),
    'reversed': ('uneven', 'sorted', dict(reverse_kl=True)),
    'soft': ('uneven', 'soft', {}),
    'multi-hot': ('uneven', 'multihot', dict(n_classes=5)),
    'ignored': ('uneven', 'ignored', {}),
    'ignored, n_classes given': ('uneven', 'ignored', dict(n_classes=5)),
    'all ignored': ('uneven', 'all ignored', {}),
    'one process without images': ('one empty', 'hard', {}),
    'one process without images, n_classes given': ('one empty', 'sorted', dict(n_classes=5)),
    'one process without images, soft': ('one empty', 'soft', {}),
    'mixed': ('uneven', 'mixed', {}),
    'mixed, n_classes given': ('even', 'mixed', dict(n_classes=5)),
    'mixed, more classes than columns': ('one empty', 'mixed far apart', dict(n_classes=500_000)),
    'float32': ('uneven', 'sorted', {}),
    'prior': ('uneven', 'sorted', dict(class_prior=[0.3, 0.25, 0.2, 0.15, 0.1])),
    'prior, soft': ('one empty', 'soft', dict(class_prior=[0.3, 0.25, 0.2, 0.15, 0.1])),
    'prior, more classes than columns': ('uneven', 'far apart', dict(class_prior=torch.arange(1.0, 500_001))),
}


def dtype_of(scenario):
    return torch.float32 if scenario == 'float32' else torch.float64  # float64 distinguishes errors from rounding


STEPS = 4


def train(model, net, scenario, rank=0, world=1, distributed=True):
    """Some steps of SGD. Returns the final weights, the gradients of the first step and the terms of each step.
    Cross-entropy is divided by the size of the whole batch, so parts of different sizes add up"""
    split, kind, kwargs = SCENARIOS[scenario]
    sizes = SPLITS[split](world) if world > 1 else [24]
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    aux, terms = GiniKLLoss(1.0, 0.7, distributed=distributed, **kwargs), []
    with FeatureTap(model, '3') as tap:
        for step in range(STEPS):
            x, y, labels = (t[part] for t in make_batch(step, kind, dtype_of(scenario)))
            if kind.startswith('mixed'):
                y = MixedTargets(y[:, 0].long(), y[:, 1].long(), y[:, 2])
            loss = cross_entropy(model(x), labels, reduction='sum') * world / 24
            A = tap.pop()
            terms.append(torch.stack(aux.terms(A.detach(), y)))
            net.zero_grad()
            (loss + aux(A, y)).backward()
            if step == 0:
                first = [p.grad.clone() for p in net.parameters()]
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad  # torch.optim would cost each process seconds of imports
    return dict(weights=[p.detach().clone() for p in net.parameters()], gradients=first, terms=torch.stack(terms))


def direct_gradient(rank, world, order=1):
    """First and second derivative, with respect to the activations and in float64, of the sum of the losses of all
    processes"""
    g = torch.Generator().manual_seed(7)
    A, y = torch.rand(12, 4, 3, generator=g, dtype=torch.float64) + 0.1, torch.randint(0, 4, (12,), generator=g)
    part = slice(12 * rank // world, 12 * (rank + 1) // world)
    A = A[part].clone().requires_grad_()
    (d,) = torch.autograd.grad(GiniKLLoss(1, 0.7)(A, y[part]) / world, A, create_graph=True)
    s = d.square().sum()
    return dict(first=d.detach(), second=torch.autograd.grad(s, A)[0])


def accumulate(model, rank, world):
    "Two micro-batches, the first without synchronisation: the gradient is that of the sum of their losses"
    aux = GiniKLLoss(1, 0.7)
    model.zero_grad()
    with FeatureTap(model, '3') as tap:
        for step in range(2):
            x, y, _ = (t[rank::world] for t in make_batch(step, 'hard'))
            with model.no_sync() if step == 0 and world > 1 else nullcontext():
                (cross_entropy(model(x), y, reduction='sum') * world / 24 + aux(tap.pop(), y)).backward()
    return [p.grad.clone() for p in model.parameters()]


def sync_batchnorm(rank, world):
    "SyncBatchNorm replaces modules: a tap made afterwards works, one made before raises an error that says so"
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double().eval()
    )  # the CPU has SyncBatchNorm in evaluation only
    early, message = FeatureTap(net, '1').attach(), None
    if world > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    x, y, _ = (t[rank::world] for t in make_batch(0, 'hard'))
    with FeatureTap(net, '1') as tap:
        assert isinstance(tap.module, nn.SyncBatchNorm) == (world > 1)
        net(x)
        GiniKLLoss()(tap.pop(), y).backward()
    try:
        early.pop()
    except RuntimeError as e:
        message = str(e)
    gradients = [p.grad for p in net[:2].parameters()]
    if world > 1:
        for g in gradients:
            dist.all_reduce(g)  # DistributedDataParallel takes no SyncBatchNorm on the CPU: its mean by hand
    return message, [g / world for g in gradients]


def fully_sharded(rank, world):
    """FSDP2 shards the parameters and gathers them for each layer. Returns gradients as whole tensors, the terms, and
    the result of a tap made before sharding; or the reason if this torch cannot do it"""
    try:
        return sharded(rank, world)
    except Exception as e:  # all processes fail in the same way, before any of them waits
        if world == 1 or torch.__version__ >= (2, 7):
            raise
        reason = str(e).splitlines()[0] if str(e) else ''
        return f"torch {torch.__version__} has no FSDP2 for the CPU: {type(e).__name__}: {reason}"


def sharded(rank, world):
    net = make_model()
    x, y, labels = (t[rank::world] for t in make_batch(0, 'sorted'))
    early = FeatureTap(net, '3').attach()
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh('cpu', (world,))
        for i in (0, 2, 4):
            fully_shard(net[i], mesh=mesh)
        fully_shard(net, mesh=mesh)
    aux = GiniKLLoss(1, 0.7)
    with FeatureTap(net, '3') as tap:
        loss = cross_entropy(net(x), labels, reduction='sum') * world / 24
        A = tap.pop()
        terms = torch.stack(aux.terms(A.detach(), y))
        same = torch.equal(early.pop(), A)
        (loss + aux(A, y)).backward()
    early.detach()
    return dict(
        terms=terms, same=same, gradients=[p.grad.full_tensor() if world > 1 else p.grad for p in net.parameters()]
    )


def running(rank, world):
    "Class averages over several batches: terms, gradient and state after three uneven steps"
    loss, terms = RunningGiniKLLoss(1, 0.7, n_classes=5, n_batches=3), []
    g = torch.Generator().manual_seed(5)
    for step in range(3):
        A, y = (
            torch.rand(13, 4, generator=g, dtype=torch.float64),
            torch.randint(0, 5, (13,), generator=g).sort().values,
        )
        part = slice(13 * rank // world, 13 * (rank + 1) // world)
        A = A[part].clone().requires_grad_()
        terms.append(torch.stack(loss.terms(A, y[part])))
    return dict(
        terms=torch.stack(terms).detach(),
        gradient=torch.autograd.grad(terms[-1].sum() / world, A)[0],
        means=loss.means,
        mass=loss.mass,
    )


def bad_label(rank, world):
    "If all processes have the same wrong label, each raises an error, and none waits"
    try:
        GiniKLLoss(n_classes=3)(torch.rand(4, 2), torch.tensor([0, 1, 2, 3]))
    except ValueError as e:
        return str(e)


def compiled(rank, world, n_classes):
    "Terms of compiled losses: as one graph, or the reason why not, and with graph breaks"
    _, y, _ = (t[rank::world] for t in make_batch(0, 'sorted'))
    A, out = torch.rand(24, 7, generator=torch.Generator().manual_seed(3))[rank::world], {}
    for fullgraph in (True, False):
        torch._dynamo.reset()
        try:
            out[fullgraph] = torch.stack(
                torch.compile(GiniKLLoss(n_classes=n_classes).terms, fullgraph=fullgraph, backend='eager')(A, y)
            )
        except Exception as e:
            out[fullgraph] = type(e).__name__
    return out


def run_all(rank, world):
    out = {}
    for scenario in SCENARIOS:
        net = make_model(dtype_of(scenario))
        out[scenario] = train(nn.parallel.DistributedDataParallel(net), net, scenario, rank, world)
    net = make_model()
    out['not distributed'] = train(
        nn.parallel.DistributedDataParallel(net), net, 'a class on one process only', rank, world, distributed=False
    )
    out['direct'] = direct_gradient(rank, world)
    out['accumulate'] = accumulate(nn.parallel.DistributedDataParallel(make_model()), rank, world)
    out['sync_batchnorm'] = sync_batchnorm(rank, world)
    out['bad label'] = bad_label(rank, world)
    out['running'] = running(rank, world)
    out['compiled'] = {n: compiled(rank, world, n) for n in (5, None, 10**6)}
    out['fully sharded'] = fully_sharded(rank, world)
    out['function'] = gini_loss(
        torch.rand(4, 2, generator=torch.Generator().manual_seed(rank)), torch.tensor([0, 1, 0, 1])
    )
    return out


def work(rank, folder):
    "First a group of 3, then a group of 2 of these processes"
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group('gloo', init_method=f'file://{folder}/init{world}', rank=rank, world_size=world)
            torch.save(run_all(rank, world), f'{folder}/{world}-{rank}.pt')
            dist.barrier()
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads can abort the interpreter while it shuts down


@pytest.fixture(scope='module')
def interface():
    "The loopback interface, which needs no network that resolves this machine's name"
    return next((name for _, name in socket.if_nameindex() if name in ('lo', 'lo0')), None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, interface):
    "Folder with the results of three processes"
    folder = tmp_path_factory.mktemp('ranks')
    with pytest.MonkeyPatch.context() as env:
        if interface:
            env.setenv('GLOO_SOCKET_IFNAME', interface)
        env.setenv('OMP_NUM_THREADS', '1')
        context, end = mp.spawn(work, (str(folder),), nprocs=3, join=False), time.monotonic() + TIMEOUT
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    pytest.fail(f"the processes did not end in {TIMEOUT} s: one of them waits for another")
        finally:
            for p in context.processes:
                if p.is_alive():
                    p.kill()
    return folder


@pytest.fixture(scope='module', params=[2, 3], ids=lambda n: f'{n} processes')
def ranks(request, folder):
    "Results of the processes of a group of 2 or 3, in the order of their ranks"
    return [torch.load(folder / f'{request.param}-{rank}.pt', weights_only=False) for rank in range(request.param)]


def close(got, expected, atol=1e-10):
    assert len(got) == len(expected)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e, rtol=0, atol=atol)


@pytest.mark.parametrize('scenario', SCENARIOS)
def test_training_equals_one_process(ranks, scenario):
    """On every process, the terms of each step, the first gradients and the final weights are those of one process, to
    1e-6 in float32 and 1e-10 in float64"""
    net = make_model(dtype_of(scenario))
    atol = 1e-6 if scenario == 'float32' else 1e-10
    expected = train(net, net, scenario)
    assert expected['terms'].abs().max() > 0.01 or scenario == 'all ignored'
    for r in ranks:
        for what in ('weights', 'gradients'):
            close(r[scenario][what], expected[what], atol)
        close(r[scenario]['terms'], expected['terms'], atol)


def test_without_the_sums_over_processes_it_would_not(ranks):
    "The comparison above can fail: with distributed=False each process has its own terms"
    net = make_model()
    expected = train(net, net, 'a class on one process only')
    assert any((g - e).abs().max() > 1e-3 for g, e in zip(ranks[0]['not distributed']['weights'], expected['weights']))
    assert (ranks[0]['not distributed']['terms'] - ranks[1]['not distributed']['terms']).abs().max() > 1e-3


def test_gradient_of_the_activations_and_its_derivative(ranks):
    "In float64. Each process has the loss of the whole batch, so the gradient is that of their mean"
    expected = direct_gradient(0, 1)
    close([torch.cat([r['direct']['first'] for r in ranks])], [expected['first']], 1e-12)
    close([torch.cat([r['direct']['second'] for r in ranks])], [expected['second']], 1e-12)


def test_gradient_accumulation(ranks):
    expected = accumulate(make_model(), 0, 1)
    for r in ranks:
        close(r['accumulate'], expected)


def test_sync_batchnorm_before_the_tap(ranks):
    _, expected = sync_batchnorm(0, 1)
    assert max(g.abs().max() for g in expected) > 1e-3
    for r in ranks:
        message, gradients = r['sync_batchnorm']
        assert "layer '1' did not run" in message
        close(gradients, expected)


def test_fully_sharded(ranks):
    """FSDP2 on the CPU gives the gradients and terms of one process, if each process has its own classes. A tap made
    before sharding works too"""
    expected = fully_sharded(0, 1)
    if isinstance(why := ranks[0]['fully sharded'], str):
        pytest.skip(why)
    for r in ranks:
        close(r['fully sharded']['gradients'], expected['gradients'])
        close([r['fully sharded']['terms']], [expected['terms']])
        assert r['fully sharded']['same']


def test_running_averages(ranks):
    expected = running(0, 1)
    close([torch.cat([r['running']['gradient'] for r in ranks])], [expected['gradient']])
    for r in ranks:
        close([r['running'][k] for k in ('terms', 'means', 'mass')], [expected[k] for k in ('terms', 'means', 'mass')])


def test_one_graph_needs_n_classes(ranks):
    """Up to 4,096 classes no labels are gathered, and the compiled loss is one graph. With more, or without n_classes,
    the host waits for the sizes of the batches, which breaks the graph"""
    _, y, _ = make_batch(0, 'sorted')
    world = len(ranks)
    order = torch.cat([torch.arange(24)[r::world] for r in range(world)])
    expected = torch.stack(
        GiniKLLoss().terms(torch.rand(24, 7, generator=torch.Generator().manual_seed(3))[order], y[order])
    )
    for r in ranks:
        torch.testing.assert_close(r['compiled'][5][True], expected, rtol=1e-5, atol=1e-6)
        for n in (5, None, 10**6):
            torch.testing.assert_close(r['compiled'][n][False], expected, rtol=1e-5, atol=1e-6)
        for n in (None, 10**6):
            assert isinstance(r['compiled'][n][True], str)


def test_labels_are_asked_for_only_where_they_must_be(monkeypatch):
    "With n_classes of at most 4,096, no collective runs for the labels"

    def waits(*args):
        raise AssertionError("all_gather")

    monkeypatch.setattr(dist, 'all_gather', waits)
    ranks, y = Ranks(), torch.tensor([0, 3])
    monkeypatch.setattr(ranks, 'several', True)
    monkeypatch.setattr(ranks, 'sum', lambda x: x)
    for n in (4, 4096):
        assert label_matrix(y, n_classes=n, renumber=True, ranks=ranks).n == n
    for n in (None, 4097):
        with pytest.raises(AssertionError, match="all_gather"):
            label_matrix(y, n_classes=n, renumber=True, ranks=ranks)


def test_a_bad_label_is_told_and_nobody_waits(ranks):
    assert all("label 3 is not below n_classes=3" in r['bad label'] for r in ranks)


def test_a_tensor_of_several_devices(monkeypatch, interface):
    "Activations of a layer in tensor parallelism: the message names the call, and it works"
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    A, y = torch.rand(6, 4), torch.arange(6) % 3
    if interface:
        monkeypatch.setenv('GLOO_SOCKET_IFNAME', interface)
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh('cpu', (1,))
        sharded = distribute_tensor(A, mesh, [Shard(1)])
        for args in ((sharded, y), (A, distribute_tensor(y, mesh, [Replicate()]))):
            with pytest.raises(TypeError, match=r"must be a dense tensor, got a DTensor: call \.full_tensor\(\)"):
                GiniKLLoss()(*args)
        assert torch.equal(GiniKLLoss()(sharded.full_tensor(), y), GiniKLLoss()(A, y))
    finally:
        dist.destroy_process_group()


def test_the_plain_function_is_of_one_process(ranks):
    "gini_loss and kl_loss use only the batch of this process; GiniKLLoss sums over the processes"
    for rank, r in enumerate(ranks):
        assert torch.equal(
            r['function'],
            gini_loss(torch.rand(4, 2, generator=torch.Generator().manual_seed(rank)), torch.tensor([0, 1, 0, 1])),
        )
