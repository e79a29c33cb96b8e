"The data sets, their cache and the device-resident loader, on tiny folders made on the spot; the real sets where they are present."
import os, pickle, random, warnings, zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip('fastai')
from torchvision import transforms
from torchvision.transforms import functional as TF
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.mixup import MixUp
from fastai.data.external import fastai_path
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.metrics import accuracy

import gini_loss.data as data_module
from gini_loss.data import (CALTECH12, CIFAR100_MEAN, CIFAR100_STD, DeviceLoader, cifar100_dls, crop_flip, device_dls,
    find_duplicates, load_caltech12, load_cifar100, load_folder, rotate, select_classes, split_train_valid)

has_cifar = (fastai_path('data')/'cifar100'/'train').is_dir()
has_caltech = (fastai_path('data')/'caltech101'/'101_ObjectCategories').is_dir()
needs_cifar = pytest.mark.skipif(not has_cifar, reason="CIFAR-100 is not in fastai's data folder")
needs_caltech = pytest.mark.skipif(not has_caltech, reason="Caltech 101 is not in fastai's data folder")

CLASSES = {'trees': ['oak', 'birch'], 'fish': ['shark', 'ray']}

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def save_image(path, seed, size=(32, 32), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == 'RGB' else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)

def make_cifar(root, n_train=6, n_test=2, reverse=False):
    jobs = [(root/split/sup/name/f'{name}_{i:03d}.png', zlib.crc32(f'{split}{name}{i}'.encode()))
            for split, n in (('train', n_train), ('test', n_test)) for sup, names in CLASSES.items() for name in names for i in range(n)]
    for path, seed in (reversed(jobs) if reverse else jobs): save_image(path, seed)
    return root

def make_set(n=60, c=3, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(n) % c

def all_batches(dl): return [torch.cat(o) for o in zip(*dl)]

# ---------------------------------------------------------------- CIFAR-100 from a folder

def test_cifar_layout(tmp_path):
    data = load_cifar100(make_cifar(tmp_path))
    assert data.classes == ['birch', 'oak', 'ray', 'shark']
    assert data.superclasses == ['fish', 'trees'] and data.superclass_of.tolist() == [1, 1, 0, 0]
    images, labels = data.train
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.tolist() == sorted([0, 1, 2, 3]*6)
    assert data.test.images.shape == (8, 3, 32, 32)
    expected = np.asarray(Image.open(tmp_path/'train'/'trees'/'oak'/'oak_002.png')).transpose(2, 0, 1)
    assert torch.equal(images[6 + 2], torch.from_numpy(expected.copy()))

def test_order_of_files_does_not_matter(tmp_path):
    a, b = (load_cifar100(make_cifar(tmp_path/str(r), reverse=r)) for r in (False, True))
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.labels, b.test.labels)

def test_cifar_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='train/<superclass>'): load_cifar100(tmp_path/'nowhere')
    root = make_cifar(tmp_path/'size')
    save_image(root/'train'/'trees'/'oak'/'wrong.png', 0, size=(20, 32))
    with pytest.raises(ValueError, match=r'wrong.png \(20×32 pixels'): load_cifar100(root)
    root = make_cifar(tmp_path/'broken')
    (root/'test'/'fish'/'ray'/'broken.png').write_bytes(b'not an image')
    with pytest.raises(ValueError, match='broken.png'): load_cifar100(root)
    root = make_cifar(tmp_path/'differ')
    save_image(root/'train'/'fish'/'cod'/'cod.png', 0)
    with pytest.raises(ValueError, match='same classes.*cod'): load_cifar100(root)
    root = make_cifar(tmp_path/'empty')
    for f in (root/'train'/'fish'/'ray').iterdir(): f.unlink()
    with pytest.raises(ValueError, match='No .png images in .*ray'): load_cifar100(root)

# ---------------------------------------------------------------- cache

