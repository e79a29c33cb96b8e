"A tap with compilation, data parallelism, tuples and dicts, in-place changes, errors, copies and checkpointing"

import copy, gc, io, pickle, threading, weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gini_loss.losses import GiniKLLoss
from gini_loss.tap import FeatureTap, find_channel_dim, find_layer, last_stage
from tiny import hooks


pytestmark = pytest.mark.usefixtures('fresh_compiler')


def make_net(inplace=False):
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace), nn.Linear(8, 6), nn.ReLU(inplace), nn.Linear(6, 4))


X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4


class Tokens(nn.Module):
    "A layer that returns a tuple, a dict or a list, as `kind` says"

    def __init__(self, kind):
        super().__init__()
        self.kind, self.lin = kind, nn.Linear(3, 6)

    def forward(self, x):
        h = self.lin(x)
        return {'tuple': (h, h.sum()), 'dict': {'hidden': h, 'aux': 1}, 'list': [h]}[self.kind]


class Head(nn.Module):
    def __init__(self, kind, inplace=False):
        super().__init__()
        self.body, self.head, self.inplace = Tokens(kind), nn.Linear(6, 4), inplace

    def forward(self, x):
        h = self.body(x)
        h = h['hidden'] if isinstance(h, dict) else h[0]
        return self.head(h.relu_() if self.inplace else h.relu())


def expected_gradients(net, layers=4):
    "The gradients of a step without a tap, with the network cut in two by hand"
    net = copy.deepcopy(net)
    A = net[:layers](X)
    loss = cross_entropy(net[layers:](A), Y) + GiniKLLoss()(A, Y)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


def check_step(model, net, tap, forward=None, layers=4):
    "A step through the tap has the loss and the gradients of the step by hand"
    net.zero_grad()
    loss = cross_entropy((forward or model)(X), Y)
    loss = loss + GiniKLLoss()(tap.pop(), Y)
    loss.backward()
    expected, gradients = expected_gradients(net, layers)
    torch.testing.assert_close(loss.detach(), expected)
    for p, g in zip(net.parameters(), gradients):
        torch.testing.assert_close(p.grad, g)


# ---- Compilation ----


@pytest.mark.parametrize('name', ['3', '_orig_mod.3', None])
def test_tap_before_the_first_call_of_a_compiled_model(name):
    net = make_net()
    model = torch.compile(net, backend='aot_eager', fullgraph=True)
    with FeatureTap(model, name) as tap:
        assert tap.name == '3'
        for _ in range(3):
            check_step(model, net, tap)
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
        tap.clear()
        check_step(model, net, tap)
    assert hooks(net) == 0


