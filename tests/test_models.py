"The four networks: sizes, parameters, gradients, layouts, compilation, errors, and references they must agree with"

import copy, io, pickle, shutil
import pytest, torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from gini_loss.models import (
    ConvAttention,
    ConvTokenEmbedding,
    ConvTransformerBlock,
    ConvTransformerStage,
    CvT,
    LogitBlock,
    ResNet,
    cvt7,
    resnet17,
    resnet18,
    resnet50,
    summarize,
)

NARROW = {'resnet17': (resnet17, 8), 'resnet18': (resnet18, 8), 'resnet50': (resnet50, 8), 'cvt7': (cvt7, 6)}
TAPPED = {
    'resnet17': ('layer4', lambda n_classes: (n_classes, 4, 4)),
    'resnet18': ('layer4', lambda _: (512, 4, 4)),
    'resnet50': ('layer4', lambda _: (2048, 4, 4)),
    'cvt7': ('embed3', lambda _: (258, 2, 2)),
}
FULL = {'resnet17': resnet17, 'resnet18': resnet18, 'resnet50': resnet50, 'cvt7': cvt7}
every = pytest.mark.parametrize('name', list(NARROW))


def narrow(name, n_classes=7, **kwargs):
    build, width = NARROW[name]
    torch.manual_seed(0)
    return build(n_classes, width=width, **kwargs)


def images(m=2, size=32, c=3):
    return torch.randn(m, c, size, size, generator=torch.Generator().manual_seed(1))


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def settle(model, x):
    "Give BatchNorm's statistics a value other than the initial one"
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


# ---- sizes


@pytest.mark.parametrize(
    'build, expected', [(resnet17, 9_320_912), (resnet18, 11_220_132), (resnet50, 23_705_252), (cvt7, 4_025_170)]
)
def test_parameter_count(build, expected):
    assert n_parameters(build()) == expected


def test_resnet17_differs_from_resnet18_as_counted_by_hand():
    n = 100
    classifier, conv, bn = 512 * n + n, 9 * 512 * (512 - n), 2 * (512 - n)
    projection = 512 * n + 2 * n
    assert n_parameters(resnet18(n)) - n_parameters(resnet17(n)) == classifier + conv + bn - projection


def test_cvt7_counted_by_hand():
    def layer(c, patch, c_in):
        return c_in * c * patch**2 + c + 2 * c

    def block(c, queries=True):
        return 4 * c + (3 if queries else 2) * (9 * c + 2 * c) + 4 * (c * c + c) + (4 * c * c + 4 * c) + (4 * c * c + c)

    expected = (
        layer(32, 7, 3)
        + block(32)
        + layer(128, 3, 32)
        + 2 * block(128)
        + layer(258, 3, 128)
        + 3 * block(258)
        + block(258, False)
    )
    assert n_parameters(cvt7()) == expected + 258 + 2 * 258 + 258 * 100 + 100


@every
@pytest.mark.parametrize('n_classes', [2, 10, 257])
def test_any_number_of_classes(name, n_classes):
    assert narrow(name, n_classes)(images()).shape == (2, n_classes)


@every
@pytest.mark.parametrize('size', [17, 32, 48, 64])
def test_other_image_sizes(name, size):
    model = narrow(name)
    assert model(images(2, size)).shape == (2, 7)
    assert model(images(2, size)[..., : size - 1]).shape == (2, 7)  # not square


@every
def test_grey_images(name):
    assert narrow(name, in_channels=1)(images(c=1)).shape == (2, 7)


