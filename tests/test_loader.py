"The device-resident loader: augmentation, seeds, exact resumption, normalisation, and its life within fastai"

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('fastai')
transforms = pytest.importorskip('torchvision.transforms')
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SuggestionMethod
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy
from torchvision.transforms import functional as TF

from gini_loss.datasets import find_duplicates, load_cifar100, read_images, split_train_valid
from gini_loss.loader import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    DeviceLoader,
    ImageDataset,
    channel_statistics,
    cifar100_dls,
    crop_flip,
    device_dls,
    rotate,
)

CIFAR100 = (CIFAR100_MEAN, CIFAR100_STD)


def make_set(n=60, c=3, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(n) % c


def make_cifar(root, n_train, n_test):
    "The layout of CIFAR-100 with four classes"
    for split, n in (('train', n_train), ('test', n_test)):
        images = make_set(4 * n, seed=n)[0].permute(0, 2, 3, 1).numpy()
        for k, name in enumerate(('trees/oak', 'trees/birch', 'fish/shark', 'fish/ray')):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(images[k * n + i]).save(root / split / name / f'{i:03d}.png')
    return root


def all_batches(dl):
    return [torch.cat(o) for o in zip(*dl)]


# ---------------------------------------------------------------- augmentation


def test_crop_flip_equals_torchvision_on_each_image():
    images, _ = make_set(40)
    g = torch.Generator().manual_seed(0)
    for padding in (0, 1, 4):
        top, left = torch.randint(0, 2 * padding + 1, (2, 40), generator=g)
        flip = torch.rand(40, generator=g) < 0.5
        batch = crop_flip(images, top, left, flip, padding)
        for image, out, t, l, f in zip(images, batch, top, left, flip):
            expected = TF.crop(TF.pad(image, padding), int(t), int(l), 32, 32)
            assert torch.equal(out, TF.hflip(expected) if f else expected)


def test_crop_flip_rectangles():
    images = make_set(6)[0][:, :, :20]
    top, left, flip = (
        torch.tensor([0, 2, 4, 1, 0, 4]),
        torch.tensor([4, 0, 2, 1, 0, 4]),
        torch.tensor([True, False] * 3),
    )
    for i, out in enumerate(crop_flip(images, top, left, flip, 2)):
        expected = TF.crop(TF.pad(images[i], 2), int(top[i]), int(left[i]), 20, 32)
        assert torch.equal(out, TF.hflip(expected) if flip[i] else expected)


def test_rotate_equals_torchvision():
    images = make_set(4)[0].float()
    for degrees in (0.0, 90.0, -17.0, 33.0):
        expected = TF.rotate(images, degrees, interpolation=TF.InterpolationMode.BILINEAR)
        torch.testing.assert_close(rotate(images, torch.full((4,), degrees)), expected, atol=0.05, rtol=0)
    wide = make_set(4)[0][:, :, :20].float()
    torch.testing.assert_close(
        rotate(wide, torch.full((4,), 25.0)),
        TF.rotate(wide, 25.0, interpolation=TF.InterpolationMode.BILINEAR),
        atol=0.05,
        rtol=0,
    )


def test_statistics_agree_with_the_stock_pipeline():
    "Mean and mean square of each pixel, over many draws of one image, against torchvision's transforms."
    n, image = 4000, make_set(1)[0][0]
    dl = DeviceLoader(
        (image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64)), bs=n, augment=True, normalize=False, seed=3
    )
    ours = dl.one_batch()[0]
    torch.manual_seed(0)
    stock = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ConvertImageDtype(torch.float32),
        ]
    )
    theirs = torch.stack([stock(image) for _ in range(n)])
    for f in (lambda x: x, torch.square):
        a, b = f(ours), f(theirs)
        z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / n).sqrt()
        assert z.abs().max() < 5.5 and 0.8 < z.std() < 1.2  # 3,072 pixels, each a standard normal if the two agree