def test_a_compiled_step_is_compiled_once():
    "The tap does not cause a new graph in each step"
    net, compiled = make_net(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = torch.compile(net, backend=backend)
    with FeatureTap(model, '3') as tap:
        for _ in range(10):
            model(X).sum().backward()
            tap.pop()
    assert len(compiled) == 1


def test_a_tap_that_comes_too_late_for_a_compiled_model_says_so():
    "Compiled code ignores hooks that are added later; a step without activations must raise an error"
    net = make_net()
    model = torch.compile(net, backend='aot_eager')
    model(X)
    with FeatureTap(model, '3') as tap:
        model(X)
        try:
            A = tap.pop()
        except RuntimeError as e:
            assert "did not run" in str(e) and "attach the tap before its first call" in str(e)
        else:
            torch.testing.assert_close(A, net[:4](X))  # a torch that does see it must see it right
        torch._dynamo.reset()
        check_step(model, net, tap)  # compiled afresh, it works


def test_a_model_of_the_same_classes_compiled_before_without_a_tap():
    """After a baseline, torch may run the second model with the code of the first, which has no hook. Then the error of
    the tap says what to do, and that works"""
    torch.compile(make_net(), backend='aot_eager')(X)
    net = make_net()
    model = torch.compile(net, backend='aot_eager')
    with FeatureTap(model, '3') as tap:
        model(X)
        try:
            A = tap.pop()
        except RuntimeError as e:
            assert "torch._dynamo.reset()" in str(e)
        else:
            torch.testing.assert_close(A, net[:4](X))
        torch._dynamo.reset()
        check_step(model, net, tap)


def test_in_place_work_behind_a_layer_of_a_compiled_model():
    "In a graph the tap returns the output of the layer as it was before later in-place changes"
    net = make_net(inplace=True)
    model = torch.compile(net, backend='aot_eager')
    with FeatureTap(model, '2') as tap:
        model(X)
        A = tap.pop()
    torch.testing.assert_close(A, net[2](net[1](net[0](X))))
    assert (A < 0).any()
    with FeatureTap(torch.compile(net, backend='aot_eager'), '3') as tap:
        check_step(lambda x: torch.compile(net, backend='aot_eager')(x), net, tap)


def test_compiled_part_of_a_model():
    net = make_net()
    net[2] = torch.compile(nn.Sequential(nn.Linear(8, 6), nn.Tanh()), backend='aot_eager')
    expected = net[:3](X)
    for layer in ('2', net[2]):
        with FeatureTap(net, layer) as tap:
            net(X)
            torch.testing.assert_close(tap.pop(), expected)
    assert hooks(net) == 0
    assert find_layer(net, '2.1')[1] is net[2]._orig_mod[1] and find_layer(net, '2._orig_mod.1')[0] == '2.1'


def test_compiled_layer_with_a_tuple():
    model = torch.compile(Head('tuple', inplace=True), backend='aot_eager')
    with FeatureTap(model, 'body', select=lambda out: out[0]) as tap:
        model(X)
        torch.testing.assert_close(tap.pop(), model._orig_mod.body.lin(X))


# ---- Names ----


def test_names_through_wrappers(tmp_path):
    "A name means the same layer in every wrapper, and the wrapper's own name for it works too"
    net = make_net()
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(net)
        wrapped = {
            'ddp': ddp,
            'compiled ddp': torch.compile(ddp),
            'ddp of compiled': nn.parallel.DistributedDataParallel(torch.compile(net)),
            'dp': nn.DataParallel(net),
        }
        for model in wrapped.values():
            for name in ('2', 'module.2'):
                assert find_layer(model, name) == ('2', net[2])
            assert find_layer(model, net[2]) == ('2', net[2]) and find_layer(model)[0] == last_stage(model) == '3'
            with pytest.raises(ValueError, match="no layer 'module.9' in this Sequential"):
                find_layer(model, 'module.9')
        with FeatureTap(ddp, 'module.3') as tap:
            check_step(ddp, net, tap)
        with FeatureTap(ddp, '3') as tap:
            check_step(ddp, net, tap)
    finally:
        torch.distributed.destroy_process_group()
    assert hooks(net) == 0


def test_a_layer_called_module_is_not_taken_for_a_wrapper():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(3, 4)

        def forward(self, x):
            return self.module(x)

    odd = Odd()
    assert find_layer(odd, 'module.0') == ('module.0', odd.module[0]) and find_layer(odd, 'module') == (
        'module',
        odd.module,
    )


@pytest.mark.parametrize(
    'layer,kind,message',
    [
        ('layr3', ValueError, r"no layer 'layr3' in this Net: did you mean 'layer3'"),
        ('', ValueError, "no layer ''"),
        (nn.ReLU(), ValueError, "the given ReLU is not part of this Net"),
        (3, TypeError, "dotted name, a module or None, got int"),
        (['layer3'], TypeError, "got list"),
    ],
)
def test_unknown_layers(layer, kind, message):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer3, self.layer4, self.fc = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    with pytest.raises(kind, match=message):
        FeatureTap(Net(), layer)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        FeatureTap(lambda x: x)
    with pytest.raises(ValueError, match="name one"):
        FeatureTap(nn.Linear(2, 3))


@pytest.mark.parametrize(
    'shape,widths,expected',
    [
        ((4, 6), 6, 1),
        ((4, 6, 5, 5), 6, 1),
        ((4, 5, 5, 6), 6, -1),
        ((4, 17, 6), 6, -1),
        ((4, 6, 17), 6, 1),
        ((4, 5, 5, 7), 6, 1),
        ((4, 5, 7), 6, -1),
    ],
)
def test_channel_dim(shape, widths, expected):
    assert find_channel_dim(nn.Sequential(nn.Identity(), nn.Linear(widths, 2)), torch.rand(shape)) == expected


# ---- Wrappers that answer for the module inside ----


class Forwards(nn.Module):
    "As in Fabric, PEFT and Opacus: attributes that the wrapper does not have are looked up in the module inside"

    def __init__(self, inner, **others):
        super().__init__()
        self._held = inner
        for name, m in others.items():
            setattr(self, name, m)

    def forward(self, *args, **kwargs):
        return self._held(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('_held'), name)


def named_net():
    net = nn.Module()
    net.stem, net.layer4, net.fc = nn.Linear(3, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 4)
    net.tap = 'layer4'
    return net


def checkpoint_wrapped():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = make_net()
    for i in (0, 2):
        net[i] = checkpoint_wrapper(net[i])
    return checkpoint_wrapper(net)


def fabric():
    L = pytest.importorskip('lightning')
    return L.Fabric(accelerator='cpu', devices=1).setup(make_net())


def peft():
    peft = pytest.importorskip('peft')
    return peft.get_peft_model(make_net(), peft.LoraConfig(target_modules=['0', '2'], r=2))


def opacus():
    return pytest.importorskip('opacus').GradSampleModule(make_net())


WRAPPED = dict(
    forwards=lambda: Forwards(make_net()),
    twice=lambda: Forwards(Forwards(make_net())),
    compiled=lambda: torch.compile(Forwards(make_net()), backend='eager'),
    checkpoint=checkpoint_wrapped,
    fabric=fabric,
    peft=peft,
    opacus=opacus,
)


@pytest.mark.parametrize('make', WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_found_and_looked_up_in_one_way(make):
    "The default, a name, the wrapper's own spelling and the module itself mean the same layer, and its output is kept"
    model = make()
    name, module = find_layer(model)
    assert name == last_stage(model) == '3' and find_layer(model, '3') == find_layer(model, module) == ('3', module)
    spelled = [n for n, m in model.named_modules() if m is module]
    assert all(find_layer(model, n) == ('3', module) for n in spelled)
    with FeatureTap(model) as tap:
        logits = model(X)
        A = tap.pop()
    torch.testing.assert_close(dict(model.named_modules())[spelled[0].rsplit('3', 1)[0] + '4'](A), logits)


@pytest.mark.parametrize('make', WRAPPED.values(), ids=WRAPPED)
def test_hints_name_layers_that_exist(make):
    "All names in the hint, and all names of `named_modules`, can be used"
    model = make()
    with pytest.raises(ValueError, match="did you mean") as e:
        find_layer(model, '33')
    for name in str(e.value).split('did you mean ')[1].split('?')[0].split(', '):
        find_layer(model, name.strip("'"))
    for name, m in model.named_modules():
        if name and name.split('.')[-1] in '01234':
            assert find_layer(model, name)[1] in (m, *m.modules(), *model.modules())


def test_a_wrapper_with_parts_of_its_own():
    model = Forwards(named_net(), extra=nn.Linear(2, 2))
    assert find_layer(model)[0] == 'layer4' and find_layer(model, 'extra') == ('extra', model.extra)
    assert find_layer(model, '_held.layer4.1') == ('layer4.1', model.layer4[1])


def test_fsdp(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        net = named_net()
        net.layer4 = FSDP(net.layer4, device_id=torch.device('cpu'), use_orig_params=True)
        model = FSDP(net, device_id=torch.device('cpu'), use_orig_params=True)
        names = {n: m for n, m in model.named_modules()}
        assert find_layer(model)[0] == last_stage(model) == 'layer4'
        assert find_layer(model)[1] is names['_fsdp_wrapped_module.layer4']
        assert all(
            find_layer(model, n)[0] == 'layer4.0'
            for n in ('layer4.0', '_fsdp_wrapped_module.layer4._fsdp_wrapped_module.0')
        )
    finally:
        torch.distributed.destroy_process_group()


def test_every_name_of_a_module_works():
    "A module that is registered twice has two names; the tap keeps the one that was passed"

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.Linear(3, 3)
            self.right = self.left

        def forward(self, x):
            return self.right(x)

    net = Twins()
    for name in ('left', 'right'):
        with FeatureTap(net, name) as tap:
            net(X)
            assert tap.name == name and tap.pop().shape == (8, 3)
    assert find_layer(net, net.right)[0] == 'left'


@pytest.mark.parametrize('holder', [nn.ModuleList, lambda layers: nn.ModuleDict({'0': layers[0], '1': layers[1]})])
def test_a_part_that_only_holds_layers_never_runs(holder):
    net = nn.Module()
    net.blocks = holder([nn.Linear(3, 3), nn.Linear(3, 3)])
    with pytest.raises(
        TypeError, match=r"layer 'blocks' is a Module\w+, which never runs itself: .* such as 'blocks.1'"
    ):
        FeatureTap(net, 'blocks')
    net.blocks.forward = lambda x: x  # it may be given one
    assert find_layer(net, 'blocks')[1] is net.blocks


COMPILED_AWAY = {
    'script': (lambda: torch.jit.script(make_net()), "made by torch.jit.script or torch.jit.trace"),
    'trace': (lambda: torch.jit.trace(make_net(), X), "made by torch.jit.script or torch.jit.trace"),
    'scripted part': (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), torch.jit.script(make_net()))),
        "layer '1.1.3' is in a part made by torch.jit",
    ),
    'exported': (lambda: torch.export.export(make_net(), (X,)), "pass the nn.Module that it was exported from"),
    'module of an exported one': (
        lambda: torch.export.export(make_net(), (X,)).module(),
        "is in a GraphModule, as torch.export and torch.fx make it",
    ),
}


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('kind', COMPILED_AWAY)
def test_models_that_call_no_hooks_are_told_what_they_are(kind):
    make, message = COMPILED_AWAY[kind]
    model = make()
    names = [n for n, _ in model.named_modules() if n] if isinstance(model, nn.Module) else ['3']
    with pytest.raises(TypeError, match=message):
        FeatureTap(model, '1.1.3' if kind == 'scripted part' else '3' if '3' in names else names[0])


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_graphs_that_call_their_layers_and_layers_beside_a_scripted_part():
    for model, layer in (
        (torch.fx.symbolic_trace(make_net()), '3'),
        (nn.Sequential(torch.jit.script(make_net()), nn.Identity()), '1'),
    ):
        with FeatureTap(model, layer) as tap:
            model(X)
            assert tap.pop().ndim == 2
    with pytest.raises(TypeError, match="layer '0' is in a part made by"):
        FeatureTap(model, '0')


