"Channels that are read, named, explained and switched off: values, every kind of model, and nothing left behind"

import copy, pickle
import pytest, torch
from torch import nn
from gini_loss.channels import (
    Explanation,
    ablate,
    channels_of,
    evaluating,
    explain,
    layer_batches,
    name_channels,
    plot_explanation,
    strongest_images,
)
from gini_loss.tap import FeatureTap
from tiny import hooks

P = torch.tensor([[1.0, 0], [0, 1], [0.5, 0.5], [0, 0]])
A = torch.tensor([[4.0, 0, 1], [2, 0, 1], [0, 3, 1], [0, 1, 1]])
Y = torch.tensor([0, 0, 1, 1])


def toy():
    "Three channels, two classes: class 0 is channel 0 plus half of channel 2"
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1, 0, 0.5], [0, 1, 0.5]]))
    return model


class Residual(nn.Module):
    "A residual stage, pooling, and a classifier with a bias; the relu behind the stage works in place"

    def __init__(self, c=6, n=4):
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(c), nn.Linear(c, n)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu_(x + self.norm(self.stage(x))).mean((2, 3)))


class Tokens(nn.Module):
    "A transformer encoder with a class token; its output is (m, tokens, c)"

    def __init__(self, c=8, n=3):
        super().__init__()
        self.embed, self.token = nn.Linear(5, c), nn.Parameter(torch.randn(1, 1, c))
        layer = nn.TransformerEncoderLayer(c, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(c, n)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(self.encoder(x)[:, 0])


class Pair(nn.Module):
    "A layer that returns a tuple with something else first"

    def forward(self, x):
        return {'steps': 3, 'states': (x * 2, None)}


class WithPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Pair(), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x)['states'][0])


def uniform(c, n):
    return torch.full((c, n), 1 / n)


# --- channels_of and name_channels


def test_channels_of():
    assert channels_of(P, 0).tolist() == [0, 2] and channels_of(P, 1).tolist() == [1]
    assert channels_of(P, 0, least=0.6).tolist() == [0]
    assert channels_of(P[3:], 0).tolist() == [] and channels_of(P, 1).dtype == torch.int64
    purest_first = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    assert channels_of(purest_first, torch.tensor(0)).tolist() == [1, 3, 0]
    assert channels_of(P.half(), 0).tolist() == [0, 2]


def test_each_live_channel_belongs_to_one_class():
    probs = torch.rand(40, 7)
    probs = probs / probs.sum(1, keepdim=True)
    probs[::5] = 0
    every = torch.cat([channels_of(probs, k) for k in range(7)])
    assert sorted(every.tolist()) == [i for i in range(40) if i % 5]


def test_names():
    assert name_channels(P, ['cat', 'dog']) == ['cat', 'dog', 'cat + dog', 'dead']
    assert name_channels(torch.tensor([[0.4, 0.35, 0.25]]), ['a', 'b', 'c']) == ['a + b']
    assert name_channels(uniform(1, 10), list('abcdefghij')) == ['mixed']
    assert name_channels(uniform(1, 10), list('abcdefghij'), most=10) == ['a + b + c + d + e + f']


