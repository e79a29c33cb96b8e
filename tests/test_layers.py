"""Without arguments the callback finds the last stage and its channels, in our four networks and in common ones of
torchvision and timm"""

import warnings
import pytest, torch, torchvision
from torch import nn

pytest.importorskip('fastai', reason="the callback needs fastai")
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.tabular.model import TabularModel
from fastai.vision.learner import create_timm_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18
from gini_loss.callback import GiniLossCallback
from gini_loss.loader import device_dls
from gini_loss.losses import GiniKLLoss
from gini_loss.models import cvt7, resnet17, resnet18, resnet50
from gini_loss.tap import find_channel_dim, find_layer, last_stage

N = 5  # classes


pytestmark = pytest.mark.filterwarnings('ignore::UserWarning:fastai')


def learner(model, size, *cbs, lr=1e-3, m=8, batches=1):
    g = torch.Generator().manual_seed(0)
    data = list(zip(torch.randn(m * batches, 3, size, size, generator=g), torch.arange(m * batches) % N))
    dls = DataLoaders(DataLoader(data, bs=m), DataLoader(data[:4], bs=4))
    dls.c = N
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=lr, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    return learn


def run(learn, epochs):
    "Fit without printing; returns the recorded values by name, one dict per epoch"
    with learn.no_logging():
        learn.fit(epochs)
    names = list(learn.recorder.metric_names)[1:-1]
    return [dict(zip(names, row)) for row in learn.recorder.values]


def check(model, size, layer, channels, dim):
    "The right layer and dimension are found, and in one step the terms are those of this layer computed by hand"
    assert last_stage(model) == layer
    caught = []
    handle = find_layer(model)[1].register_forward_hook(lambda _, __, out: caught.append(out))
    with torch.no_grad():
        model(torch.randn(2, 3, size, size))
    handle.remove()
    (A,) = caught
    assert isinstance(A, torch.Tensor) and A.shape[dim] == channels, tuple(A.shape)
    assert find_channel_dim(model, A) % A.ndim == dim

    found, cb = {}, GiniLossCallback(start_epoch=0)

    class Spy(Callback):
        "Looks on before (after_loss, order 4) and after (before_backward) the callback under test"

        order, run_valid = 4, False

        def before_batch(self):
            self.handle = model.get_submodule(layer).register_forward_hook(
                lambda _, __, out: found.update(A=out.detach().clone())
            )

        def after_pred(self):
            self.handle.remove()

        def after_loss(self):
            self.plain, found['y'] = self.learn.loss_grad, self.y.clone()

        def before_backward(self):
            added = self.learn.loss_grad - self.plain
            first = next(p for p in model.parameters() if p.ndim > 1)
            found.update(added=added.item(), grad=torch.autograd.grad(added, first, retain_graph=True)[0])

    (row,) = run(learner(model, size, cb, Spy()), 1)
    gini, kl = GiniKLLoss(channel_dim=dim).terms(found['A'], found['y'])
    assert cb.layer_names == [layer]
    assert row['train_gini'] == pytest.approx(gini.item(), rel=1e-4) and 0 < row['train_gini'] <= 1 - 1 / N + 1e-6
    assert row['train_kl'] == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
    assert found['added'] == pytest.approx(0.5 * gini.item() + 0.5 * kl.item(), rel=1e-3)
    assert torch.isfinite(found['grad']).all() and found['grad'].abs().sum() > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


# ---- ours

OURS = {
    'resnet17': (resnet17, 8, 'layer4', N),
    'resnet18': (resnet18, 8, 'layer4', 64),
    'resnet50': (resnet50, 8, 'layer4', 256),
    'cvt7': (cvt7, 6, 'embed3', 48),
}


@pytest.mark.parametrize('name', OURS)
def test_ours(name):
    build, width, layer, channels = OURS[name]
    check(build(N, width=width), 32, layer, channels, 1)