# ---- What a layer returns ----


@pytest.mark.parametrize(
    'kind,select', [('tuple', lambda out: out[0]), ('list', lambda out: out[0]), ('dict', lambda out: out['hidden'])]
)
def test_select(kind, select):
    model = Head(kind)
    with FeatureTap(model, 'body', select) as tap:
        loss = cross_entropy(model(X), Y) + GiniKLLoss()(tap.pop(), Y)
        loss.backward()
    got = model.body.lin.weight.grad.clone()
    model.zero_grad()
    h = model.body.lin(X)
    (cross_entropy(model.head(h.relu()), Y) + GiniKLLoss()(h, Y)).backward()
    torch.testing.assert_close(got, model.body.lin.weight.grad)
    with FeatureTap(model, 'body') as tap:
        model(X)
        with pytest.raises(TypeError, match=f"layer 'body' returned a {kind}, not a tensor: pass select"):
            tap.pop()


def test_select_that_fails_leaves_the_tap_empty():
    model = Head('tuple')
    with FeatureTap(model, 'body', select=lambda out: out['hidden']) as tap:
        model(X)
        with pytest.raises(TypeError):
            tap.pop()
        with pytest.raises(RuntimeError, match="did not run"):
            tap.pop()


def test_select_may_reshape():
    vit = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4))
    x = torch.randn(2, 5, 3)
    with FeatureTap(vit, '0', select=lambda A: A[:, 1:]) as tap:  # without the class token
        vit(x)
        assert tap.pop().shape == (2, 4, 6)