@pytest.mark.parametrize(
    'call, words',
    [
        (lambda: channels_of([[1, 0]], 0), 'probs must be a tensor'),
        (lambda: channels_of(A, 0), 'sum to 1'),
        (lambda: channels_of(P - 1, 0), 'sum to 1'),
        (lambda: channels_of(P * float('nan'), 0), 'sum to 1'),
        (lambda: channels_of(P[0], 0), 'matrix'),
        (lambda: channels_of(P.long(), 0), 'floating-point'),
        (lambda: channels_of(P, 2), 'label must be from 0 to 1, got 2'),
        (lambda: channels_of(P, -1), 'label must be from 0 to 1'),
        (lambda: channels_of(P, 'cat'), 'label must be an integer'),
        (lambda: channels_of(P, True), 'label must be an integer'),
        (lambda: channels_of(P, 0, least=2), 'least must be a share'),
        (lambda: name_channels(P, 'ab'), 'list of names'),
        (lambda: name_channels(P, ['a']), '1 class names for 2 classes'),
        (lambda: explain(toy(), A, P, '0'), 'probs are of 4 channels and 2 classes, the layer has 3 channels'),
        (lambda: explain(toy(), A, uniform(3, 3), '0'), 'the model 2 classes'),
        (lambda: explain(toy(), A, P[:3], '0', k=0), 'k must be at least 1'),
        (lambda: explain(toy(), A, P[:3], '0', k=1.5), 'k must be an integer'),
        (lambda: explain(toy(), A[0], P[:3], '0'), 'must be a batch'),
        (lambda: explain(toy(), A.numpy(), P[:3], '0'), 'got ndarray'),
        (lambda: explain(toy(), A, P[:3], 'nowhere'), "no layer 'nowhere'"),
        (lambda: explain(toy(), A, P[:3], '0', target=2), 'target must be from 0 to 1'),
        (lambda: explain(toy(), A, P[:3], '0', target=torch.tensor([0, 1])), 'for each of the 4 inputs'),
        (lambda: explain('model', A, P[:3]), 'nn.Module'),
        (lambda: explain(nn.Sequential(nn.ReLU(), nn.Unflatten(1, (3, 1))), A, P[:3], '0'), 'logits'),
    ],
)
def test_bad_input(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize(
    'channels, words',
    [
        ([3], 'there is no channel 3'),
        ([-1], 'numbered from 0'),
        ([0.5], 'channel numbers or a bool mask'),
        ('ab', 'channel numbers'),
        (None, 'channel numbers'),
        (torch.zeros(2, 2).long(), 'channel numbers'),
        (torch.tensor([True, False]), 'a mask of 2'),
    ],
)
def test_bad_channels(channels, words):
    model = toy()
    with pytest.raises((ValueError, TypeError), match=words):
        with ablate(model, channels, '0'):
            model(A)
    assert not hooks(model)


# --- ablate


@pytest.mark.parametrize(
    'channels',
    [
        [0, 2],
        (0, 2),
        {0, 2},
        range(0, 3, 2),
        [0, 2, 0],
        torch.tensor([0, 2]),
        torch.tensor([0, 2]).numpy(),
        torch.tensor([True, False, True]),
    ],
)
def test_ablate_gives_zero(channels):
    model = toy()
    with ablate(model, channels, '0') as inside:
        assert inside is model
        assert torch.equal(model(A), torch.stack([A[:, 0] * 0, A[:, 1]], 1))
    assert not hooks(model) and torch.equal(model(A)[0], torch.tensor([4.5, 0.5]))


def test_one_channel_and_none():
    model = toy()
    with ablate(model, 2, '0'):
        assert model(A)[0].tolist() == [4, 0]
    with ablate(model, [], '0'):
        assert model(A)[0].tolist() == [4.5, 0.5]


def test_blocks_can_be_nested_and_overlap():
    model = toy()
    with ablate(model, [0], '0'):
        with ablate(model, [0, 1], '0'):
            assert model(A)[0].tolist() == [0.5, 0.5]
        assert model(A)[2].tolist() == [0.5, 3.5]


def test_nan_and_infinity_are_silenced():
    model = toy()
    with ablate(model, [0, 1], '0'):
        assert model(torch.tensor([[float('nan'), float('inf'), 2]])).tolist() == [[1, 1]]


@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError, SystemExit])
def test_nothing_is_left_however_it_ends(error):
    model = Residual().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        with ablate(model, [1], 'stage'):
            model.eval()(torch.rand(2, 3, 8, 8))
            raise error
    assert not hooks(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_a_generator_that_is_dropped_leaves_nothing():
    model = toy()

    def pieces():
        with ablate(model, [0], '0'):
            yield model(A)

    p = pieces()
    next(p)
    p.close()
    assert not hooks(model)


def test_a_copy_made_inside_is_not_silenced():
    model = toy()
    with ablate(model, [0], '0'):
        twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, pickled):
        assert other(A)[0].tolist() == [4.5, 0.5]


def test_silenced_channels_get_no_gradient():
    model = toy()
    x = A.clone().requires_grad_()
    with ablate(model, [0], '0'):
        model(x).sum().backward()
    assert (x.grad[:, 0] == 0).all() and (x.grad[0, 2] != 0)