@pytest.fixture
def reads(monkeypatch):
    "Counts how often the images are read from their files."
    calls, original = [], data_module._read_images
    monkeypatch.setattr(data_module, '_read_images', lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls

def test_cache_is_used_and_equal(tmp_path, reads):
    make_cifar(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        first, n = load_cifar100(tmp_path), len(reads)
        second = load_cifar100(tmp_path)
    assert n == 2 and len(reads) == 2
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.test.labels, second.test.labels)
    assert [o.name for o in tmp_path.iterdir() if o.is_file()] == ['cifar100.npz']  # no temporary file is left

@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'garbage'])
def test_damaged_cache_is_rebuilt(tmp_path, reads, damage):
    first = load_cifar100(make_cifar(tmp_path))
    cache = tmp_path/'cifar100.npz'
    raw = bytearray(cache.read_bytes())
    if damage == 'flip':  # one bit of one pixel: only a checksum can tell
        at = raw.find(first.train.images.numpy().tobytes()) + 5000
        assert at > 5000
        raw[at] ^= 1
    cache.write_bytes(dict(flip=raw, truncate=raw[:len(raw)//2], empty=b'', garbage=b'x'*1000)[damage])
    with pytest.warns(UserWarning, match='cannot be read'): second = load_cifar100(tmp_path)
    assert len(reads) == 4 and torch.equal(first.train.images, second.train.images)
    load_cifar100(tmp_path)
    assert len(reads) == 4

def test_every_single_bit_flip_of_the_images_is_seen(tmp_path):
    cache, calls = tmp_path/'cache.npz', []
    def build():
        calls.append(1)
        return dict(images=np.arange(300, dtype=np.uint8))
    data_module._cached(cache, [], build)
    raw = cache.read_bytes()
    start = raw.find(np.arange(256, dtype=np.uint8).tobytes())
    for at in random.Random(0).sample(range(start, start + 300), 20):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        cache.write_bytes(damaged)
        n = len(calls)
        with pytest.warns(UserWarning): data_module._cached(cache, [], build)
        assert len(calls) == n + 1

def test_changed_folder_rebuilds(tmp_path, reads):
    assert len(load_cifar100(make_cifar(tmp_path)).train.labels) == 24
    save_image(tmp_path/'train'/'fish'/'ray'/'ray_new.png', 7)
    os.utime(tmp_path/'train'/'fish'/'ray', ns=(1, 1))  # coarse clocks would not tell otherwise
    assert len(load_cifar100(tmp_path).train.labels) == 25 and len(reads) == 4

def test_unwritable_folder_works_with_a_warning(tmp_path, monkeypatch):
    make_cifar(tmp_path)
    def refuse(*args, **kwargs): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(data_module.tempfile, 'NamedTemporaryFile', refuse)
    with pytest.warns(UserWarning, match='cannot be written'): data = load_cifar100(tmp_path)
    assert len(data.train.labels) == 24 and not (tmp_path/'cifar100.npz').exists()

def test_interrupted_write_leaves_no_cache(tmp_path, monkeypatch):
    make_cifar(tmp_path)
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(data_module.np, 'savez', full)
    with pytest.warns(UserWarning, match='No space left'): load_cifar100(tmp_path)
    assert not [o for o in tmp_path.iterdir() if o.is_file()]

# ---------------------------------------------------------------- split

def test_split_counts_and_purity():
    labels = torch.arange(100).repeat_interleave(500)
    train, valid = split_train_valid(labels)
    assert (len(train), len(valid)) == (46_000, 4_000) and train.dtype == valid.dtype == torch.int64
    assert labels[valid].bincount().tolist() == [40]*100
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(50_000))
    assert torch.equal(train, train.sort().values) and torch.equal(valid, valid.sort().values)
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert torch.equal(split_train_valid(labels)[1], valid)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    assert not torch.equal(split_train_valid(labels, seed=1)[1], valid)
    assert torch.equal(split_train_valid(labels.tolist())[1], valid) and torch.equal(split_train_valid(labels.numpy())[1], valid)

def test_split_does_not_depend_on_how_classes_are_interleaved():
    labels = torch.arange(5).repeat_interleave(30)
    name = torch.arange(150)
    mixed = labels[torch.randperm(150, generator=torch.Generator().manual_seed(1))]
    mixed_name = torch.empty_like(name)
    for k in range(5): mixed_name[mixed == k] = name[labels == k]  # each class keeps its own sequence
    assert torch.equal(mixed_name[split_train_valid(mixed, 5)[1]].sort().values, split_train_valid(labels, 5)[1])

def test_split_keeps_copies_in_training():
    images, labels = make_set(60, 3)
    for i in range(0, 15, 3): images[i + 30] = images[i]  # five images of class 0 are there twice
    def leaks(seed, **kwargs):
        train, valid = split_train_valid(labels, 4, seed, **kwargs)
        assert len(valid) == 12
        return len(find_duplicates(images[valid], images[train]))
    assert sum(leaks(seed) for seed in range(10)) > 0
    assert sum(leaks(seed, images=images) for seed in range(10)) == 0
    with pytest.raises(ValueError, match='Class 0 has 20 images, 0 of them'): split_train_valid(labels, per_class=4, images=torch.zeros_like(images))

def test_split_errors():
    with pytest.raises(ValueError, match='Class 1 has 3'): split_train_valid([0]*10 + [1]*3, per_class=3)
    with pytest.raises(ValueError, match='per_class'): split_train_valid([0, 1], per_class=0)
    with pytest.raises(TypeError, match='integers'): split_train_valid([0., 1.])
    with pytest.raises(ValueError, match='one dimension'): split_train_valid(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match='seed'): split_train_valid([0, 1], seed=.5)
    with pytest.raises(ValueError, match='seed'): split_train_valid([0, 1], seed=-1)
    with pytest.raises(ValueError, match='3 images but 4 labels'): split_train_valid([0]*4, 1, images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8))

def test_find_duplicates():
    images, _ = make_set(20)
    images[7] = images[11] = images[3]
    assert find_duplicates(images).tolist() == [[3, 7], [3, 11]]
    others = make_set(5, seed=1)[0]
    assert find_duplicates(images, others).shape == (0, 2)
    others[2] = others[4] = images[19]
    assert find_duplicates(images, others).tolist() == [[19, 2], [19, 4]]
    others[2, 0, 0, 0] ^= 1
    assert find_duplicates(images, others).tolist() == [[19, 4]]
    with pytest.raises(TypeError, match='uint8'): find_duplicates(images.float())

# ---------------------------------------------------------------- Caltech 101

@pytest.fixture(scope='module')
def caltech(tmp_path_factory):
    root = tmp_path_factory.mktemp('caltech')
    base = root/'caltech101'/'101_ObjectCategories'
    (base/'BACKGROUND_Google').mkdir(parents=True)
    for k, (name, (label, n)) in enumerate(CALTECH12.items()):
        for i in range(n):  # each image is one flat colour that tells its class; every seventh one is grey
            path, grey = base/name/f'image_{i + 1:04d}.jpg', i % 7 == 0
            path.parent.mkdir(exist_ok=True)
            Image.new('L' if grey else 'RGB', (60, 40), 20*k if grey else (20*k,)*3).save(path)
    for other in ('crocodile_head', 'windsor_chair', 'zebra'): save_image(base/other/'image_0001.jpg', 0)
    return root

def test_caltech(caltech):
    images, labels = load_caltech12(caltech, size=16)
    assert images.shape == (781, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    for k, (name, (label, n)) in enumerate(CALTECH12.items()):
        assert (labels == label).sum() == n and (images[labels == label].float() - 20*k).abs().max() <= 1
    again = load_caltech12(caltech, size=16)
    assert torch.equal(images, again.images) and torch.equal(labels, again.labels)
    assert load_caltech12(caltech, size=8).images.shape[-1] == 8  # another size has a cache of its own

def test_caltech_errors(caltech, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'download=True'): load_caltech12(tmp_path)
    assert not (tmp_path/'caltech101').exists()  # looking must not leave an empty folder behind
    base = caltech/'caltech101'/'101_ObjectCategories'
    last = base/'lobster'/'image_0041.jpg'
    kept = last.read_bytes()
    last.unlink()
    try:
        with pytest.raises(ValueError, match='Expected 781 .* found 780 .*lobster: 40 instead of 41'): load_caltech12(caltech)
    finally: last.write_bytes(kept)

def test_resizing_averages(tmp_path):
    "A fine checkerboard shrinks to grey; without antialiasing it would stay black or white."
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path/'board.png')
    image = data_module._read_images([tmp_path/'board.png'], 32)[0]
    assert abs(image.astype(float) - 127.5).max() < 16

# ---------------------------------------------------------------- any folder, any classes

def test_load_folder(tmp_path):
    for name, n, mode in (('b', 5, 'RGB'), ('a', 3, 'L')):
        for i in range(n): save_image(tmp_path/name/f'{i}.png', i, size=(40, 24), mode=mode)
    images, labels, classes = load_folder(tmp_path, size=16)
    assert images.shape == (8, 3, 16, 16) and classes == ['a', 'b'] and labels.tolist() == [0]*3 + [1]*5
    assert torch.equal(images[:3, 0], images[:3, 1])  # grey
    few = load_folder(tmp_path, size=16, max_per_class=2)
    assert few.labels.tolist() == [0, 0, 1, 1] and len(find_duplicates(few.images, images)) == 4
    assert torch.equal(few.images, load_folder(tmp_path, size=16, max_per_class=2).images)

def test_load_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): load_folder(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='0 class folders'): load_folder(tmp_path)
    save_image(tmp_path/'a'/'1.png', 0)
    with pytest.raises(NotADirectoryError): load_folder(tmp_path/'a'/'1.png')
    with pytest.raises(ValueError, match='1 class folders'): load_folder(tmp_path)
    (tmp_path/'b').mkdir()
    with pytest.raises(ValueError, match='No images in .*b'): load_folder(tmp_path)
    (tmp_path/'b'/'broken.jpg').write_bytes(b'\xff\xd8\xff broken')
    with pytest.raises(ValueError, match='1 of 2 images .*broken.jpg'): load_folder(tmp_path)
    with pytest.raises(ValueError, match='size'): load_folder(tmp_path, size=0)
    with pytest.raises(ValueError, match='max_per_class'): load_folder(tmp_path, max_per_class=0)