@dataclass
class Record:
    size: int
    hidden: object


class Plain:
    def __init__(self, h):
        self.size, self.hidden = 1, h


RETURNS = {
    'dict': lambda h: {'n': 1, 'hidden': h},
    'OrderedDict': lambda h: OrderedDict(n=1, out=h),
    'tuple': lambda h: (1, h),
    'nested': lambda h: {'a': {'b': [h]}},
    'Record': lambda h: Record(1, h),
    'Plain': Plain,
    'object in a dict': lambda h: {'out': Plain(h)},
}


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.make = RETURNS[kind]

    def forward(self, x):
        return self.make(x * 1)


@pytest.mark.parametrize('kind', RETURNS)
def test_the_hint_of_a_layer_that_returns_no_tensor_works(kind):
    net = nn.Sequential(Returns(kind))
    with FeatureTap(net, '0') as tap:
        net(X)
        with pytest.raises(TypeError, match="not a tensor: pass select, such as select=") as e:
            tap.pop()
    with FeatureTap(net, '0', select=eval(str(e.value).split('select=')[1])) as tap:
        net(X)
        assert torch.equal(tap.pop(), X)


def test_an_output_without_a_tensor_and_a_select_that_finds_none():
    class Nothing(nn.Module):
        def forward(self, x):
            return 'nothing'

    net = nn.Sequential(Nothing())
    with FeatureTap(net, '0') as tap:
        net(X)
        with pytest.raises(TypeError, match="layer '0' returned a str, not a tensor: pass select$"):
            tap.pop()
    with FeatureTap(make_net(), '3', select=lambda A: None) as tap:
        tap.module(X)
        with pytest.raises(TypeError, match="select returned a NoneType for layer '3'"):
            tap.pop()