@every
def test_batch_of_one_is_a_row_of_the_batch(name):
    model, x = settle(narrow(name), images(4)), images(4)
    with torch.no_grad():
        whole = model(x)
        for i in range(4):
            torch.testing.assert_close(model(x[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, size', [('resnet17', 32), ('resnet18', 32), ('resnet50', 32), ('cvt7', 64)])
def test_batch_of_one_trains(name, size):
    model = narrow(name).train()
    F.cross_entropy(model(images(1, size)), torch.tensor([3])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_cvt_with_one_key_and_one_image_cannot_normalise_over_the_batch():
    "At 32×32 the last keys are 1×1: one number has no variance, and BatchNorm raises an error"
    model = narrow('cvt7').train()
    with pytest.raises(ValueError, match='more than 1 value'):
        model(images(1))
    assert torch.isfinite(model(images(2))).all()


# ---- tap


@every
def test_tap(name):
    tap, shape = TAPPED[name]
    model, caught = FULL[name](13), []
    assert model.tap == tap
    model.get_submodule(model.tap).register_forward_hook(lambda _, __, out: caught.append(out))
    model(images())
    (A,) = caught
    assert A.shape == (2, *shape(13))
    assert (A.min() < 0) == (name == 'cvt7')  # behind a ReLU in the residual networks, behind LayerNorm in CvT


@every
def test_logits_depend_on_the_tapped_maps_alone_and_nothing_overwrites_them(name):
    model, caught = narrow(name), []
    model.get_submodule(model.tap).register_forward_hook(lambda _, __, out: caught.extend((out, out.clone())))
    loss = F.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 3]))
    A, at_the_time = caught
    assert torch.equal(A, at_the_time)
    (grad,) = torch.autograd.grad(loss, A)
    assert grad.shape == A.shape and grad.abs().sum() > 0


@pytest.mark.parametrize('final_relu', [True, False])
def test_resnet17_pools_its_tap_into_logits(final_relu):
    model, caught = narrow('resnet17', final_relu=final_relu), []
    assert not any(isinstance(part, nn.Linear) for part in model.modules())
    model.get_submodule(model.tap).register_forward_hook(lambda _, __, out: caught.append(out))
    logits = model(images())
    torch.testing.assert_close(caught[0].mean((2, 3)), logits)
    assert (logits.min() >= 0) == final_relu


def test_resnet17_last_convolution_has_a_filter_per_class_and_there_are_seventeen_layers():
    model = resnet17(100)
    assert model.layer4[1].conv2.weight.shape == (100, 512, 3, 3)
    shortcuts = {id(p) for n, p in model.named_modules() if 'downsample' in n}
    assert sum(isinstance(p, (nn.Conv2d, nn.Linear)) and id(p) not in shortcuts for p in model.modules()) == 17


# ---- gradients


@every
def test_gradients_reach_every_parameter(name):
    model = narrow(name).train()
    x = images(8)
    F.cross_entropy(model(x), torch.arange(8) % 7).backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), n
        assert p.grad.abs().sum() > 0, n


@every
def test_a_few_steps_on_one_batch_lower_its_loss(name):
    model, x, y = narrow(name).train(), images(7), torch.arange(7)
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(12):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_is_off_by_default_and_acts_in_training_only():
    x = images()
    plain, dropped = narrow('resnet50'), narrow('resnet50', dropout=0.4)
    with torch.no_grad():
        assert torch.equal(plain(x), plain(x))
        assert not torch.equal(dropped(x), dropped(x))
        plain, dropped = narrow('resnet50').eval(), narrow('resnet50', dropout=0.4).eval()
        assert torch.equal(plain(x), dropped(x))


# ---- the same numbers by another way


@every
def test_seed_decides_weights_and_output(name):
    a, b = narrow(name), narrow(name)
    x = images()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(a(x), b(x))
    torch.manual_seed(1)
    build, width = NARROW[name]
    assert not torch.equal(a(x), build(7, width=width)(x))


@every
def test_channels_last(name):
    "In float64, because rounding alone changes the gradients of a deep network in float32"
    x, y = images(4).double(), torch.arange(4)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = narrow(name).double().to(memory_format=layout).train()
        logits = model(x.to(memory_format=layout))
        F.cross_entropy(logits, y).backward()
        results.append((logits, [p.grad.contiguous() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@every
def test_captured_in_one_graph(name):
    "The graph of each network, without a graph break; for one of each family the backward pass too"
    torch._dynamo.reset()
    backend = 'aot_eager' if name in ('resnet18', 'cvt7') else 'eager'
    model, x, y = narrow(name).double(), images(4).double(), torch.arange(4)
    results = []
    for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        logits = run(x)
        F.cross_entropy(logits, y).backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(
    not (shutil.which('gcc') or shutil.which('g++') or shutil.which('clang')),
    reason="torch.compile needs a C++ compiler",
)
def test_compiled():
    "Generated code, for one part of each family, because generating takes long"
    torch._dynamo.reset()
    model, x = nn.Sequential(LogitBlock(4, 4), ConvTransformerStage(4, 1, 2, class_token=True)), images(2, 4, 4)
    settle(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)


@every
def test_exported_program(name):
    model = settle(narrow(name), images())
    program = torch.export.export(model, (images(),))
    torch.testing.assert_close(program.module()(images()), model(images()), rtol=1e-4, atol=1e-5)


@every
def test_copies_agree(name):
    model, x = settle(narrow(name), images()), images()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(5)
    build, width = NARROW[name]
    fresh = build(7, width=width).eval()
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)
    assert copy.deepcopy(model).tap == model.tap


@every
def test_bfloat16_autocast(name):
    model, x = settle(narrow(name), images()), images()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        low = model(x)
    with torch.no_grad():
        torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.1)


# ---- against others' code


@pytest.mark.parametrize(
    'ours, theirs', [(resnet18, torchvision.models.resnet18), (resnet50, torchvision.models.resnet50)]
)
def test_torchvision_with_our_weights(ours, theirs):
    ours, theirs = ours(10), theirs(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    settle(ours, images())
    theirs.load_state_dict(ours.state_dict())
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    y, grads = torch.tensor([1, 2]), []
    for model in (ours.train(), theirs.train()):
        F.cross_entropy(model(x), y).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][n], rtol=1e-3, atol=1e-5)