def test_each_of_the_162_views_is_equally_likely_and_drawn_per_image():
    n = 16200  # 100 for each of 81 crops × 2 flips
    dl = DeviceLoader(
        (torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)), augment=True, seed=1
    )
    top, left, flip, _ = dl.draws(0)
    counts = torch.bincount(top * 18 + left * 2 + flip, minlength=162)
    chi2 = ((counts - n / 162) ** 2 / (n / 162)).sum()
    assert len(counts) == 162 and 161 - 5 * (2 * 161) ** 0.5 < chi2 < 161 + 5 * (2 * 161) ** 0.5
    for d in (top, left, flip):  # neighbours are uncorrelated: no draw is shared by a batch
        d = d.double() - d.double().mean()
        assert abs((d[1:] * d[:-1]).mean() / d.var()) < 5 / n**0.5


def test_a_view_of_every_image_is_a_crop_of_that_image():
    images, labels = make_set(30)
    x, y = DeviceLoader((images, labels), bs=30, augment=True, normalize=False).one_batch()
    views = (x * 255).round().byte()
    for image, view in zip(images, views):
        padded = TF.pad(image, 4)
        crops = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(view, c) or torch.equal(view, c.flip(-1)) for c in crops)


# ---------------------------------------------------------------- loader: output


def test_batches_hold_the_images():
    images, labels = make_set(25)
    dl = DeviceLoader((images, labels), bs=10, normalize=CIFAR100)
    x, y = all_batches(dl)
    expected = TF.normalize(images / 255, CIFAR100_MEAN, CIFAR100_STD)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y, labels) and y.dtype == torch.int64 and x.dtype == torch.float32
    assert [len(b[1]) for b in dl] == [10, 10, 5] and len(dl) == 3 and dl.bs == 10 and dl.n == 25
    drop = dl.new(drop_last=True)
    assert [len(b[1]) for b in drop] == [10, 10] and len(drop) == 2
    plain = dl.new(normalize=False).one_batch()[0]
    torch.testing.assert_close(plain, images[:10] / 255)
    x = dl.new(dtype=torch.bfloat16, channels_last=True).one_batch()[0]
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dl.decode(dl.one_batch())[0], images[:10])


def test_shuffling_holds_each_image_once():
    images, labels = make_set(64)
    dl = DeviceLoader((images, labels), bs=10, shuffle=True, normalize=False)
    x, y = all_batches(dl)
    assert not torch.equal(y, labels)
    assert find_duplicates((x * 255).round().byte(), images).shape == (64, 2)
    assert torch.equal(labels[torch.tensor(dl.new().get_idxs())], y)


# ---------------------------------------------------------------- loader: whose mean and deviation


def test_statistics_of_the_images_themselves():
    images = make_set(50)[0] // 5
    mean, std = channel_statistics(images)
    exact = (images.double() / 255).flatten(2).transpose(0, 1).flatten(1)
    assert np.allclose(mean, exact.mean(1), atol=1e-12) and np.allclose(std, exact.std(1, correction=0), atol=1e-12)
    assert np.allclose(channel_statistics(images.repeat(30, 1, 1, 1)), (mean, std), atol=1e-12)  # more than one portion
    x = all_batches(DeviceLoader((images, torch.arange(50)), bs=16))[0]
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert channel_statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))
    assert channel_statistics(images[:0]) == ((0.0,) * 3, (1.0,) * 3)