def test_a_tap_sees_the_silenced_layer():
    model = toy()
    with FeatureTap(model, '0') as tap, ablate(model, [0], '0'):
        model(A)
        assert (tap.pop()[:, 0] == 0).all()


def test_a_layer_that_does_not_run_is_an_error():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    with pytest.raises(RuntimeError, match="'idle' did not"):
        with ablate(model, [0], 'idle'):
            model(A)
    with ablate(model, [0], 'idle'):
        pass  # nothing ran, nothing was promised
    with pytest.raises(RuntimeError, match="'idle' did not run"):
        explain(model, A, uniform(2, 2), 'idle')
    assert not hooks(model)


def test_tokens_and_nested_outputs():
    model, x = Tokens().eval(), torch.randn(2, 4, 5)
    with FeatureTap(model, 'encoder') as tap, ablate(model, [1, 7], 'encoder'):
        model(x)
        out = tap.pop()
    assert out.shape == (2, 5, 8) and (out[..., [1, 7]] == 0).all() and (out[..., [0, 2]] != 0).any()
    pair = WithPair()
    with ablate(pair, [0, 1, 2], 'body'):
        assert torch.equal(pair(A), pair.head.bias.expand(4, 2))

    class Counts(nn.Module):
        def forward(self, x):
            return x.long()

    with pytest.raises(TypeError, match='without a tensor'):
        with ablate(nn.Sequential(Counts(), nn.Flatten()), [0], '0') as m:
            m(A)


# --- explain


def test_the_toy_by_hand():
    e = explain(toy(), A, P[:3], '0', k=2)
    assert isinstance(e, Explanation)
    assert e.target.tolist() == [0, 0, 1, 1] and e.logit.tolist() == [4.5, 2.5, 3.5, 1.5]
    assert e.channels.tolist() == [[0, 2], [0, 2], [1, 2], [1, 2]]
    assert e.evidence.tolist() == [[4, 0.5], [2, 0.5], [3, 0.5], [1, 0.5]]
    torch.testing.assert_close(e.share, e.evidence / e.logit[:, None])
    assert e.stands_for.tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]] and e.purity[0].tolist() == [1, 0.5]
    torch.testing.assert_close(e.own_share, torch.tensor([1, 1, 3 / 3.5, 1 / 1.5]))
    assert e.rest.abs().max() < 1e-6
    assert e.in_words(['cat', 'dog'])[2].startswith('dog: channel 1 (dog, 100% pure) 86%')
    assert e.in_words()[0].startswith('0: channel 0 (0, 100% pure) 89%')


def test_a_share_is_of_the_positive_evidence_and_a_channel_against_the_class_has_none():
    model = toy()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1, -0.5, 0.5], [0, 0.1, 0]]))
    e = explain(model, torch.tensor([[3.0, 2, 2]]), P[:3], '0', k=3)  # for class 0: 3 - 1 + 1
    torch.testing.assert_close(e.evidence[0], torch.tensor([3.0, 1, -1]))
    torch.testing.assert_close(e.share[0], torch.tensor([0.75, 0.25, 0]))


def test_evidence_is_exact_where_the_rest_is_linear():
    model, x = Residual().eval(), torch.rand(5, 3, 8, 8)
    e = explain(model, x, uniform(6, 4), 'norm', k=6)
    assert e.maps.shape == (5, 6, 8, 8)
    behind = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    e = explain(behind, x, uniform(6, 4), '1', k=6)
    torch.testing.assert_close(e.rest, behind[-1].bias.detach()[e.target])
    for c in range(6):  # what a channel adds is what is lost without it
        with ablate(behind, c, '1'):
            lost = e.logit - behind(x).gather(1, e.target[:, None])[:, 0]
        torch.testing.assert_close(lost.detach(), e.evidence[e.channels == c])


def test_target():
    e = explain(toy(), A, P[:3], '0', k=1, target=1)
    assert e.target.tolist() == [1] * 4 and e.channels.tolist() == [[2], [2], [1], [1]]
    assert explain(toy(), A, P[:3], '0', target=Y.flip(0)).target.tolist() == [1, 1, 0, 0]