def test_select_classes():
    images, labels = make_set(60, 5)
    small = select_classes(images, labels, [3, 1])
    assert len(small.labels) == 24 and small.labels.bincount().tolist() == [12, 12]
    for i in range(24):
        j = (images == small.images[i]).flatten(1).all(1).nonzero().item()
        assert labels[j] == [3, 1][small.labels[i]]
    few = select_classes(images, labels, [3, 1], per_class=4, seed=1)
    assert few.labels.bincount().tolist() == [4, 4] and torch.equal(few.images, select_classes(images, labels, [3, 1], 4, seed=1).images)
    with pytest.raises(ValueError, match='Class 9 has 0'): select_classes(images, labels, [9])
    with pytest.raises(ValueError, match='Class 3 has 12 images, 13'): select_classes(images, labels, [3], per_class=13)
    with pytest.raises(ValueError, match='different'): select_classes(images, labels, [3, 3])

# ---------------------------------------------------------------- augmentation

def test_crop_flip_equals_torchvision_on_each_image():
    images, _ = make_set(40)
    g = torch.Generator().manual_seed(0)
    for padding in (0, 1, 4):
        top, left = torch.randint(0, 2*padding + 1, (2, 40), generator=g)
        flip = torch.rand(40, generator=g) < .5
        batch = crop_flip(images, top, left, flip, padding)
        for image, out, t, l, f in zip(images, batch, top, left, flip):
            expected = TF.crop(TF.pad(image, padding), int(t), int(l), 32, 32)
            assert torch.equal(out, TF.hflip(expected) if f else expected)