@pytest.mark.parametrize(
    'build, layer, channels',
    [(resnet17, 'layer4', 100), (resnet18, 'layer4', 512), (resnet50, 'layer4', 2048), (cvt7, 'embed3', 258)],
)
def test_ours_in_full_width(build, layer, channels):
    model, caught = build(100).eval(), []
    name, module = find_layer(model)
    module.register_forward_hook(lambda _, __, out: caught.append(out))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert name == layer == model.tap and caught[0].shape[1] == channels
    assert find_channel_dim(model, caught[0]) % 4 == 1


@pytest.mark.parametrize('name', OURS)
def test_ours_with_no_argument_at_all(name):
    "`cbs=GiniLossCallback()`: the terms are shown from the first epoch and trained on from the eleventh"
    build, width, layer, _ = OURS[name]
    torch.manual_seed(0)
    model = build(N, width=width)
    start = {n: p.clone() for n, p in model.state_dict().items()}
    rows, weights = {}, {}
    for with_terms in (False, True):
        for epochs in (10, 11):
            model.load_state_dict(start)
            cbs = (GiniLossCallback(),) if with_terms else ()
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', message='GiniLossCallback starts in epoch')
                rows[with_terms, epochs] = run(learner(model, 32, *cbs), epochs)
            weights[with_terms, epochs] = torch.cat([p.detach().flatten() for p in model.parameters()])
            if with_terms:
                assert cbs[0].layer_names == [layer]
    assert len(rows[True, 11]) == 11 and all({'train_gini', 'train_kl'} <= set(row) for row in rows[True, 11])
    assert torch.equal(weights[True, 10], weights[False, 10])
    assert not torch.equal(weights[True, 11], weights[False, 11])


@pytest.mark.parametrize('build', [resnet17, resnet18, resnet50, cvt7])
def test_the_one_line_with_the_project_s_own_loaders(build):
    "Our loaders and a network of full width, with random images"
    labels = torch.arange(8) * 7
    dls = device_dls(
        (torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), labels),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), labels[:4]),
        classes=[f'class {i}' for i in range(100)],
        bs=8,
        device='cpu',
    )
    learn = Learner(dls, build(100), cbs=GiniLossCallback())
    learn.remove_cb(ProgressCallback)
    with pytest.warns(UserWarning, match='starts in epoch 10'):
        (row,) = run(learn, 1)
    assert learn.gini_loss.layer_names == [learn.model.tap]
    assert 0 < row['train_gini'] < 1 and 0 <= row['train_kl'] and row['train_loss'] > 0


# ---- what people build themselves, and fastai's own


def body():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())


def mlp(*last):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), *last)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 3)


class Metric(nn.Module):
    "As in torchmetrics"

    def update(self, pred, y): ...

    def compute(self): ...


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.shortcut = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)


def parts(**modules):
    net = nn.Module()
    for name, m in modules.items():
        setattr(net, name, m)
    return net


def headless():
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    return net


def conv_head():
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