def test_every_loader_takes_the_statistics_of_the_training_images():
    train, valid = make_set(40), make_set(20, seed=1)
    dls = device_dls((train[0] // 4, train[1]), (valid[0] // 2, valid[1]), bs=10, device='cpu')
    expected = channel_statistics(train[0] // 4)
    assert (dls.train.mean, dls.train.std) == (dls.valid.mean, dls.valid.std) == expected
    assert (dls.train.new().mean, dls.valid.new(ImageDataset(*valid)).std) == expected
    torch.testing.assert_close(
        all_batches(dls.valid)[0], TF.normalize((valid[0] // 2) / 255, *expected), atol=1e-5, rtol=1e-5
    )
    plain = device_dls(train, valid, bs=10, device='cpu', normalize=False)
    torch.testing.assert_close(all_batches(plain.valid)[0], valid[0] / 255)
    named = device_dls(train, valid, bs=10, device='cpu', normalize=CIFAR100)
    torch.testing.assert_close(
        all_batches(named.valid)[0], TF.normalize(valid[0] / 255, *CIFAR100), atol=1e-5, rtol=1e-5
    )


def test_grey_images_have_one_mean():
    grey = make_set(10)[0][:, :1]
    dl = DeviceLoader((grey, torch.arange(10)), bs=10)
    assert len(dl.mean) == 1 and dl.new([Image.fromarray(grey[0, 0].numpy())]).one_batch()[0].shape == (1, 1, 32, 32)


def test_old_arguments_mean_and_std_warn_and_work():
    for make in (
        lambda **k: DeviceLoader(make_set(10), bs=5, **k),
        lambda **k: device_dls(make_set(10), make_set(10), bs=5, device='cpu', **k).valid,
    ):
        with pytest.warns(DeprecationWarning, match='normalize='):
            dl = make(mean=[0.1] * 3, std=[0.5] * 3)
        assert (dl.mean, dl.std) == ((0.1,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    'pair', [(0, 1), ((0,), (1,)), ((0,) * 3, (1, 1, 0)), ((0,) * 3, (1,) * 3, 2), 'no', ((125,) * 3, (60,) * 3)]
)
def test_statistics_that_do_not_fit_are_refused(pair):
    with pytest.raises(ValueError, match='normalize'):
        DeviceLoader(make_set(10), normalize=pair)


# ---------------------------------------------------------------- loader: seed, state


def train_loader(seed=0, **kwargs):
    return DeviceLoader(make_set(50), bs=8, shuffle=True, augment=True, rotation=10.0, seed=seed, **kwargs)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_seed_pairs_loaders_and_epochs_differ():
    a, b, c = train_loader(), train_loader(), train_loader(1)
    epochs = [all_batches(a) for _ in range(3)]
    for e in epochs:
        assert same(e, all_batches(b))
    assert not same(epochs[0], epochs[1]) and not same(epochs[0], all_batches(c))
    b.set_epoch(1)
    assert same(epochs[1], all_batches(b)) and same(epochs[2], all_batches(b))


def test_order_and_draws_each_change_with_epoch_and_seed():
    dl, other = train_loader(), train_loader(1)
    orders = [dl.get_idxs(), dl.set_epoch(1) or dl.get_idxs(), other.get_idxs()]
    assert all(sorted(o) == list(range(50)) for o in orders) and orders[0] != orders[1] and orders[0] != orders[2]
    for a, b, c in zip(dl.draws(0), dl.draws(1), other.draws(0)):
        assert not torch.equal(a, b) and not torch.equal(a, c)


def test_global_generators_play_no_part():
    dl = train_loader()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = all_batches(train_loader())
    dl.one_batch(), dl.new()
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    assert same(first, all_batches(dl))


def test_augmentation_belongs_to_the_image_not_to_its_batch():
    a, b = (train_loader().new(bs=bs) for bs in (8, 50))
    assert same(all_batches(a), all_batches(b))
    plain = train_loader().new(shuffle=False)  # order and augmentation are separate streams
    idx = torch.tensor(train_loader().get_idxs())
    assert torch.equal(all_batches(plain)[0][idx], all_batches(a.new())[0])


@pytest.mark.parametrize('stop', range(0, 15))
def test_exact_resumption(stop):
    whole = train_loader()
    expected = [b for _ in range(3) for b in whole]
    dl, seen, state = train_loader(), [], None
    if stop == 0:
        state = dl.state_dict()
    while state is None:
        for b in dl:
            seen.append(b)
            if len(seen) == stop:
                state = dl.state_dict()
                break
    state = pickle.loads(pickle.dumps(state))
    fresh = train_loader()
    fresh.load_state_dict(state)
    while len(seen) < len(expected):
        seen.extend(fresh)
    assert len(seen) == len(expected) and all(same(p, q) for p, q in zip(seen, expected))


def test_state_survives_looking():
    dl = train_loader()
    expected = dl.one_batch()
    assert same(expected, dl.one_batch()) and same(expected, next(iter(dl)))
    dl = train_loader()
    dl.one_batch()
    dl.new()
    dl.get_idxs()
    assert dl.state_dict() == train_loader().state_dict()


def test_epoch_broken_off_is_not_continued():
    dl, whole = train_loader(), train_loader()
    for i, _ in enumerate(dl):
        if i == 2:
            break
    all_batches(whole)
    assert same(all_batches(dl), all_batches(whole))


def test_state_of_another_loader_is_refused():
    state = train_loader().state_dict()
    with pytest.raises(ValueError, match='seed=0 instead of 1'):
        train_loader(1).load_state_dict(state)
    with pytest.raises(ValueError, match='bs=8 instead of 9'):
        train_loader().new(bs=9).load_state_dict(state)
    with pytest.raises(ValueError, match='missing'):
        train_loader().load_state_dict({'epoch': 1})


def test_loader_errors():
    images, labels = make_set(10)
    with pytest.raises(TypeError, match='uint8'):
        DeviceLoader((images.float(), labels))
    with pytest.raises(ValueError, match='shape'):
        DeviceLoader((images[0], labels))
    with pytest.raises(ValueError, match='10 images but 9'):
        DeviceLoader((images, labels[:9]))
    with pytest.raises(TypeError, match='integers'):
        DeviceLoader((images, labels.float()))
    with pytest.raises(ValueError, match=r'0\.\.1, got 0\.\.2'):
        DeviceLoader((images, labels), vocab=['a', 'b'])
    with pytest.raises(ValueError, match='0..2, got -1'):
        DeviceLoader((images, labels - 1), vocab=['a', 'b', 'c'])
    for kwargs, match in (
        (dict(bs=0), 'bs'),
        (dict(bs=2.0), 'bs'),
        (dict(bs=True), 'bs'),
        (dict(padding=-1), 'padding'),
        (dict(shard=(2, 1)), 'shard'),
        (dict(shard=(-1, 2)), 'shard'),
        (dict(vocab=['a'] * 3), 'must differ'),
        (dict(flip=1.5), 'flip'),
        (dict(rotation=-1), 'rotation'),
        (dict(bs=11, drop_last=True), 'no batch of 10'),
        (dict(seed=-1), 'seed'),
    ):
        with pytest.raises(ValueError, match=match):
            DeviceLoader((images, labels), **kwargs)
    with pytest.raises(TypeError, match='dtype'):
        DeviceLoader((images, labels), dtype=torch.int64)
    with pytest.raises(ValueError, match='epoch'):
        DeviceLoader((images, labels)).set_epoch(-1)
    with pytest.raises(ValueError, match='no batch'):
        DeviceLoader((images[:0], labels[:0])).one_batch()


def test_numbers_of_numpy_are_numbers():
    images, labels = make_set(10)
    dl = DeviceLoader((images, labels), bs=np.int64(4), padding=np.int32(1), seed=np.int64(0))
    assert len(dl) == 3 and {type(dl.state_dict()[name]) for name in ('bs', 'padding', 'seed')} == {int}


def test_shares_of_several_processes_are_the_batch():
    whole = all_batches(train_loader())
    for k in (2, 3):
        shares = [list(train_loader(shard=(i, k), drop_last=True)) for i in range(k)]
        for i, batch in enumerate(train_loader(drop_last=True)):
            for part, of_process in zip(range(k), shares):
                assert same([o[part::k] for o in batch], of_process[i])
    assert same(whole, all_batches(train_loader(shard=(0, 1))))
    assert train_loader(shard=(1, 2)).new().shard == (1, 2)
    dls = device_dls(make_set(50), make_set(9), bs=8, device='cpu', shard=(1, 2))
    assert len(dls.train.one_batch()[1]) == 4 and len(dls.valid.one_batch()[1]) == 8


# ---------------------------------------------------------------- within fastai


@pytest.fixture
def learn(tmp_path):
    dls = device_dls(
        make_set(50), make_set(23, seed=1), classes=['x', 'y', 'z'], bs=8, device='cpu', normalize=CIFAR100
    )
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3))
    learn = Learner(dls, model, metrics=accuracy, path=tmp_path)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])
    return learn


def test_learner_fits_and_predicts(learn, tmp_path):
    dls = learn.dls
    assert dls.c == 3 and list(dls.vocab) == ['x', 'y', 'z'] and dls.device == torch.device('cpu')
    assert len(dls.train) == 6 and len(dls.valid) == 3
    with learn.no_logging():
        learn.fit(2, 1e-3)
        assert learn.dls.train.epoch == 1
        assert len(learn.validate()) == 2
        learn.fit(1, 1e-3, cbs=MixUp())
    preds, targets = learn.get_preds()
    assert preds.shape == (23, 3) and torch.equal(targets, dls.valid.dataset.labels)
    with torch.no_grad():
        expected = learn.model.eval()(all_batches(dls.valid)[0]).softmax(1)
    torch.testing.assert_close(preds, expected)
    preds, targets = learn.get_preds(dl=dls.train)  # shuffled, last batch left out: all images, in order
    assert preds.shape == (50, 3) and torch.equal(targets, dls.train.dataset.labels)
    with learn.no_logging():
        assert learn.lr_find(show_plot=False, num_it=30, suggest_funcs=SuggestionMethod.Valley).valley > 0
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == 23


def test_files_and_photographs_are_resized_before_a_prediction(learn, tmp_path):
    "As `read_images` does, so that the network sees what it was trained on"
    pixels = make_set(12)[0].permute(0, 2, 3, 1).reshape(96, 128, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / 'photo.png')
    expected = learn.predict(torch.from_numpy(read_images([tmp_path / 'photo.png'], 32)[0]))[2]
    for photo in (tmp_path / 'photo.png', str(tmp_path / 'photo.png'), Image.open(tmp_path / 'photo.png')):
        torch.testing.assert_close(learn.predict(photo)[2], expected, rtol=0, atol=0)


def test_learner_exports_without_images(learn, tmp_path):
    with learn.no_logging():
        learn.fit(1)
    learn.export('model.pkl')
    assert (tmp_path / 'model.pkl').stat().st_size < 60_000  # 50 images alone are 154 kB
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path / 'model.pkl')
    image = make_set(1)[0][0]
    name, index, probabilities = loaded.predict(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert name == ['x', 'y', 'z'][index] and probabilities.shape == (3,)
    with torch.no_grad():
        expected = learn.model.eval()(TF.normalize(image / 255, CIFAR100_MEAN, CIFAR100_STD)[None]).softmax(1)[0]
    torch.testing.assert_close(probabilities, expected)


def test_training_is_the_same_after_resumption(tmp_path):
    def make():
        torch.manual_seed(0)
        dls = device_dls(make_set(48), make_set(16, seed=1), bs=8, device='cpu')
        learn = Learner(dls, nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3)), path=tmp_path)
        learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])
        return learn

    a, b = make(), make()
    with a.no_logging():
        a.fit(2, 1e-2)
        a.fit(2, 1e-2)
    with b.no_logging():
        b.fit(2, 1e-2)
    b.save('half')
    state = b.dls.train.state_dict()
    c = make()
    c.load('half')
    c.dls.train.load_state_dict(state)
    with c.no_logging():
        c.fit(2, 1e-2)
    for p, q in zip(a.model.parameters(), c.model.parameters()):
        assert torch.equal(p, q)