def test_crop_flip_rectangles():
    images = make_set(6)[0][:, :, :20]
    top, left, flip = torch.tensor([0, 2, 4, 1, 0, 4]), torch.tensor([4, 0, 2, 1, 0, 4]), torch.tensor([True, False]*3)
    for i, out in enumerate(crop_flip(images, top, left, flip, 2)):
        expected = TF.crop(TF.pad(images[i], 2), int(top[i]), int(left[i]), 20, 32)
        assert torch.equal(out, TF.hflip(expected) if flip[i] else expected)

def test_rotate_equals_torchvision():
    images = make_set(4)[0].float()
    for degrees in (0., 90., -17., 33.):
        expected = TF.rotate(images, degrees, interpolation=TF.InterpolationMode.BILINEAR)
        torch.testing.assert_close(rotate(images, torch.full((4,), degrees)), expected, atol=.05, rtol=0)
    wide = make_set(4)[0][:, :, :20].float()
    torch.testing.assert_close(rotate(wide, torch.full((4,), 25.)), TF.rotate(wide, 25., interpolation=TF.InterpolationMode.BILINEAR), atol=.05, rtol=0)

def test_statistics_agree_with_the_stock_pipeline():
    "Mean and mean square of each pixel, over many draws of one image, against torchvision's transforms applied image by image."
    n, image = 4000, make_set(1)[0][0]
    dl = DeviceLoader((image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64)), bs=n, augment=True, normalize=False, seed=3)
    ours = dl.one_batch()[0]
    torch.manual_seed(0)
    stock = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ConvertImageDtype(torch.float32)])
    theirs = torch.stack([stock(image) for _ in range(n)])
    for f in (lambda x: x, torch.square):
        a, b = f(ours), f(theirs)
        z = (a.mean(0) - b.mean(0))/((a.var(0) + b.var(0))/n).sqrt()
        assert z.abs().max() < 5.5 and .8 < z.std() < 1.2  # 3,072 pixels, each a standard normal if the two agree

