"What a tap does under compilation, data parallelism, tuples and dicts, in-place work, errors, copies and checkpointing."
import copy, gc, io, pickle, weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from gini_loss.losses import GiniKLLoss
from gini_loss.tap import FeatureTap, find_channel_dim, find_layer, last_stage

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(autouse=True)
def seed_and_forget():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()

def make_net(inplace=False): return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace), nn.Linear(8, 6), nn.ReLU(inplace), nn.Linear(6, 4))
def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4

class Tokens(nn.Module):
    "A layer that returns what `kind` says: a tuple, a dict or a list"
    def __init__(self, kind):
        super().__init__(); self.kind, self.lin = kind, nn.Linear(3, 6)
    def forward(self, x):
        h = self.lin(x)
        return {'tuple': (h, h.sum()), 'dict': {'hidden': h, 'aux': 1}, 'list': [h]}[self.kind]

class Head(nn.Module):
    def __init__(self, kind, inplace=False):
        super().__init__(); self.body, self.head, self.inplace = Tokens(kind), nn.Linear(6, 4), inplace
    def forward(self, x):
        h = self.body(x)
        h = h['hidden'] if isinstance(h, dict) else h[0]
        return self.head(h.relu_() if self.inplace else h.relu())

def expected_gradients(net, layers=4):
    "The step without a tap: the network cut in two by hand"
    net = copy.deepcopy(net); A = net[:layers](X)
    loss = cross_entropy(net[layers:](A), Y) + GiniKLLoss()(A, Y); loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]

def check_step(model, net, tap, forward=None, layers=4):
    "One step through the tap has the loss and the gradients of the step by hand"
    net.zero_grad()
    loss = cross_entropy((forward or model)(X), Y); loss = loss + GiniKLLoss()(tap.pop(), Y); loss.backward()
    expected, gradients = expected_gradients(net, layers)
    torch.testing.assert_close(loss.detach(), expected)
    for p, g in zip(net.parameters(), gradients): torch.testing.assert_close(p.grad, g)

# ---- Compilation ----

@pytest.mark.parametrize('name', ['3', '_orig_mod.3', None])
def test_tap_before_the_first_call_of_a_compiled_model(name):
    net = make_net(); model = torch.compile(net, backend='aot_eager', fullgraph=True)
    with FeatureTap(model, name) as tap:
        assert tap.name == '3'
        for _ in range(3): check_step(model, net, tap)
        model.eval()
        with torch.no_grad(): model(X)
        model.train(); tap.clear()
        check_step(model, net, tap)
    assert hooks(net) == 0

def test_a_compiled_step_is_compiled_once():
    "The tap must not make each step a new graph"
    net, compiled = make_net(), []
    def backend(graph, inputs): compiled.append(graph); return graph.forward
    model = torch.compile(net, backend=backend)
    with FeatureTap(model, '3') as tap:
        for _ in range(10): model(X).sum().backward(); tap.pop()
    assert len(compiled) == 1

def test_a_tap_that_comes_too_late_for_a_compiled_model_says_so():
    "Compiled code ignores a hook added later; a step in which the tap saw nothing must not pass silently"
    net = make_net(); model = torch.compile(net, backend='aot_eager'); model(X)
    with FeatureTap(model, '3') as tap:
        model(X)
        try: A = tap.pop()
        except RuntimeError as e: assert "did not run" in str(e) and "attach the tap before its first call" in str(e)
        else: torch.testing.assert_close(A, net[:4](X))                    # a torch that does see it must see it right
        torch._dynamo.reset()
        check_step(model, net, tap)                                        # compiled afresh, it works

def test_a_model_of_the_same_classes_compiled_before_without_a_tap():
    "A baseline first: torch may give the second model the first one's code, which has no hook. Then the tap says what to do, and that works"
    torch.compile(make_net(), backend='aot_eager')(X)
    net = make_net(); model = torch.compile(net, backend='aot_eager')
    with FeatureTap(model, '3') as tap:
        model(X)
        try: A = tap.pop()
        except RuntimeError as e: assert "torch._dynamo.reset()" in str(e)
        else: torch.testing.assert_close(A, net[:4](X))
        torch._dynamo.reset()
        check_step(model, net, tap)

def test_in_place_work_behind_a_layer_of_a_compiled_model():
    "In a graph the tap hands out what the layer returned, not what became of it"
    net = make_net(inplace=True); model = torch.compile(net, backend='aot_eager')
    with FeatureTap(model, '2') as tap:
        model(X); A = tap.pop()
    torch.testing.assert_close(A, net[2](net[1](net[0](X)))); assert (A < 0).any()
    with FeatureTap(torch.compile(net, backend='aot_eager'), '3') as tap: check_step(lambda x: torch.compile(net, backend='aot_eager')(x), net, tap)