def test_one_by_one_as_in_a_batch():
    model, x = Tokens(), torch.randn(6, 4, 5)
    whole = explain(model, x, uniform(8, 3), 'encoder', k=3)
    for i in range(6):
        one = explain(model, x[i : i + 1], uniform(8, 3), 'encoder', k=3)
        assert one.channels[0].tolist() == whole.channels[i].tolist()
        torch.testing.assert_close(one.evidence[0], whole.evidence[i])
    assert whole.maps.shape == (6, 3, 5)


def test_explain_leaves_nothing():
    model = Residual().train()
    model.norm.eval()
    for p in model.stem.parameters():
        p.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        explain(model, torch.rand(2, 3, 8, 8), uniform(6, 4), 'norm')
    with torch.inference_mode():
        explain(model, torch.rand(2, 3, 8, 8), uniform(6, 4), 'norm')
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert all(p.grad is None for p in model.parameters()) and not hooks(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    with pytest.raises(RuntimeError):
        explain(model, torch.rand(2, 5, 8, 8), uniform(6, 4), 'norm')
    assert not hooks(model) and model.training and not model.norm.training


def test_explain_inside_ablate():
    model = toy()
    with ablate(model, [0], '0'):
        e = explain(model, A, P[:3], '0', k=3)
    assert e.logit[0] == 0.5 and 0 not in e.channels[0, :1].tolist()


def test_frozen_networks_and_dead_channels():
    model = toy().requires_grad_(False)
    e = explain(model, torch.zeros(2, 3), torch.zeros(3, 2), '0')
    assert (e.share == 0).all() and (e.stands_for == -1).all() and (e.own_share == 0).all()
    assert 'dead' in e.in_words()[0]


def test_a_layer_that_runs_twice_is_an_error():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(self.body(x)))

    with pytest.raises(RuntimeError, match='more than once'):
        explain(Twice(), A, P[:3], 'body')


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model, x = Residual().eval(), torch.rand(3, 3, 8, 8)
    e = explain(model, x, uniform(6, 4), 'norm')
    g = explain(model.cuda(), x, uniform(6, 4).cuda(), 'norm')
    assert g.evidence.device.type == 'cpu'
    torch.testing.assert_close(e.evidence, g.evidence, rtol=1e-3, atol=1e-4)
    with ablate(model, channels_of(uniform(6, 4), 0), 'norm'):
        model(x.cuda())


def test_compiled_models():
    model = toy()
    compiled = torch.compile(model, backend='eager')
    compiled(A)  # its code knows of no hook
    with ablate(compiled, [0], '0'):
        assert compiled(A)[0].tolist() == [0.5, 0.5]
    assert compiled(A)[0].tolist() == [4.5, 0.5]
    assert explain(compiled, A, P[:3], '0', k=1).evidence[0].item() == 4
    torch._dynamo.reset()


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'swin_tiny_patch4_window7_224'])
def test_models_of_timm(name):
    timm = pytest.importorskip('timm')
    sizes = dict(vit=dict(img_size=64), swin=dict(img_size=64, window_size=2)).get(name.split('_')[0], {})
    model = timm.create_model(name, num_classes=5, **sizes).eval()
    x = torch.randn(2, 3, 64, 64)
    c = next(M.shape[1] for *_, M in layer_batches(model, [x]))
    e = explain(model, x, uniform(c, 5), k=4)
    assert e.channels.shape == (2, 4) and e.evidence.isfinite().all() and e.share.sum() > 0
    before = model(x)
    with ablate(model, e.channels[0]):
        assert not torch.allclose(model(x)[0], before[0], atol=1e-4)
    assert torch.equal(model(x), before)


def test_models_of_transformers():
    transformers = pytest.importorskip('transformers')
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=4
    )
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = dict(input_ids=torch.randint(5, 60, (3, 6)), attention_mask=torch.ones(3, 6, dtype=torch.long))
    e = explain(model, inputs, uniform(16, 4), k=3)
    assert e.channels.shape == (3, 3) and e.maps.shape == (3, 3, 6) and e.logit.shape == (3,)
    with ablate(model, range(16)):
        out = model(**inputs).logits
    torch.testing.assert_close(out, out[:1].expand(3, 4))  # nothing of the texts is left