OWN = {
    'a head of its own class': (lambda: nn.Sequential(body(), Head()), '0'),
    'what is called a head': (lambda: parts(body=body(), head=Head()), 'body'),
    'a head with a convolution': (lambda: parts(stem=body(), body=body(), head=conv_head()), 'body'),
    'the classifier defined first': (lambda: parts(classifier=nn.Linear(8, 3), features=body()), 'features'),
    'a perceptron': (lambda: mlp(), '2'),
    'a perceptron within': (lambda: parts(net=mlp()), 'net.2'),
    'a perceptron called layers': (lambda: parts(layers=mlp()), 'layers.2'),
    'a perceptron without activations': (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)), '0'),
    'layers in a list': (lambda: parts(layers=nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 3)])), 'layers.0'),
    'a sigmoid behind the classifier': (lambda: mlp(nn.Sigmoid()), '2'),
    'activations registered behind the classifier': (
        lambda: parts(body=body(), fc=nn.Linear(8, 3), relu=nn.ReLU(), squash=nn.Sigmoid()),
        'body',
    ),
    'a network in a module with its losses': (
        lambda: parts(net=torchvision.models.resnet18(), loss=nn.CrossEntropyLoss(), aux=GiniKLLoss()),
        'net.layer4',
    ),
    'a network that names its layer, behind a normalisation': (
        lambda: nn.Sequential(nn.InstanceNorm2d(3), resnet17(N, width=8)),
        '1.layer4',
    ),
    'a network that names its layer, with a metric': (
        lambda: parts(net=resnet17(N, width=8), accuracy=Metric()),
        'net.layer4',
    ),
    'an embedding and two linear layers': (
        lambda: parts(embed=nn.Embedding(9, 8), body=nn.Linear(8, 6), head=nn.Linear(6, 3)),
        'body',
    ),
    'maps for logits, and a loss': (lambda: parts(stem=body(), last=body(), loss=nn.NLLLoss()), 'last'),
    'a convolutional network within': (
        lambda: parts(net=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))),
        'net.1',
    ),
    'a network in a wrapper': (lambda: parts(model=torchvision.models.resnet18()), 'model.layer4'),
    'a network without its classifier': (lambda: parts(backbone=headless(), fc=nn.Linear(512, 3)), 'backbone'),
    'averages for logits': (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        '1',
    ),
    'averages for logits, in parts': (lambda: parts(body=nn.Sequential(nn.Conv2d(3, 8, 3), Block())), 'body'),
    'convolutions and two linear layers': (
        lambda: parts(conv1=nn.Conv2d(3, 8, 3), conv2=nn.Conv2d(8, 8, 3), fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 3)),
        'conv2',
    ),
    'a transformer': (
        lambda: parts(
            patch=nn.Conv2d(3, 8, 4),
            blocks=nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)]),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 3),
        ),
        'blocks.1',
    ),
}


@pytest.mark.parametrize('name', OWN)
def test_what_people_build_themselves(name):
    build, layer = OWN[name]
    assert last_stage(build()) == layer and find_layer(build())[0] == layer


@pytest.mark.parametrize(
    'build',
    [
        lambda: nn.Linear(2, 3),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(2, 3)),
        lambda: parts(layer=nn.Linear(2, 3)),
        lambda: parts(net=nn.Sequential(nn.Linear(2, 3))),
    ],
)
def test_a_classifier_alone_has_nothing_before_it(build):
    with pytest.raises(
        ValueError, match="cannot tell which layer of this (Linear|Sequential|Module) comes before the classifier"
    ):
        last_stage(build())


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(concat_pool=False),
        dict(lin_ftrs=[]),
        dict(bn_final=True),
        dict(first_bn=False),
        dict(ps=0.0),
        dict(y_range=(0, 1)),
    ],
    ids=str,
)
def test_a_vision_learner_is_tapped_before_its_head(options):
    model = create_vision_model(torchvision.models.resnet18, N, pretrained=False, **options)
    assert last_stage(model) == '0'
    if not options:
        check(model, 64, '0', 512, 1)


def test_fastai_s_other_networks():
    pytest.importorskip('timm', reason="timm is not installed")
    assert (
        last_stage(create_timm_model('resnet18', N, pretrained=False)[0]) == '0'
        and last_stage(xresnet18(n_out=N)) == '7'
    )
    assert (
        last_stage(TabularModel([(3, 2)], 2, N, [20, 10]))
        == last_stage(TabularModel([(3, 2)], 2, N, [20, 10], y_range=(0, 1)))
        == 'layers.1'
    )
    with pytest.raises(ValueError, match="of this TabularModel"):
        last_stage(TabularModel([(3, 2)], 2, N, []))


class Hidden(nn.Module):
    "A classifier that does not look like one"

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, N)

    def forward(self, x):
        return self.l(x.mean((2, 3)))