def test_compiled_part_of_a_model():
    net = make_net(); net[2] = torch.compile(nn.Sequential(nn.Linear(8, 6), nn.Tanh()), backend='aot_eager')
    expected = net[:3](X)
    for layer in ('2', net[2]):
        with FeatureTap(net, layer) as tap:
            net(X); torch.testing.assert_close(tap.pop(), expected)
    assert hooks(net) == 0
    assert find_layer(net, '2.1')[1] is net[2]._orig_mod[1] and find_layer(net, '2._orig_mod.1')[0] == '2.1'

def test_compiled_layer_with_a_tuple():
    model = torch.compile(Head('tuple', inplace=True), backend='aot_eager')
    with FeatureTap(model, 'body', select=lambda out: out[0]) as tap:
        model(X); torch.testing.assert_close(tap.pop(), model._orig_mod.body.lin(X))

# ---- Names ----

def test_names_through_wrappers(tmp_path):
    "A name means the same layer whatever the model is wrapped in, and a wrapper's own name for it works too"
    net = make_net()
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/init', rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(net)
        wrapped = {'ddp': ddp, 'compiled ddp': torch.compile(ddp), 'ddp of compiled': nn.parallel.DistributedDataParallel(torch.compile(net)), 'dp': nn.DataParallel(net)}
        for model in wrapped.values():
            for name in ('2', 'module.2'): assert find_layer(model, name) == ('2', net[2])
            assert find_layer(model, net[2]) == ('2', net[2]) and find_layer(model)[0] == last_stage(model) == '3'
            with pytest.raises(ValueError, match="no layer 'module.9' in this Sequential"): find_layer(model, 'module.9')
        with FeatureTap(ddp, 'module.3') as tap: check_step(ddp, net, tap)
        with FeatureTap(ddp, '3') as tap: check_step(ddp, net, tap)
    finally: torch.distributed.destroy_process_group()
    assert hooks(net) == 0

def test_a_layer_called_module_is_not_taken_for_a_wrapper():
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.module, self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(3, 4)
        def forward(self, x): return self.module(x)
    odd = Odd()
    assert find_layer(odd, 'module.0') == ('module.0', odd.module[0]) and find_layer(odd, 'module') == ('module', odd.module)

@pytest.mark.parametrize('layer,kind,message', [
    ('layr3', ValueError, r"no layer 'layr3' in this Net: did you mean 'layer3'"), ('', ValueError, "no layer ''"),
    (nn.ReLU(), ValueError, "the given ReLU is not part of this Net"), (3, TypeError, "dotted name, a module or None, got int"), (['layer3'], TypeError, "got list")])
def test_unknown_layers(layer, kind, message):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layer3, self.layer4, self.fc = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    with pytest.raises(kind, match=message): FeatureTap(Net(), layer)

def test_what_is_no_model():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"): FeatureTap(lambda x: x)
    with pytest.raises(ValueError, match="name one"): FeatureTap(nn.Linear(2, 3))

@pytest.mark.parametrize('shape,widths,expected', [((4, 6), 6, 1), ((4, 6, 5, 5), 6, 1), ((4, 5, 5, 6), 6, -1), ((4, 17, 6), 6, -1), ((4, 6, 17), 6, 1), ((4, 5, 5, 7), 6, 1), ((4, 5, 7), 6, -1)])
def test_channel_dim(shape, widths, expected):
    assert find_channel_dim(nn.Sequential(nn.Identity(), nn.Linear(widths, 2)), torch.rand(shape)) == expected

# ---- What a layer returns ----

@pytest.mark.parametrize('kind,select', [('tuple', lambda out: out[0]), ('list', lambda out: out[0]), ('dict', lambda out: out['hidden'])])
def test_select(kind, select):
    model = Head(kind)
    with FeatureTap(model, 'body', select) as tap:
        loss = cross_entropy(model(X), Y) + GiniKLLoss()(tap.pop(), Y); loss.backward()
    got = model.body.lin.weight.grad.clone(); model.zero_grad()
    h = model.body.lin(X); (cross_entropy(model.head(h.relu()), Y) + GiniKLLoss()(h, Y)).backward()
    torch.testing.assert_close(got, model.body.lin.weight.grad)
    with FeatureTap(model, 'body') as tap:
        model(X)
        with pytest.raises(TypeError, match=f"layer 'body' returned a {kind}, not a tensor: pass select"): tap.pop()

def test_select_that_fails_leaves_the_tap_empty():
    model = Head('tuple')
    with FeatureTap(model, 'body', select=lambda out: out['hidden']) as tap:
        model(X)
        with pytest.raises(TypeError): tap.pop()
        with pytest.raises(RuntimeError, match="did not run"): tap.pop()