def test_resnet17_shares_all_but_its_last_block_with_resnet18():
    a, b = resnet17(10, width=8), resnet18(10, width=8)
    shared = {n: p for n, p in b.state_dict().items() if not n.startswith(('layer4.1', 'fc'))}
    missing = a.load_state_dict(shared, strict=False)
    assert not missing.unexpected_keys and all(n.startswith('layer4.1') for n in missing.missing_keys)


def slow_attention(attention, x, extra):
    "Images, heads, queries, keys and channels one by one; the projections spelled out with torch.nn.functional"

    def project(p, x, extra):
        if isinstance(p, nn.Linear):
            return extra @ p.weight.T + p.bias
        y = F.conv2d(x, p.conv.weight, stride=p.conv.stride, padding=1, groups=x.shape[1])
        mean, var = (s[None, :, None, None] for s in (p.norm.running_mean, p.norm.running_var))
        y = (y - mean) / (var + p.norm.eps).sqrt() * p.norm.weight[None, :, None, None] + p.norm.bias[
            None, :, None, None
        ]
        rows = [
            torch.stack(list(extra[i]) + [y[i, :, r, s] for r in range(y.shape[2]) for s in range(y.shape[3])])
            for i in range(len(y))
        ]
        return torch.stack(rows) @ p.linear.weight.T + p.linear.bias

    q, k, v = (project(p, x, extra) for p in (attention.query, attention.key, attention.value))
    d, out = q.shape[2] // attention.heads, torch.zeros_like(q)
    for i in range(len(q)):
        for head in range(attention.heads):
            for a in range(q.shape[1]):
                scores = [
                    sum(q[i, a, head * d + e] * k[i, b, head * d + e] for e in range(d)) / d**0.5
                    for b in range(k.shape[1])
                ]
                weights = [torch.exp(s - max(scores)) for s in scores]
                for e in range(d):
                    out[i, a, head * d + e] = sum(w * v[i, b, head * d + e] for b, w in enumerate(weights)) / sum(
                        weights
                    )
    return out @ attention.out.weight.T + attention.out.bias