def test_each_of_the_162_views_is_equally_likely_and_drawn_per_image():
    n = 16200  # 100 for each of 81 crops × 2 flips
    dl = DeviceLoader((torch.zeros(n, 3, 8, 8, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)), augment=True, seed=1)
    top, left, flip, _ = dl._draws(0)
    counts = torch.bincount(top*18 + left*2 + flip, minlength=162)
    chi2 = ((counts - n/162)**2/(n/162)).sum()
    assert len(counts) == 162 and 161 - 5*(2*161)**.5 < chi2 < 161 + 5*(2*161)**.5
    for d in (top, left, flip):  # neighbours are uncorrelated: no draw is shared by a batch
        d = d.double() - d.double().mean()
        assert abs((d[1:]*d[:-1]).mean()/d.var()) < 5/n**.5

def test_a_view_of_every_image_is_a_crop_of_that_image():
    images, labels = make_set(30)
    x, y = DeviceLoader((images, labels), bs=30, augment=True, normalize=False).one_batch()
    views = (x*255).round().byte()
    for image, view in zip(images, views):
        padded = TF.pad(image, 4)
        crops = [padded[:, i:i + 32, j:j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(view, c) or torch.equal(view, c.flip(-1)) for c in crops)

# ---------------------------------------------------------------- loader: output

def test_batches_hold_the_images():
    images, labels = make_set(25)
    dl = DeviceLoader((images, labels), bs=10)
    x, y = all_batches(dl)
    expected = TF.normalize(images/255, CIFAR100_MEAN, CIFAR100_STD)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y, labels) and y.dtype == torch.int64 and x.dtype == torch.float32
    assert [len(b[1]) for b in dl] == [10, 10, 5] and len(dl) == 3 and dl.bs == 10 and dl.n == 25
    drop = dl.new(drop_last=True)
    assert [len(b[1]) for b in drop] == [10, 10] and len(drop) == 2
    plain = dl.new(normalize=False).one_batch()[0]
    torch.testing.assert_close(plain, images[:10]/255)
    x = dl.new(dtype=torch.bfloat16, channels_last=True).one_batch()[0]
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dl.decode(dl.one_batch())[0], images[:10])