def test_select_may_reshape():
    vit = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)); x = torch.randn(2, 5, 3)
    with FeatureTap(vit, '0', select=lambda A: A[:, 1:]) as tap:                       # without the class token
        vit(x); assert tap.pop().shape == (2, 4, 6)

# ---- Steps that must not pass silently ----

@pytest.mark.parametrize('kind', ['tuple', 'list', 'dict'])
def test_in_place_work_on_part_of_an_output(kind):
    model = Head(kind, inplace=True)
    with FeatureTap(model, 'body', select=lambda out: out['hidden'] if isinstance(out, dict) else out[0]) as tap:
        model(X)
        with pytest.raises(RuntimeError, match="changed in place"): tap.pop()

def test_in_place_work_on_a_view():
    class Shifted(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        def forward(self, x): h = self.body(x); h[:, 0] = 0; return self.head(h)
    model = Shifted()
    with FeatureTap(model, 'body') as tap:
        model(X)
        with pytest.raises(RuntimeError, match="the output of layer 'body' was changed in place"): tap.pop()

def test_runs_twice_or_not_at_all():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        net(X); net(X)
        with pytest.raises(RuntimeError, match="ran 2 times"): tap.pop()
        with pytest.raises(RuntimeError, match="did not run"): tap.pop()              # emptied by the error, too
        net(X); tap.pop(); net(X); tap.clear(); check_step(net, net, tap)             # and right again
        net[:2](X)
        with pytest.raises(RuntimeError, match="did not run"): tap.pop()
        with torch.no_grad(): net(X)
        with pytest.raises(RuntimeError, match="without gradients"): tap.pop()
        with torch.no_grad(): net(X); assert not tap.pop().requires_grad              # who looks only, may
        with torch.inference_mode(): net(X); assert tap.pop().is_inference()

def test_evaluation_between_forward_and_loss():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        logits = net(X)
        with torch.no_grad(): net(2*X)
        with torch.inference_mode(): net(3*X)
        check_step(net, net, tap, forward=lambda x: logits)

def test_two_taps_and_two_layers():
    net = make_net()
    with FeatureTap(net, '1') as a, FeatureTap(net, '3') as b, FeatureTap(net, '3') as c:
        net(X); assert a.pop().shape == (8, 8) and torch.equal(b.pop(), c.pop())
    assert hooks(net) == 0

# ---- Nothing stays behind ----

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize('where', ['forward', 'between', 'backward'])
def test_an_exception_leaves_no_hook_and_no_activations(error, where):
    net = make_net(); keys = list(net.state_dict())
    def fail(*args): raise error("stop")
    with pytest.raises(error, match="stop"):
        with FeatureTap(net, '3') as tap:
            h = net[4].register_forward_hook(fail) if where == 'forward' else None
            try: logits = net(X)
            finally:
                if h: h.remove()
            if where == 'between': fail()
            A = tap.activations; A.register_hook(fail)
            (logits.sum() + A.sum()).backward()
    assert hooks(net) == 0 and tap._recorder.output is None and list(net.state_dict()) == keys
    with tap: check_step(net, net, tap)                                                # the next one is right

def test_attach_and_detach_may_be_repeated():
    net = make_net(); tap = FeatureTap(net, '3')
    tap.detach(); tap.attach(); tap.attach(); assert hooks(net) == 1
    check_step(net, net, tap)
    tap.detach(); tap.detach(); assert hooks(net) == 0
    other = net[3].register_forward_hook(lambda *args: None)
    with tap: assert hooks(net) == 2
    assert list(net[3]._forward_hooks) == [other.id]                                   # another's hook is left alone

def test_activations_die_after_the_step():
    "A tap that is kept for a whole training holds nothing between steps, and leaves no cycle for the collector"
    net = make_net(); gc.collect(); gc.disable()
    try:
        with FeatureTap(net, '3') as tap:
            for _ in range(3):
                net(X); A = tap.pop(); ref = weakref.ref(A); GiniKLLoss()(A, Y).backward()
                del A; assert ref() is None
            net(X); ref = weakref.ref(tap.activations); assert ref() is not None       # a look is no pop
            tap.clear(); assert ref() is None
            net(X); ref = weakref.ref(tap.activations)
        assert ref() is None                                                           # neither does leaving
    finally: gc.enable()

@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'save'])
def test_copies_of_a_tapped_model(how):
    "A copy does not write into the tap, whether it runs before or after the original"
    net = make_net(); expected = net[:4](X)
    with FeatureTap(net, '3') as tap:
        net(X)
        if how == 'deepcopy': twin = copy.deepcopy(net)
        elif how == 'pickle': twin = pickle.loads(pickle.dumps(net))
        else: f = io.BytesIO(); torch.save(net, f); f.seek(0); twin = torch.load(f, weights_only=False)
        twin(2*X)
        torch.testing.assert_close(tap.pop(), expected)
        twin(X)
        with pytest.raises(RuntimeError, match="did not run"): tap.pop()
        with FeatureTap(twin, '3') as own: check_step(twin, twin, own)                  # and can be tapped itself
    assert torch.equal(twin(X), net(X)) and list(twin.state_dict()) == list(net.state_dict())