@pytest.mark.parametrize('kind', ['Record', 'Plain', 'object in a dict'])
def test_in_place_work_behind_an_object(kind):
    "In-place changes of the tensor that `select` returned are detected in any kind of object"
    pick = dict(Record=lambda o: o.hidden, Plain=lambda o: o.hidden).get(kind, lambda o: o['out'].hidden)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Returns(kind)

        def forward(self, x):
            return pick(self.body(x)).relu_()

    net = Net()
    for select in (pick, lambda o: pick(o)[:, 1:]):
        with FeatureTap(net, 'body', select) as tap:
            net(X)
            with pytest.raises(RuntimeError, match="changed in place"):
                tap.pop()
    with FeatureTap(net, 'body', lambda o: pick(o).float().clone()) as tap:
        net(X)
        assert torch.equal(tap.pop(), X)  # of what the layer returned


def test_select_sees_what_the_layer_returned():
    "The tap keeps what `select` returned, even if the object changes later"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Returns('Plain')

        def forward(self, x):
            out = self.body(x)
            out.hidden = out.hidden + 1
            return out.hidden

    net = Net()
    with FeatureTap(net, 'body', lambda o: o.hidden) as tap:
        net(X)
        assert torch.equal(tap.pop(), X)


# ---- Steps that must not pass silently ----