def test_shuffling_holds_each_image_once():
    images, labels = make_set(64)
    dl = DeviceLoader((images, labels), bs=10, shuffle=True, normalize=False)
    x, y = all_batches(dl)
    assert not torch.equal(y, labels)
    assert find_duplicates((x*255).round().byte(), images).shape == (64, 2)
    assert torch.equal(labels[torch.tensor(dl.new().get_idxs())], y)

# ---------------------------------------------------------------- loader: seed, state

def train_loader(seed=0, **kwargs):
    return DeviceLoader(make_set(50), bs=8, shuffle=True, augment=True, rotation=10., seed=seed, **kwargs)

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

def test_seed_pairs_loaders_and_epochs_differ():
    a, b, c = train_loader(), train_loader(), train_loader(1)
    epochs = [all_batches(a) for _ in range(3)]
    for e in epochs: assert same(e, all_batches(b))
    assert not same(epochs[0], epochs[1]) and not same(epochs[0], all_batches(c))
    b.set_epoch(1)
    assert same(epochs[1], all_batches(b)) and same(epochs[2], all_batches(b))

def test_order_and_draws_each_change_with_epoch_and_seed():
    dl, other = train_loader(), train_loader(1)
    orders = [dl.get_idxs(), dl.set_epoch(1) or dl.get_idxs(), other.get_idxs()]
    assert all(sorted(o) == list(range(50)) for o in orders) and orders[0] != orders[1] and orders[0] != orders[2]
    for a, b, c in zip(dl._draws(0), dl._draws(1), other._draws(0)): assert not torch.equal(a, b) and not torch.equal(a, c)

def test_global_generators_play_no_part():
    dl = train_loader()
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = all_batches(train_loader())
    dl.one_batch(), dl.new()
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    torch.manual_seed(2); np.random.seed(2); random.seed(2)
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
    if stop == 0: state = dl.state_dict()
    while state is None:
        for b in dl:
            seen.append(b)
            if len(seen) == stop:
                state = dl.state_dict()
                break
    state = pickle.loads(pickle.dumps(state))
    fresh = train_loader()
    fresh.load_state_dict(state)
    while len(seen) < len(expected): seen.extend(fresh)
    assert len(seen) == len(expected) and all(same(p, q) for p, q in zip(seen, expected))

def test_state_survives_looking():
    dl = train_loader()
    expected = dl.one_batch()
    assert same(expected, dl.one_batch()) and same(expected, next(iter(dl)))
    dl = train_loader()
    dl.one_batch(); dl.new(); dl.get_idxs()
    assert dl.state_dict() == train_loader().state_dict()

def test_epoch_broken_off_is_not_continued():
    dl, whole = train_loader(), train_loader()
    for i, b in enumerate(dl):
        if i == 2: break
    all_batches(whole)
    assert same(all_batches(dl), all_batches(whole))

def test_state_of_another_loader_is_refused():
    state = train_loader().state_dict()
    with pytest.raises(ValueError, match='seed=0 instead of 1'): train_loader(1).load_state_dict(state)
    with pytest.raises(ValueError, match='bs=8 instead of 9'): train_loader().new(bs=9).load_state_dict(state)
    with pytest.raises(ValueError, match='missing'): train_loader().load_state_dict({'epoch': 1})