def test_averaged_weights():
    "An exponential moving average is a deep copy made in the middle of training, evaluated while the tap listens"
    net = make_net()
    with FeatureTap(net, '3') as tap:
        ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(.9))
        for _ in range(2):
            check_step(net, net, tap); ema.update_parameters(net)
            with torch.no_grad(): ema(X)
    assert hooks(net) == 0

# ---- Activation checkpointing ----

def test_checkpointing_without_reentry_works():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        for forward in (lambda x: checkpoint(net, x, use_reentrant=False), lambda x: checkpoint_sequential(net, 2, x, use_reentrant=False),
                        lambda x: net[4](checkpoint(net[:4], x, use_reentrant=False)), lambda x: net[2:](checkpoint(net[:2], x, use_reentrant=False))):
            for _ in range(2): check_step(net, net, tap, forward)
            assert tap._recorder.output is None and tap._recorder.calls == 0           # the recomputation left nothing

def test_reentrant_checkpointing_raises():
    net = make_net()
    with FeatureTap(net, '3') as tap:
        for _ in range(2):
            logits = checkpoint(net, X.clone().requires_grad_(), use_reentrant=True)
            with pytest.raises(RuntimeError, match="layer '3' ran without gradients: reentrant checkpointing"): tap.pop()
            logits.sum().backward()                                                    # recomputes the layer, inside backward
            with pytest.raises(RuntimeError, match="did not run"): tap.pop()
        check_step(net, net, tap)

def test_autocast_and_layers_that_do_not_train():
    net = make_net()
    with FeatureTap(net, '3') as tap, torch.autocast('cpu', torch.bfloat16):
        net(X); A = tap.pop(); assert A.dtype == torch.bfloat16 and GiniKLLoss()(A, Y).dtype == torch.float32
    for p in net[:4].parameters(): p.requires_grad_(False)
    with FeatureTap(net, '3') as tap:                                                  # nothing to learn in front of the tap: a constant, no error
        loss = cross_entropy(net(X), Y); aux = GiniKLLoss()(tap.pop(), Y); (loss + aux).backward()
        assert not aux.requires_grad and net[4].weight.grad is not None

@pytest.mark.parametrize('twin_of', [copy.deepcopy, lambda tap: pickle.loads(pickle.dumps(tap))], ids=['deepcopy', 'pickle'])
def test_copies_of_a_tap_start_detached_and_work(twin_of):
    "A learner that is exported in the middle of a fit pickles its taps too"
    net = make_net()
    with FeatureTap(net, '3') as tap:
        net(X); twin = twin_of(tap)
        assert twin.name == '3' and twin._handle is None
        with pytest.raises(RuntimeError, match="did not run"): twin.pop()
        own = nn.Sequential(*net[:3], twin.module, net[4])
        with twin: check_step(own, own, twin)
        tap.clear(); check_step(net, net, tap)
    assert hooks(net) == 0

@pytest.mark.parametrize('layer', ['0', '1', '2'])
def test_columns_of_pixels_are_not_taken_for_channels(layer):
    "A classifier that expects as many features as the maps have columns"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16*8*8, 8), nn.ReLU(), nn.Linear(8, 4))
    with FeatureTap(net, layer) as tap:
        net(torch.rand(6, 3, 8, 8))
        assert find_channel_dim(net, tap.activations, tap.module) == find_channel_dim(net, tap.activations, layer) == find_channel_dim(net, tap.activations) == 1
    from gini_loss.plots import layer_diagnostics
    d = layer_diagnostics(net, [(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)], layer)
    assert len(d.impurity) == 16

def test_channels_last_are_found_beside_a_convolution():
    "A stem of convolutions in front of blocks that keep the channels last"
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 8, 4, 4), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24)), nn.Linear(24, 4)
        def forward(self, x): return self.head(self.block(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))
    net = Last()
    for size, stem in ((32, 1), (20, 1)):
        with FeatureTap(net, 'block') as block, FeatureTap(net, 'stem') as tap:
            net(torch.rand(2, 3, size, size))
            assert find_channel_dim(net, block.activations, 'block') == -1 and find_channel_dim(net, tap.activations, 'stem') == stem
    with pytest.raises(ValueError, match='nearest|did you mean'): find_channel_dim(net, torch.rand(2, 8, 4, 4), 'blck')