def test_a_guess_that_comes_out_as_the_logits_is_refused():
    net = nn.Sequential(body(), Hidden())
    with pytest.raises(ValueError, match="layer '1' was chosen.*output of the model itself.*name the layer you mean"):
        run(learner(net, 8, GiniLossCallback(start_epoch=1)), 1)
    assert not net[1]._forward_hooks
    for layer in ('0', '1'):
        run(learner(net, 8, GiniLossCallback(layer, start_epoch=0)), 1)  # the logits are allowed if you name them


# ---- torchvision


def tiny_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=N
    )


def tiny_swin():
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 4], window_size=[7, 7], num_classes=N
    )


TORCHVISION = {  # size of the image, name of the layer, its channels, their dimension
    'resnet18': (64, 'layer4', 512, 1),
    'resnet50': (32, 'layer4', 2048, 1),
    'convnext_tiny': (64, 'features', 768, 1),
    'efficientnet_b0': (64, 'features', 1280, 1),
    'mobilenet_v2': (64, 'features', 1280, 1),
    'mobilenet_v3_small': (64, 'features', 576, 1),
    'swin_t': (64, 'features', 768, 3),
    'swin_v2_t': (64, 'features', 768, 3),
    'regnet_y_400mf': (64, 'trunk_output', 440, 1),
    'shufflenet_v2_x0_5': (64, 'conv5', 1024, 1),
    'squeezenet1_1': (64, 'features', 512, 1),
    'mnasnet0_5': (64, 'layers', 1280, 1),
}

CONFUSED = {}


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=[pytest.mark.xfail(strict=True, reason=CONFUSED[n])] if n in CONFUSED else [])
        for n in TORCHVISION
    ],
)
def test_torchvision(name):
    check(torchvision.models.get_model(name, weights=None, num_classes=N), *TORCHVISION[name])


@pytest.mark.parametrize('build, layer, channels, dim', [(tiny_vit, 'encoder', 24, 2), (tiny_swin, 'features', 96, 3)])
def test_torchvision_transformers_of_other_sizes(build, layer, channels, dim):
    check(build(), 32, layer, channels, dim)


def test_torchvision_vit_b_16():
    check(torchvision.models.vit_b_16(image_size=32, num_classes=N), 32, 'encoder', 768, 2)


def test_torchvision_densenet_is_refused_and_its_last_block_works():
    "Its forward changes the output of `features` with an in-place ReLU: the tap raises an error that says so"
    model = torchvision.models.densenet121(num_classes=N)
    with pytest.raises(RuntimeError, match="'features' was changed in place"):
        run(learner(model, 64, GiniLossCallback(start_epoch=0)), 1)
    cb = GiniLossCallback('features.denseblock4', start_epoch=0)
    (row,) = run(learner(model, 64, cb), 1)
    assert cb.layer_names == ['features.denseblock4'] and 0 < row['train_gini'] < 1


# ---- timm

TIMM = {
    'resnet18': (64, 'layer4', 512, 1),
    'convnext_atto': (64, 'stages.3', 320, 1),
    'efficientnet_b0': (64, 'blocks.6', 320, 1),
    'mobilenetv3_small_100': (64, 'blocks.5', 576, 1),
    'vit_tiny_patch16_224': (32, 'blocks.11', 192, 2),
    'swin_tiny_patch4_window7_224': (32, 'layers.3', 768, 3),
    'coat_lite_tiny': (32, 'serial_blocks4.1', 320, 2),
}


@pytest.mark.parametrize('name', TIMM)
def test_timm(name):
    timm = pytest.importorskip('timm', reason="timm is not installed")
    size, *rest = TIMM[name]
    kwargs = dict(img_size=size) if name.startswith(('vit', 'swin', 'coat')) else {}
    check(timm.create_model(name, pretrained=False, num_classes=N, **kwargs), size, *rest)