def test_show(learn):
    matplotlib = pytest.importorskip('matplotlib')
    matplotlib.use('Agg')
    learn.dls.show_batch()
    learn.dls.train.show_batch(unique=True, max_n=4)
    learn.show_results()
    assert len(learn.dls.valid.show_batch(show=False, max_n=5)) == 5


def test_names_with_dollar_signs_can_be_shown(learn):
    matplotlib = pytest.importorskip('matplotlib')
    matplotlib.use('Agg')
    dls = device_dls(make_set(6), make_set(6), classes=['$x_$', '$5', r'a$\\frac$b'], bs=6, device='cpu')
    dls.show_batch()
    matplotlib.pyplot.gcf().canvas.draw()


def test_the_third_loader_is_the_test_set():
    dls = device_dls(make_set(6), make_set(6), make_set(9), bs=6, device='cpu')
    assert dls.test is dls[2] and dls.test.n == 9
    assert not hasattr(device_dls(make_set(6), make_set(6), bs=6, device='cpu'), 'test')


def test_cifar100_dls_from_a_folder(tmp_path):
    dls = cifar100_dls(make_cifar(tmp_path, n_train=10, n_test=3), bs=6, device='cpu', per_class=2, seed=4)
    assert dls.c == 4 and list(dls.vocab) == ['birch', 'oak', 'ray', 'shark'] and dls.bs == 6
    assert (dls.train.n, dls.valid.n, dls.test.n) == (32, 8, 12) and dls[2] is dls.test
    assert dls.train.augment and dls.train.shuffle and not dls.valid.augment and not dls.valid.shuffle
    assert not dls.test.augment
    data = load_cifar100(tmp_path)
    assert torch.equal(dls.valid.dataset.images, data.train.images[split_train_valid(data.train.labels, 2, 4)[1]])
    other = cifar100_dls(tmp_path, bs=6, device='cpu', per_class=2, seed=5, split_seed=4)
    assert torch.equal(other.valid.dataset.images, dls.valid.dataset.images) and other.train.seed == 5
    assert (dls.train.mean, dls.test.std) == CIFAR100 and other.valid.mean == CIFAR100_MEAN
    assert cifar100_dls(tmp_path, bs=6, device='cpu', per_class=2, normalize=False).test.one_batch()[0].max() <= 1