def test_loader_errors():
    images, labels = make_set(10)
    with pytest.raises(TypeError, match='uint8'): DeviceLoader((images.float(), labels))
    with pytest.raises(ValueError, match='shape'): DeviceLoader((images[0], labels))
    with pytest.raises(ValueError, match='10 images but 9'): DeviceLoader((images, labels[:9]))
    with pytest.raises(TypeError, match='integers'): DeviceLoader((images, labels.float()))
    with pytest.raises(ValueError, match=r'0\.\.1, got 0\.\.2'): DeviceLoader((images, labels), vocab=['a', 'b'])
    with pytest.raises(ValueError, match='0..2, got -1'): DeviceLoader((images, labels - 1), vocab=['a', 'b', 'c'])
    for kwargs, match in ((dict(bs=0), 'bs'), (dict(bs=2.), 'bs'), (dict(padding=-1), 'padding'), (dict(flip=1.5), 'flip'), (dict(rotation=-1), 'rotation'),
                          (dict(bs=11, drop_last=True), 'no batch of 10'), (dict(mean=(0,), std=(1,)), '3 channels'), (dict(std=(1, 1, 0)), 'above 0'), (dict(seed=-1), 'seed')):
        with pytest.raises(ValueError, match=match): DeviceLoader((images, labels), **kwargs)
    with pytest.raises(TypeError, match='dtype'): DeviceLoader((images, labels), dtype=torch.int64)
    with pytest.raises(ValueError, match='epoch'): DeviceLoader((images, labels)).set_epoch(-1)
    with pytest.raises(ValueError, match='no batch'): DeviceLoader((images[:0], labels[:0])).one_batch()

# ---------------------------------------------------------------- within fastai

@pytest.fixture
def learn(tmp_path):
    dls = device_dls(make_set(50), make_set(23, seed=1), classes=['x', 'y', 'z'], bs=8, device='cpu')
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3))
    learn = Learner(dls, model, metrics=accuracy, path=tmp_path)
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])
    return learn

def test_learner_fits_and_predicts(learn, tmp_path):
    dls = learn.dls
    assert dls.c == 3 and list(dls.vocab) == ['x', 'y', 'z'] and dls.device == torch.device('cpu') and len(dls.train) == 6 and len(dls.valid) == 3
    with learn.no_logging():
        learn.fit(2, 1e-3)
        assert learn.dls.train.epoch == 1
        assert len(learn.validate()) == 2
        learn.fit(1, 1e-3, cbs=MixUp())
    preds, targets = learn.get_preds()
    assert preds.shape == (23, 3) and torch.equal(targets, dls.valid.dataset.labels)
    with torch.no_grad(): expected = learn.model.eval()(all_batches(dls.valid)[0]).softmax(1)
    torch.testing.assert_close(preds, expected)
    preds, targets = learn.get_preds(dl=dls.train)  # shuffled, last batch left out: still all images, in their own order
    assert preds.shape == (50, 3) and torch.equal(targets, dls.train.dataset.labels)
    with learn.no_logging(): assert learn.lr_find(show_plot=False, num_it=30, suggest_funcs=SuggestionMethod.Valley).valley > 0
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum() == 23

def test_learner_exports_without_images(learn, tmp_path):
    with learn.no_logging(): learn.fit(1)
    learn.export('model.pkl')
    assert (tmp_path/'model.pkl').stat().st_size < 60_000  # 50 images alone are 154 kB
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'model.pkl')
    image = make_set(1)[0][0]
    name, index, probabilities = loaded.predict(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert name == ['x', 'y', 'z'][index] and probabilities.shape == (3,)
    with torch.no_grad(): expected = learn.model.eval()(TF.normalize(image/255, CIFAR100_MEAN, CIFAR100_STD)[None]).softmax(1)[0]
    torch.testing.assert_close(probabilities, expected)

def test_training_is_the_same_after_resumption(tmp_path):
    def make():
        torch.manual_seed(0)
        dls = device_dls(make_set(48), make_set(16, seed=1), bs=8, device='cpu')
        learn = Learner(dls, nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 3)), path=tmp_path)
        learn.remove_cbs([o for o in learn.cbs if type(o).__name__ == 'ProgressCallback'])
        return learn
    a, b = make(), make()
    with a.no_logging(): a.fit(2, 1e-2); a.fit(2, 1e-2)
    with b.no_logging(): b.fit(2, 1e-2)
    b.save('half')
    state = b.dls.train.state_dict()
    c = make()
    c.load('half')
    c.dls.train.load_state_dict(state)
    with c.no_logging(): c.fit(2, 1e-2)
    for p, q in zip(a.model.parameters(), c.model.parameters()): assert torch.equal(p, q)