@pytest.mark.parametrize('kind', ['tuple', 'list', 'dict'])
def test_in_place_work_on_part_of_an_output(kind):
    model = Head(kind, inplace=True)
    with FeatureTap(model, 'body', select=lambda out: out['hidden'] if isinstance(out, dict) else out[0]) as tap:
        model(X)
        with pytest.raises(RuntimeError, match="changed in place"):
            tap.pop()


def test_in_place_work_on_a_view():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.body(x)
            h[:, 0] = 0
            return self.head(h)

    model = Shifted()
    with FeatureTap(model, 'body') as tap:
        model(X)
        with pytest.raises(RuntimeError, match="the output of layer 'body' was changed in place"):
            tap.pop()


def test_runs_twice_or_not_at_all():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        net(X)
        net(X)
        with pytest.raises(RuntimeError, match="ran 2 times"):
            tap.pop()
        with pytest.raises(RuntimeError, match="did not run"):
            tap.pop()  # emptied by the error, too
        net(X)
        tap.pop()
        net(X)
        tap.clear()
        check_step(net, net, tap)  # and right again
        net[:2](X)
        with pytest.raises(RuntimeError, match="did not run"):
            tap.pop()
        with torch.no_grad():
            net(X)
        with pytest.raises(RuntimeError, match="without gradients"):
            tap.pop()
        with torch.no_grad():
            net(X)
            assert not tap.pop().requires_grad  # who looks only, may
        with torch.inference_mode():
            net(X)
            assert tap.pop().is_inference()


def test_evaluation_between_forward_and_loss():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        logits = net(X)
        with torch.no_grad():
            net(2 * X)
        with torch.inference_mode():
            net(3 * X)
        check_step(net, net, tap, forward=lambda x: logits)


def test_two_taps_and_two_layers():
    net = make_net()
    with FeatureTap(net, '1') as a, FeatureTap(net, '3') as b, FeatureTap(net, '3') as c:
        net(X)
        assert a.pop().shape == (8, 8) and torch.equal(b.pop(), c.pop())
    assert hooks(net) == 0


# ---- Threads ----


def test_a_tap_that_threads_share_never_returns_the_others_activations():
    "A thread gets its own activations or an error. The thread that attached the tap gets them"
    net, got = make_net(), {1: [], 2: []}
    inputs = {k: torch.full((4, 3), float(k)) for k in (1, 2)}
    expected = {k: net[:4](x).detach() for k, x in inputs.items()}
    barrier = threading.Barrier(2, timeout=60)

    def work(k):
        for _ in range(100):
            barrier.wait()
            net(inputs[k])
            try:
                A = tap.pop()
            except RuntimeError as e:
                got[k].append(str(e))
            else:
                got[k].append(torch.equal(A, expected[k]))

    with FeatureTap(net, '3') as tap, ThreadPoolExecutor(1) as pool:
        other = pool.submit(work, 2)
        work(1)
        other.result()
    assert len(got[1]) == len(got[2]) == 100 and False not in got[1] and all('another thread' in g for g in got[2])


def test_a_tap_for_each_thread():
    "Two threads train the same model at once, each with its own tap"
    net = make_net()
    barrier = threading.Barrier(2, timeout=60)

    def work(k):
        x = torch.full((4, 3), float(k))
        expected = net[:4](x)
        with FeatureTap(net, '3') as tap:
            for _ in range(50):
                barrier.wait()
                net(x)
                barrier.wait()
                assert torch.equal(tap.pop(), expected)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(list(pool.map(work, (1, 2))))
    assert hooks(net) == 0


def test_a_tap_may_move_to_another_thread_when_it_is_attached_anew():
    net = make_net()
    tap = FeatureTap(net, '3')

    def run():
        with tap:
            net(X)
            return tap.pop()

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(run).result(), run())


