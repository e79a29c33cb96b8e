"Saved networks: they load unchanged, and other files raise an error before memory is allocated"

import json
import pytest, torch
from torch import nn

pytest.importorskip('safetensors', reason="networks are kept in safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from gini_loss.models import cvt7, load_network, resnet17, resnet18, resnet50, save_network

NETWORKS = {'resnet17': (resnet17, 4), 'resnet18': (resnet18, 4), 'resnet50': (resnet50, 4), 'cvt7': (cvt7, 6)}


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / 'net.safetensors'
    save_network(path, resnet18(3, 4, 1), dict(arch='resnet18', width=4, in_channels=1), list('abc'))
    return path


def rewrite(path, change=lambda tensors: tensors, **texts):
    "Rewrite the file with other tensors or texts"
    with safe_open(str(path), 'pt') as f:
        metadata = f.metadata()
    metadata.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in texts.items()})
    save_file(change(load_file(path)), path, metadata={k: v for k, v in metadata.items() if v != 'gone'})


@pytest.mark.parametrize('name', NETWORKS)
def test_comes_back_as_it_was(name, tmp_path):
    build, width = NETWORKS[name]
    model = build(5, width=width)
    model(torch.rand(4, 3, 32, 32))  # moves the statistics of BatchNorm
    classes = ['ant', 'bee', '$c_1', 'λ', 'caf\udce9']
    save_network(tmp_path / 'n', model, dict(arch=name, width=width, mean=[0.1, 0.2, 0.3], note=None), classes)
    saved = load_network(tmp_path / 'n')
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(saved.model(x), model.eval()(x))
    assert saved.classes == classes and saved.config == dict(arch=name, width=width, mean=[0.1, 0.2, 0.3], note=None)
    assert not saved.model.training and saved.model.tap == model.tap
    saved.model.train()(x).sum().backward()  # it can be trained on
    assert all(p.grad is not None for p in saved.model.parameters())


@pytest.mark.parametrize('build, options', [(resnet17, dict(final_relu=False)), (resnet50, dict(dropout=0.4))])
def test_all_arguments_of_a_network_come_back(build, options, tmp_path):
    torch.manual_seed(0)
    model = build(5, width=4, **options).eval()
    save_network(tmp_path / 'n', model, dict(arch=build.__name__, width=4, seed=3, **options), list('abcde'))
    saved, x = load_network(tmp_path / 'n').model, torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(saved(x), model(x))
        assert (model(x).min() < 0) if build is resnet17 else saved.dropout.p == 0.4


class Positions(nn.Module):
    "Has a tensor and a buffer that are not in its state dict, and reads a number while it is built"

    def __init__(self, n, reads):
        super().__init__()
        self.register_buffer('index', torch.arange(4.0), persistent=False)
        self.shift = torch.full((4,), 2.0)
        self.rates = [x.item() for x in torch.linspace(0, 1, 3)] if reads else []
        self.fc = nn.Linear(4, n)

    def forward(self, x):
        return self.fc(x * self.index + self.shift)


@pytest.mark.parametrize('reads', [False, True])
def test_tensors_that_are_not_in_the_state_dict(reads, tmp_path):
    model = Positions(3, reads)
    save_network(tmp_path / 'n', model, {}, list('abc'))
    saved = load_network(tmp_path / 'n', build=lambda config, n: Positions(n, reads)).model
    x = torch.rand(2, 4)
    assert torch.equal(saved(x), model(x))
    with pytest.raises(ValueError, match="does not fit the network it describes: 'fc.weight'"):
        load_network(tmp_path / 'n', build=lambda config, n: Positions(n + 1, reads))


@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), nn.DataParallel], ids=['compile', 'dp'])
def test_a_wrapped_network_is_saved_without_its_wrapper(wrap, tmp_path):
    model = resnet18(3, 4).eval()
    save_network(tmp_path / 'n', wrap(model), dict(arch='resnet18', width=4), list('abc'))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / 'n').model(x), model(x))