def test_show(learn):
    matplotlib = pytest.importorskip('matplotlib')
    matplotlib.use('Agg')
    learn.dls.show_batch()
    learn.dls.train.show_batch(unique=True, max_n=4)
    learn.show_results()
    assert len(learn.dls.valid.show_batch(show=False, max_n=5)) == 5

def test_cifar100_dls_from_a_folder(tmp_path):
    dls = cifar100_dls(make_cifar(tmp_path, n_train=10, n_test=3), bs=6, device='cpu', per_class=2, seed=4)
    assert dls.c == 4 and list(dls.vocab) == ['birch', 'oak', 'ray', 'shark'] and dls.bs == 6
    assert (dls.train.n, dls.valid.n, dls.test.n) == (32, 8, 12) and dls[2] is dls.test
    assert dls.train.augment and dls.train.shuffle and not dls.valid.augment and not dls.valid.shuffle and not dls.test.augment
    data = load_cifar100(tmp_path)
    assert torch.equal(dls.valid.dataset.images, data.train.images[split_train_valid(data.train.labels, 2, 4)[1]])
    other = cifar100_dls(tmp_path, bs=6, device='cpu', per_class=2, seed=5, split_seed=4)
    assert torch.equal(other.valid.dataset.images, dls.valid.dataset.images) and other.train.seed == 5

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
    try: list(batches)
    finally: torch.cuda.set_sync_debug_mode('default')

# ---------------------------------------------------------------- the real sets

@needs_cifar
def test_real_cifar():
    data = load_cifar100()
    assert data.train.images.shape == (50_000, 3, 32, 32) and data.test.images.shape == (10_000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [500]*100 and data.test.labels.bincount().tolist() == [100]*100
    assert data.classes == sorted(data.classes) and len(data.superclasses) == 20 and data.superclass_of.bincount().tolist() == [5]*20
    assert data.superclasses[data.superclass_of[data.classes.index('beaver')]] == 'aquatic_mammals'
    for name, (label, _) in CALTECH12.items(): assert data.classes[label] == name
    values = np.arange(256)/255
    for channel, mean, std in zip(data.train.images.numpy().swapaxes(0, 1), CIFAR100_MEAN, CIFAR100_STD):
        share = np.bincount(channel.ravel(), minlength=256)/channel.size
        assert abs(share @ values - mean) < 1e-3 and abs((share @ values**2 - (share @ values)**2)**.5 - std) < 1e-3
    assert (len(find_duplicates(data.train)), len(find_duplicates(data.test)), len(find_duplicates(data.train, data.test))) == (14, 2, 10)

@needs_cifar
def test_real_cifar_dls_hold_no_validation_image_in_training():
    for seed in (0, 2):
        dls = cifar100_dls(seed=seed, device='cpu')
        assert (dls.train.n, dls.valid.n, dls.test.n) == (46_000, 4_000, 10_000) and dls.c == 100
        assert len(find_duplicates(dls.valid.dataset.images, dls.train.dataset.images)) == 0

@needs_caltech
def test_real_caltech():
    images, labels = load_caltech12()
    assert images.shape == (781, 3, 32, 32)
    assert {k: (labels == k).sum().item() for k in labels.unique().tolist()} == dict(CALTECH12.values())