# ---- Nothing stays behind ----


def test_a_tap_that_nobody_holds_takes_its_hook_along():
    net = make_net()
    gc.disable()
    try:
        tap = FeatureTap(net, '3').attach()
        net(X)
        assert hooks(net) == 1
        ref = weakref.ref(tap)
        del tap
        assert ref() is None and hooks(net) == 0
        FeatureTap(net, '3').attach()
        assert hooks(net) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize('where', ['forward', 'between', 'backward'])
def test_an_exception_leaves_no_hook_and_no_activations(error, where):
    net = make_net()
    keys = list(net.state_dict())

    def fail(*args):
        raise error("stop")

    with pytest.raises(error, match="stop"):
        with FeatureTap(net, '3') as tap:
            h = net[4].register_forward_hook(fail) if where == 'forward' else None
            try:
                logits = net(X)
            finally:
                if h:
                    h.remove()
            if where == 'between':
                fail()
            A = tap.activations
            A.register_hook(fail)
            (logits.sum() + A.sum()).backward()
    assert hooks(net) == 0 and tap.output is None and list(net.state_dict()) == keys
    with tap:
        check_step(net, net, tap)  # the next one is right


def test_attach_and_detach_may_be_repeated():
    net = make_net()
    tap = FeatureTap(net, '3')
    tap.detach()
    tap.attach()
    tap.attach()
    assert hooks(net) == 1
    check_step(net, net, tap)
    tap.detach()
    tap.detach()
    assert hooks(net) == 0
    other = net[3].register_forward_hook(lambda *args: None)
    with tap:
        assert hooks(net) == 2
    assert list(net[3]._forward_hooks) == [other.id]  # the hook of another is still there


def test_activations_die_after_the_step():
    "A tap that is attached for a whole training keeps nothing between steps, and leaves no reference cycles"
    net = make_net()
    gc.collect()
    gc.disable()
    try:
        with FeatureTap(net, '3') as tap:
            for _ in range(3):
                net(X)
                A = tap.pop()
                ref = weakref.ref(A)
                GiniKLLoss()(A, Y).backward()
                del A
                assert ref() is None
            net(X)
            ref = weakref.ref(tap.activations)
            assert ref() is not None  # a look is no pop
            tap.clear()
            assert ref() is None
            net(X)
            ref = weakref.ref(tap.activations)
        assert ref() is None  # neither does leaving
    finally:
        gc.enable()


@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'save'])
def test_copies_of_a_tapped_model(how):
    "A copy of the model does not write into the tap, whether it runs before or after the original"
    net = make_net()
    expected = net[:4](X)
    with FeatureTap(net, '3') as tap:
        net(X)
        if how == 'deepcopy':
            twin = copy.deepcopy(net)
        elif how == 'pickle':
            twin = pickle.loads(pickle.dumps(net))
        else:
            f = io.BytesIO()
            torch.save(net, f)
            f.seek(0)
            twin = torch.load(f, weights_only=False)
        twin(2 * X)
        torch.testing.assert_close(tap.pop(), expected)
        twin(X)
        with pytest.raises(RuntimeError, match="did not run"):
            tap.pop()
        with FeatureTap(twin, '3') as own:
            check_step(twin, twin, own)  # and can be tapped itself
    assert torch.equal(twin(X), net(X)) and list(twin.state_dict()) == list(net.state_dict())


def test_averaged_weights():
    "An exponential moving average is a deep copy, made during training and evaluated while the tap is attached"
    net = make_net()
    with FeatureTap(net, '3') as tap:
        ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for _ in range(2):
            check_step(net, net, tap)
            ema.update_parameters(net)
            with torch.no_grad():
                ema(X)
    assert hooks(net) == 0


# ---- Activation checkpointing ----