# ---------------------------------------------------------------- the old name


def test_the_old_module_warns_and_gives_the_same_objects():
    import importlib
    import sys
    from gini_loss import datasets, loader

    sys.modules.pop('gini_loss.data', None)
    with pytest.warns(DeprecationWarning, match='gini_loss.datasets'):
        old = importlib.import_module('gini_loss.data')
    for name in old.__all__:
        assert getattr(old, name) is getattr(datasets, name, getattr(loader, name, None))
    names = '''
        ImageSet CIFAR100 CALTECH12 FolderSet load_cifar100 find_duplicates split_train_valid load_caltech12
        load_folder select_classes CIFAR100_MEAN CIFAR100_STD crop_flip rotate ImageDataset DeviceLoader device_dls
        cifar100_dls'''
    assert set(names.split()) <= set(old.__all__)


# ---------------------------------------------------------------- a device that is not the CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_batches_without_synchronising():
    cpu, gpu = train_loader(), train_loader(device='cuda')
    for (x, y), (x2, y2) in zip(cpu, gpu, strict=True):
        assert x2.is_cuda and torch.equal(y, y2.cpu())
        torch.testing.assert_close(x, x2.cpu(), atol=1e-3, rtol=1e-3)
    batches = iter(gpu)
    next(batches)  # the draws of the epoch are moved here
    torch.cuda.set_sync_debug_mode('error')
    try:
        list(batches)
    finally:
        torch.cuda.set_sync_debug_mode('default')


# ---------------------------------------------------------------- the real set


def test_real_cifar_dls_hold_no_validation_image_in_training(cifar100_folder):
    for seed in (0, 2):
        dls = cifar100_dls(seed=seed, device='cpu')
        assert (dls.train.n, dls.valid.n, dls.test.n) == (46_000, 4_000, 10_000) and dls.c == 100
        assert len(find_duplicates(dls.valid.dataset.images, dls.train.dataset.images)) == 0


def test_the_constants_describe_cifar(cifar100_folder):
    mean, std = channel_statistics(load_cifar100().train.images)
    assert np.allclose(mean, CIFAR100_MEAN, atol=1e-3) and np.allclose(std, CIFAR100_STD, atol=1e-3)