@pytest.mark.parametrize('class_token, class_query', [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize('size', [(3, 2), (4, 4)])
def test_attention_against_a_loop(class_token, class_query, size):
    attention = ConvAttention(6, 3, class_query).double()
    x, extra = torch.randn(2, 6, *size).double(), torch.randn(2, int(class_token), 6).double()
    with torch.no_grad():
        for _ in range(3):
            attention(x, extra)  # move the running statistics
        attention.eval()
        for p in attention.parameters():
            p.add_(torch.randn_like(p))
        torch.testing.assert_close(attention(x, extra), slow_attention(attention, x, extra))


def test_asking_for_the_class_token_alone_changes_nothing_else():
    "The last block gives the class token of the same block with every query"
    full, short = ConvTransformerBlock(6, 3).eval(), ConvTransformerBlock(6, 3, class_query=True).eval()
    state = full.state_dict()
    short.load_state_dict(
        {
            n.replace('query.linear', 'query'): p
            for n, p in state.items()
            if 'query.conv' not in n and 'query.norm' not in n
        }
    )
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(short(x, (2, 2)), full(x, (2, 2))[:, :1])


def test_embedding_is_a_normalised_map():
    embed = ConvTokenEmbedding(3, 12, 7, 4)
    A = embed(images())
    assert A.shape == (2, 12, 8, 8) and (A < 0).any()
    torch.testing.assert_close(A.mean(1), torch.zeros(2, 8, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(A, F.layer_norm(embed.conv(images()).movedim(1, 3), (12,)).movedim(3, 1))


def test_a_stage_keeps_the_map_in_place():
    "Without attention, a token of the output depends only on the token at the same position"
    stage = ConvTransformerStage(4, 1, 2).eval()
    nn.init.zeros_(stage.blocks[0].attention.out.weight)
    x = torch.randn(1, 4, 3, 5)
    y = x.clone()
    y[0, :, 1, 3] += 1 + torch.arange(4)
    changed = (stage(x) - stage(y)).abs().sum(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]


def test_no_weight_depends_on_the_image_size():
    model = settle(narrow('cvt7'), images())
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    model(images(2, 64))
    assert shapes == {n: p.shape for n, p in model.state_dict().items()}


# ---- summarize


@pytest.mark.parametrize('build, billions', [(resnet18, 0.555), (resnet50, 1.298)])
def test_multiply_adds(build, billions):
    assert sum(r.multiply_adds for r in summarize(build())) / 1e9 == pytest.approx(billions, abs=5e-4)


@every
def test_summary_adds_up(name):
    model = narrow(name).train()
    model.fc.eval()
    rows = summarize(model)
    assert sum(r.parameters for r in rows) == n_parameters(model)
    assert [r.name for r in rows if r.tapped] == [model.tap]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        copy.deepcopy(model).eval()(images(1))
    assert 2 * sum(r.multiply_adds for r in rows) == counter.get_total_flops()
    assert model.training and not model.fc.training  # left as it was
    assert not any(part._forward_hooks for part in model.modules())
    assert all(b.num_batches_tracked == 0 for b in model.modules() if isinstance(b, nn.BatchNorm2d))


def test_attention_multiply_adds_by_hand():
    c, tokens, keys = 32, 64, 16
    conv, linear = 9 * c * (tokens + 2 * keys), c * c * (2 * tokens + 2 * keys)
    attention, mlp = 2 * tokens * keys * c, 2 * 4 * c * c * tokens
    assert {r.name: r.multiply_adds for r in summarize(cvt7())}['stage1'] == conv + linear + attention + mlp


# ---- errors


@every
@pytest.mark.parametrize(
    'kwargs, error, match',
    [
        (dict(n_classes=1), ValueError, 'n_classes must be at least 2, got 1'),
        (dict(n_classes=0), ValueError, 'n_classes'),
        (dict(n_classes=10.0), TypeError, 'n_classes must be an integer'),
        (dict(n_classes='10'), TypeError, 'n_classes'),
        (dict(n_classes=True), TypeError, 'n_classes'),
        (dict(n_classes=None), TypeError, 'n_classes'),
        (dict(width=0), ValueError, 'width must be at least 1, got 0'),
        (dict(width=-8), ValueError, 'width'),
        (dict(width=2.5), TypeError, 'width'),
        (dict(in_channels=0), ValueError, 'in_channels'),
    ],
)
def test_impossible_sizes(name, kwargs, error, match):
    with pytest.raises(error, match=match):
        FULL[name](**kwargs)


@pytest.mark.parametrize('dropout', [-0.1, 1.0, 2])
def test_impossible_dropout(dropout):
    with pytest.raises(ValueError, match='dropout'):
        resnet50(width=1, dropout=dropout)


@every
def test_wrong_images(name):
    model = narrow(name)
    with pytest.raises(ValueError, match=r'\(m, 3, h, w\), got \(3, 32, 32\).*x\[None\]'):
        model(images()[0])
    with pytest.raises(ValueError, match=r'got \(2, 1, 32, 32\)'):
        model(images(c=1))
    with pytest.raises(ValueError, match='pixels, got 0×0'):
        model(images()[..., :0, :0])
    with pytest.raises(TypeError, match='floating point, got torch.uint8'):
        model(images().byte())
    with pytest.raises(TypeError, match='torch.Tensor, got list'):
        model(images().tolist())


def test_cvt_needs_three_pixels():
    model = narrow('cvt7').eval()
    with pytest.raises(ValueError, match='at least 3×3 pixels, got 2×2'):
        model(images(2, 2))
    assert model(images(2, 3)).shape == (2, 7)


def test_wrong_number_of_stages():
    with pytest.raises(ValueError, match='depths must have four numbers, one per stage, got 2'):
        ResNet(BasicBlock, (2, 2))
    with pytest.raises(ValueError, match='three numbers each, one per stage, got 3, 3 and 2'):
        CvT((2, 4, 6), (1, 2, 4), (1, 2))
    with pytest.raises(ValueError, match='depth must be at least 1, got 0'):
        ResNet(BasicBlock, (1, 1, 0, 1))
    with pytest.raises(ValueError, match='depth must be at least 1, got 0'):
        CvT((2, 4, 6), (1, 0, 4), (1, 2, 2))


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match='256 channels for 6 heads'):
        ConvAttention(256, 6)
    with pytest.raises(ValueError, match='10 channels for 3 heads'):
        ConvTransformerBlock(10, 3)


def test_summary_of_parts_that_return_several_tensors():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.both = torch.nn.LSTM(3, 4)

        def forward(self, x):
            return self.both(x.flatten(2).movedim(1, -1))[0]

    with pytest.raises(TypeError, match="part 'both' returns tuple, expected a tensor"):
        summarize(model := Pair(), 4)
    assert not model.both._forward_hooks