def test_checkpointing_without_reentry_works():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        for forward in (
            lambda x: checkpoint(net, x, use_reentrant=False),
            lambda x: checkpoint_sequential(net, 2, x, use_reentrant=False),
            lambda x: net[4](checkpoint(net[:4], x, use_reentrant=False)),
            lambda x: net[2:](checkpoint(net[:2], x, use_reentrant=False)),
        ):
            for _ in range(2):
                check_step(net, net, tap, forward)
            assert tap.output is None  # the recomputation left nothing
            with pytest.raises(RuntimeError, match='did not run'):
                tap.pop()


def test_reentrant_checkpointing_raises():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        for _ in range(2):
            logits = checkpoint(net, X.clone().requires_grad_(), use_reentrant=True)
            with pytest.raises(RuntimeError, match="layer '3' ran without gradients: reentrant checkpointing"):
                tap.pop()
            logits.sum().backward()  # recomputes the layer, inside backward
            with pytest.raises(RuntimeError, match="did not run"):
                tap.pop()
        check_step(net, net, tap)


def test_autocast_and_layers_that_do_not_train():
    net = make_net()
    with FeatureTap(net, '3') as tap, torch.autocast('cpu', torch.bfloat16):
        net(X)
        A = tap.pop()
        assert A.dtype == torch.bfloat16 and GiniKLLoss()(A, Y).dtype == torch.float32
    for p in net[:4].parameters():
        p.requires_grad_(False)
    with FeatureTap(net, '3') as tap:  # nothing to learn in front of the tap: a constant, no error
        loss = cross_entropy(net(X), Y)
        aux = GiniKLLoss()(tap.pop(), Y)
        (loss + aux).backward()
        assert not aux.requires_grad and net[4].weight.grad is not None


@pytest.mark.parametrize(
    'twin_of', [copy.deepcopy, lambda tap: pickle.loads(pickle.dumps(tap))], ids=['deepcopy', 'pickle']
)
def test_copies_of_a_tap_start_detached_and_work(twin_of):
    "A learner that is exported during a fit pickles its taps too"
    net = make_net()
    with FeatureTap(net, '3') as tap:
        net(X)
        twin = twin_of(tap)
        assert twin.name == '3' and hooks(net) == 1
        with pytest.raises(RuntimeError, match="did not run"):
            twin.pop()
        own = nn.Sequential(*net[:3], twin.module, net[4])
        with twin:
            check_step(own, own, twin)
        tap.clear()
        check_step(net, net, tap)
    assert hooks(net) == 0


@pytest.mark.parametrize('layer', ['0', '1', '2'])
def test_columns_of_pixels_are_not_taken_for_channels(layer):
    "A classifier that expects as many features as the maps have columns"
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    )
    with FeatureTap(net, layer) as tap:
        net(torch.rand(6, 3, 8, 8))
        assert (
            find_channel_dim(net, tap.activations, tap.module)
            == find_channel_dim(net, tap.activations, layer)
            == find_channel_dim(net, tap.activations)
            == 1
        )
    from gini_loss.plots import layer_diagnostics

    d = layer_diagnostics(net, [(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)], layer)
    assert len(d.impurity) == 16


def test_channels_last_are_found_beside_a_convolution():
    "A stem of convolutions before blocks with the channels last"

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = (
                nn.Conv2d(3, 8, 4, 4),
                nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24)),
                nn.Linear(24, 4),
            )

        def forward(self, x):
            return self.head(self.block(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))

    net = Last()
    for size, stem in ((32, 1), (20, 1)):
        with FeatureTap(net, 'block') as block, FeatureTap(net, 'stem') as tap:
            net(torch.rand(2, 3, size, size))
            assert (
                find_channel_dim(net, block.activations, 'block') == -1
                and find_channel_dim(net, tap.activations, 'stem') == stem
            )
    with pytest.raises(ValueError, match='nearest|did you mean'):
        find_channel_dim(net, torch.rand(2, 8, 4, 4), 'blck')