# --- data through a layer, strongest images, the figure


def test_each_module_returns_to_its_own_mode():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    model[0].eval()
    with pytest.raises(KeyError):
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError
    assert [m.training for m in model.modules()] == [True, False, True, True]


def test_layer_batches():
    model = toy().train()
    (x, y, out, M), (_, none, _, _) = layer_batches(model, [(A, Y), A], '0')
    assert torch.equal(M, A) and y is Y and none is None and torch.equal(out, model(A)) and not out.requires_grad
    assert model.training and not hooks(model)
    rows = layer_batches(model, [A, A], '0')
    next(rows)
    rows.close()
    assert model.training and not hooks(model)


def test_strongest_images_do_not_depend_on_the_batches():
    model, x, y = Residual().eval(), torch.rand(23, 3, 8, 8), torch.arange(23) % 4
    whole = strongest_images(model, [(x, y)], [4, 1], 'norm', k=5)
    parts = strongest_images(model, list(zip(x.split(4), y.split(4))), [4, 1], 'norm', k=5)
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)
    M = torch.cat([m for *_, m in layer_batches(model, [x], 'norm')])
    torch.testing.assert_close(whole.strength, M[:, [4, 1]].T.sort(1, descending=True).values[:, :5])
    assert torch.equal(whole.images[0, 0], x[M[:, 4].argmax()]) and torch.equal(whole.labels, y[whole.indices])
    few = strongest_images(model, [x[:2]], 3, 'norm', k=5)
    assert few.images.shape == (1, 2, 3, 8, 8) and (few.labels == -1).all()
    with pytest.raises(ValueError, match='no channel 6'):
        strongest_images(model, [x], [6], 'norm')
    with pytest.raises(ValueError, match='is empty'):
        strongest_images(model, [], [0], 'norm')
    mask = torch.arange(6) == 3
    assert strongest_images(model, [x], mask, 'norm').channels.tolist() == [3]
    with pytest.raises(ValueError, match="mask of 4, layer 'norm' has 6"):
        strongest_images(model, [x], mask[:4], 'norm')


def test_an_empty_batch_has_an_empty_explanation():
    model = Residual().eval()
    e = explain(model, torch.rand(0, 3, 8, 8), uniform(6, 4), 'norm', k=2)
    assert e.channels.shape == (0, 2) and e.maps.shape[:2] == (0, 2) and e.in_words() == []


def test_a_target_by_its_name_is_refused():
    with pytest.raises(ValueError, match="one class for each of the 2 inputs, got 'cat'"):
        explain(Residual().eval(), torch.rand(2, 3, 8, 8), uniform(6, 4), 'norm', target='cat')


@pytest.mark.parametrize(
    'make, layer, shape, sizes',
    [
        (Residual, 'norm', (3, 3, 8, 8), (6, 4)),
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(12, 2)), '1', (3, 3, 2, 2), (12, 2)),
    ],
)
def test_figure(make, layer, shape, sizes, tmp_path):
    pytest.importorskip('matplotlib')
    model, x = make().eval(), torch.rand(shape)
    e = explain(model, x, uniform(*sizes), layer, k=3)
    examples = strongest_images(model, [x], e.channels[1], layer, k=2)
    names = ['$x_1', '_b$', '$\\frac$', 'ä{'][: sizes[1]]
    fig = plot_explanation(e, x, names, examples, i=1)
    fig.savefig(tmp_path / 'f.png')
    assert len(fig.axes) == 3 * 4
    assert len(plot_explanation(e, x).axes) == 3 * 2
    with pytest.raises(ValueError, match='i must be from 0 to 2'):
        plot_explanation(e, x, i=3)


def test_maps_of_tokens_become_squares():
    pytest.importorskip('matplotlib')

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.patches = Tokens(), nn.Conv2d(3, 5, 4, 4)

        def forward(self, x):
            return self.tokens(self.patches(x).flatten(2).transpose(1, 2))

    model, x = Images().eval(), torch.rand(2, 3, 8, 8)
    fig = plot_explanation(explain(model, x, uniform(8, 3), 'tokens.encoder', k=2), x)
    assert fig.axes[1].images[1].get_array().shape == (2, 2)  # four patches, without the class token