def test_saving_leaves_the_model_alone(tmp_path):
    model = resnet18(3, 4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save_network(tmp_path / 'n', model, dict(arch='resnet18', width=4), list('abc'))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_network_of_your_own_with_shared_weights(tmp_path):
    def build(config, n):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, n))
        model[1].weight = model[0].weight
        return model

    model = build({}, 2)
    save_network(tmp_path / 'n', model, dict(kind='mine'), ['a', 'b'])
    torch.testing.assert_close(load_network(tmp_path / 'n', build).model(torch.ones(1, 3)), model(torch.ones(1, 3)))


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(config='gone'), 'configuration or its class names'),
        (dict(classes='gone'), 'configuration or its class names'),
        (dict(config='[1'), 'configuration or its class names'),
        (dict(classes='3'), 'configuration or its class names'),
        (dict(config=dict(arch='resnet18', width=4)), "'conv1.weight' has shape"),
        (dict(config=dict(arch='resnet99', width=4)), 'none of resnet17'),
        (dict(config=dict(width=4)), 'none of resnet17'),
        (dict(config=dict(arch='resnet18', width=10**9, in_channels=1)), 'net.safetensors'),
        (dict(config=dict(arch='resnet18', width='wide', in_channels=1)), 'width must be an integer'),
        (dict(classes=['a']), 'at least 2'),
        (dict(classes=list('abcd')), "'fc.weight' has shape"),
    ],
)
def test_what_does_not_fit_is_named(kept, change, words):
    rewrite(kept, **change)
    with pytest.raises(ValueError, match=words) as e:
        load_network(kept)
    assert 'net.safetensors' in str(e.value)


def test_tensors_that_are_missing_or_too_many(kept):
    rewrite(kept, lambda t: {k: v for k, v in t.items() if k != 'fc.bias'})
    with pytest.raises(ValueError, match="'fc.bias' has shape None, expected"):
        load_network(kept)
    rewrite(kept, lambda t: {**t, 'fc.bias': torch.zeros(3), 'odd': torch.zeros(2)})
    with pytest.raises(ValueError, match="'odd' has shape"):
        load_network(kept)


def test_damaged_and_foreign_files(kept, tmp_path):
    data = kept.read_bytes()
    for size in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        kept.write_bytes(data[:size])
        with pytest.raises(ValueError, match='cannot be read as safetensors'):
            load_network(kept)
    torch.save(resnet18(3, 4, 1).state_dict(), kept)
    with pytest.raises(ValueError, match='cannot be read as safetensors'):
        load_network(kept)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / 'nowhere')


def test_bad_arguments(tmp_path):
    model = resnet18(3, 4)
    with pytest.raises(TypeError, match='list of names'):
        save_network(tmp_path / 'n', model, {}, 'abc')
    with pytest.raises(TypeError, match='config must hold'):
        save_network(tmp_path / 'n', model, dict(x=object()), list('abc'))
    assert not list(tmp_path.iterdir())


def test_an_earlier_file_stays_until_the_new_one_is_whole(kept, tmp_path):
    before = kept.read_bytes()
    with pytest.raises(OSError):
        save_network(kept / 'n', resnet18(3, 4, 1), {}, list('abc'))  # below a file
    assert kept.read_bytes() == before
    save_network(kept, resnet18(3, 4, 1), dict(arch='resnet18', width=4, in_channels=1), list('abc'))
    assert kept.read_bytes() != before and [o.name for o in tmp_path.iterdir()] == ['net.safetensors']


def test_a_state_that_is_not_a_tensor(tmp_path):
    class Noted(torch.nn.Linear):
        def get_extra_state(self):
            return {'note': 1}

    with pytest.raises(TypeError, match="'_extra_state' in the state dict is dict, expected a tensor"):
        save_network(tmp_path / 'a.safetensors', Noted(2, 2), {}, ['a', 'b'])
    assert not list(tmp_path.iterdir())
