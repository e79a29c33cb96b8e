"The data sets: reading any image, the cache, folders of classes, the split; the real sets where they are present"

import io
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import urllib.error
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('fastai')
import importlib
from fastai.data.external import URLs, fastai_path

from gini_loss import datasets
from gini_loss.datasets import (
    CALTECH12,
    class_folders,
    find_duplicates,
    find_images,
    load_caltech12,
    load_cifar100,
    load_folder,
    pack_arrays,
    read_images,
    select_classes,
    split_train_valid,
    to_rgb,
    unpack_arrays,
)
from gini_loss.files import digest

CLASSES = {'trees': ['oak', 'birch'], 'fish': ['shark', 'ray']}


def save_image(path, seed=0, size=(32, 32), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == 'RGB' else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def make_cifar(root, n_train=6, n_test=2, reverse=False):
    jobs = []
    for split, n in (('train', n_train), ('test', n_test)):
        for superclass, names in CLASSES.items():
            for name in names:
                jobs += [
                    (root / split / superclass / name / f'{name}_{i:03d}.png', f'{split}{name}{i}') for i in range(n)
                ]
    for path, key in reversed(jobs) if reverse else jobs:
        save_image(path, zlib.crc32(key.encode()))
    return root


def make_set(n=60, c=3, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.arange(n) % c


# ---------------------------------------------------------------- any image


def grey_file(folder, name, save):
    path = folder / name
    save(path)
    return read_images([path], 2)[0]


def test_every_mode_of_pillow_is_scaled_by_its_range_or_refused_by_name():
    grey, refused = Image.new('L', (2, 2), 200), []
    for mode in Image.MODES:
        if mode == 'F':
            image = Image.fromarray(np.full((2, 2), 200 / 255, np.float32))
        elif mode.startswith('I;16'):
            image = Image.frombytes(
                mode, (2, 2), struct.pack(('>' if mode == 'I;16B' else '<') + '4H', *[200 * 257] * 4)
            )
        elif mode in ('La', 'PA', 'RGBa'):
            image = grey.convert(dict(La='LA', PA='LA', RGBa='RGBA')[mode]).convert(mode)
        elif mode in ('HSV', 'LAB'):
            image = Image.new(mode, (2, 2), (0, 0, 200) if mode == 'HSV' else (200, 128, 128))
        else:
            image = grey.convert(mode)
        assert image.mode == mode
        try:
            pixel = to_rgb(image).getpixel((0, 0))
        except ValueError as e:
            refused.append(mode)
            assert mode in str(e)
        else:
            expected = {'1': 255, 'LAB': 194}.get(mode, 200)  # L* 78 is 194 in sRGB
            assert max(abs(o - expected) for o in pixel) <= 1, (mode, pixel)
    assert set(refused) <= {'I', 'La', 'LAB'}


def test_sixteen_bits_and_floats_from_files(tmp_path):
    "1000 of 65535 is 1.5 % of white: 4 of 255"
    deep = Image.fromarray(np.full((2, 2), 1000, np.uint16))
    floats = Image.fromarray(np.full((2, 2), 1000 / 65535, np.float32))
    pgm = b'P5 2 2 65535\n' + struct.pack('>4H', *[1000] * 4)
    for name, save in (
        ('a.png', deep.save),
        ('a.tif', deep.save),
        ('b.tif', floats.save),
        ('a.pgm', lambda p: p.write_bytes(pgm)),
    ):
        assert grey_file(tmp_path, name, save).tolist() == [[[4] * 2] * 2] * 3, name


def test_twelve_bits_from_a_tiff(tmp_path):
    pixels = 63 << 12 | 63, 63 << 12 | 63  # 63 of 4095 is 4 of 255; each row ends on a whole byte
    tags = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 6)]
    raw = b''.join(o.to_bytes(3, 'big') for o in pixels) + b'\0\0'
    raw = struct.pack('<2sHI', b'II', 42, 16) + raw + struct.pack('<H', len(tags))
    raw += b''.join(struct.pack('<HHII', tag, 4 if tag > 272 else 3, 1, value) for tag, value in tags) + bytes(4)
    assert grey_file(tmp_path, 'a.tif', lambda p: p.write_bytes(raw)).tolist() == [[[4] * 2] * 2] * 3


def test_values_of_an_unknown_range_are_refused_by_name(tmp_path):
    for name, values in (
        ('big.tif', [[0.0, 7.0]]),
        ('negative.tif', [[-1.0, 0.0]]),
        ('nan.tif', [[float('nan'), 0.0]]),
    ):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / name)
        with pytest.raises(ValueError, match=f'{name}.*mode F must lie in 0..1'):
            read_images([tmp_path / name], 2)
    Image.fromarray(np.array([[0, 70_000]], np.int32)).save(tmp_path / 'int.tif')
    with pytest.raises(ValueError, match='int.tif.*mode I'):
        read_images([tmp_path / 'int.tif'], 2)


@pytest.mark.parametrize(
    'mode, colour, expected',
    [
        ('RGBA', (255, 0, 0, 0), (255, 255, 255)),
        ('RGBA', (255, 0, 0, 255), (255, 0, 0)),
        ('RGBA', (0, 0, 0, 128), (127, 127, 127)),
        ('LA', (0, 0), (255, 255, 255)),
        ('LA', (9, 255), (9, 9, 9)),
    ],
)
def test_transparency_is_laid_on_white(tmp_path, mode, colour, expected):
    pixel = grey_file(tmp_path, 'a.png', Image.new(mode, (2, 2), colour).save)[:, 0, 0]
    assert abs(pixel.astype(int) - expected).max() <= 1


def test_a_transparent_colour_is_laid_on_white(tmp_path):
    palette = Image.new('P', (2, 2), 3)
    palette.putpalette([0, 0, 0] * 3 + [10, 20, 30])
    deep = Image.fromarray(np.array([[1000, 2000]] * 2, np.uint16))
    assert grey_file(tmp_path, 'p.png', lambda p: palette.save(p, transparency=3)).min() == 255
    assert grey_file(tmp_path, 'q.png', palette.save)[:, 0, 0].tolist() == [10, 20, 30]
    assert grey_file(tmp_path, 'l.png', lambda p: Image.new('L', (2, 2), 5).save(p, transparency=5)).min() == 255
    assert grey_file(tmp_path, 'd.png', lambda p: deep.save(p, transparency=1000))[0].tolist() == [[255, 8]] * 2


@pytest.mark.parametrize('name', ['a.png', 'a.tif', 'a.webp'])
@pytest.mark.parametrize('mode', ['RGB', 'I;16'])
def test_images_are_turned_upright(tmp_path, name, mode):
    if mode == 'I;16' and name == 'a.webp':
        pytest.skip('no such file')
    pixels = np.arange(0, 64, 4, dtype=np.uint8).reshape(4, 4)
    image = Image.fromarray(pixels).convert('RGB') if mode == 'RGB' else Image.fromarray(pixels.astype(np.uint16) * 257)
    for orientation, expected in (
        (1, pixels),
        (3, np.rot90(pixels, 2)),
        (6, np.rot90(pixels, -1)),
        (8, np.rot90(pixels)),
        (2, pixels[:, ::-1]),
    ):
        exif = Image.Exif()
        exif[274] = orientation
        image.save(tmp_path / name, exif=exif, **(dict(lossless=True) if name == 'a.webp' else {}))
        assert (read_images([tmp_path / name], 4)[0, 0] == expected).all(), orientation


@pytest.mark.parametrize(
    'error',
    [RuntimeError('boom'), MemoryError(), RecursionError('deep'), SystemExit(3), KeyError('x'), struct.error('cut')],
)
def test_whatever_a_decoder_raises_becomes_an_error_with_the_name(tmp_path, monkeypatch, error):
    def fail(file):
        raise error

    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(ValueError, match=f'1 of 1 images .*odd.png .{type(error).__name__}:'):
        read_images([tmp_path / 'odd.png'], 8)


def test_resizing_averages(tmp_path):
    "A fine checkerboard shrinks to grey; without antialiasing it would stay black or white"
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / 'board.png')
    assert abs(read_images([tmp_path / 'board.png'], 32)[0].astype(float) - 127.5).max() < 16


# ---------------------------------------------------------------- CIFAR-100 from a folder


def test_cifar_layout(tmp_path):
    data = load_cifar100(make_cifar(tmp_path))
    assert data.classes == ['birch', 'oak', 'ray', 'shark']
    assert data.superclasses == ['fish', 'trees'] and data.superclass_of.tolist() == [1, 1, 0, 0]
    images, labels = data.train
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.tolist() == sorted([0, 1, 2, 3] * 6)
    assert data.test.images.shape == (8, 3, 32, 32)
    expected = np.asarray(Image.open(tmp_path / 'train' / 'trees' / 'oak' / 'oak_002.png')).transpose(2, 0, 1)
    assert torch.equal(images[6 + 2], torch.from_numpy(expected.copy()))


def test_order_of_files_does_not_matter(tmp_path):
    a, b = (load_cifar100(make_cifar(tmp_path / str(r), reverse=r)) for r in (False, True))
    assert torch.equal(a.train.images, b.train.images) and torch.equal(a.test.labels, b.test.labels)


def test_cifar_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='train/<superclass>'):
        load_cifar100(tmp_path / 'nowhere')
    root = make_cifar(tmp_path / 'size')
    save_image(root / 'train' / 'trees' / 'oak' / 'wrong.png', 0, size=(20, 32))
    with pytest.raises(ValueError, match=r'wrong.png \(20×32 pixels'):
        load_cifar100(root)
    root = make_cifar(tmp_path / 'broken')
    (root / 'test' / 'fish' / 'ray' / 'broken.png').write_bytes(b'not an image')
    with pytest.raises(ValueError, match='broken.png'):
        load_cifar100(root)
    root = make_cifar(tmp_path / 'differ')
    save_image(root / 'train' / 'fish' / 'cod' / 'cod.png', 0)
    with pytest.raises(ValueError, match='same classes.*cod'):
        load_cifar100(root)
    root = make_cifar(tmp_path / 'empty')
    for f in (root / 'train' / 'fish' / 'ray').iterdir():
        f.unlink()
    with pytest.raises(ValueError, match='no .png images in .*ray'):
        load_cifar100(root)


def test_a_choice_of_classes_needs_their_folders_alone(tmp_path):
    whole = load_cifar100(make_cifar(tmp_path))
    (tmp_path / 'train' / 'trees' / 'oak' / 'oak_000.png').write_bytes(b'broken')  # not among the chosen
    for split in ('train', 'test'):
        for o in (tmp_path / split / 'fish' / 'shark').iterdir():
            o.unlink()
        (tmp_path / split / 'fish' / 'shark').rmdir()
    some = load_cifar100(tmp_path, classes=['ray', 'birch'])
    assert some.classes == ['birch', 'ray'] and some.superclasses == ['fish', 'trees']
    assert some.superclass_of.tolist() == [1, 0]
    assert some.train.labels.bincount().tolist() == [6, 6] and some.test.labels.bincount().tolist() == [2, 2]
    for k, old in enumerate((0, 2)):
        assert torch.equal(some.train.images[some.train.labels == k], whole.train.images[whole.train.labels == old])
    again = load_cifar100(tmp_path, classes=('birch', 'ray'))  # from its cache
    assert torch.equal(some.train.images, again.train.images)
    with pytest.raises(ValueError, match="no class 'birhc'.*did you mean 'birch'"):
        load_cifar100(tmp_path, ['birhc'])
    with pytest.raises(ValueError, match='different'):
        load_cifar100(tmp_path, ['ray', 'ray'])
    with pytest.raises(TypeError, match='sequence of names'):
        load_cifar100(tmp_path, 'ray')


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    make_cifar(tmp_path)
    monkeypatch.chdir(tmp_path)
    for load in (load_cifar100, load_caltech12, load_folder):
        with pytest.raises(ValueError, match='is empty'):
            load('')


# ---------------------------------------------------------------- downloads


def test_a_failed_download_says_from_where_to_where_and_how_by_hand(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(datasets, 'untar_data', fail)
    with pytest.raises(FileNotFoundError) as e:
        load_cifar100()
    for part in (URLs.CIFAR_100, str(fastai_path('data') / 'cifar100'), 'no network', 'by hand', 'root'):
        assert part in str(e.value)
    torchvision = pytest.importorskip('torchvision.datasets')
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.24.0')
    monkeypatch.setattr(torchvision, 'Caltech101', fail)
    with pytest.raises(FileNotFoundError) as e:
        load_caltech12(tmp_path, download=True)
    for part in (
        'https://data.caltech.edu',
        str(tmp_path / 'caltech101' / '101_ObjectCategories'),
        'no network',
        'by hand',
    ):
        assert part in str(e.value)


@pytest.mark.parametrize('lack', ['test', 'all but two classes'])
def test_a_download_that_broke_off_is_to_be_deleted(tmp_path, monkeypatch, lack):
    root = tmp_path / 'cifar100'
    for split, n in (('train', 500), ('test', 100)):
        for k in range(2):
            (root / split / 'things' / f'class{k}').mkdir(parents=True)
            for i in range(n):
                (root / split / 'things' / f'class{k}' / f'{i}.png').touch()
    if lack == 'test':
        shutil.rmtree(root / 'test')
    monkeypatch.setattr(datasets, 'untar_data', lambda *args, **kwargs: root)
    with pytest.raises((FileNotFoundError, ValueError), match='cifar100 (lacks test|holds).*to download it again'):
        load_cifar100()


def test_an_old_torchvision_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.23.1+cpu')
    with pytest.raises(FileNotFoundError, match=r'0\.23\.1\+cpu.*0\.24 has the new one.*by hand'):
        load_caltech12(tmp_path, download=True)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- cache


@pytest.fixture
def reads(monkeypatch):
    "Counts how often images are read from their files"
    calls, original = [], datasets.read_images
    monkeypatch.setattr(datasets, 'read_images', lambda *a, **k: calls.append(1) or original(*a, **k))
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


def test_every_single_bit_of_a_cache_is_noticed():
    images, labels = make_set(2, size=2)
    arrays = dict(stamp=np.array('x'), images=images.numpy(), labels=labels.numpy())
    raw = bytearray(pack_arrays(**arrays))
    whole = unpack_arrays(raw)
    assert set(whole) == set(arrays)
    assert all((whole[k] == arrays[k]).all() and whole[k].dtype == arrays[k].dtype for k in arrays)
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match='does not match its digest'):
            unpack_arrays(raw)
        raw[bit // 8] ^= 1 << bit % 8
    with np.load(io.BytesIO(raw)) as saved:
        assert set(saved.files) == set(arrays)  # any reader of npz opens it


def test_damaged_bits_anywhere_rebuild_the_cache(tmp_path, reads):
    first = load_cifar100(make_cifar(tmp_path, 1, 1))
    cache = tmp_path / 'cifar100.npz'
    raw = cache.read_bytes()
    for bit in [0, 8 * len(raw) - 1, *random.Random(0).sample(range(8 * len(raw)), 20)]:
        damaged, n = bytearray(raw), len(reads)
        damaged[bit // 8] ^= 1 << bit % 8
        cache.write_bytes(damaged)
        with pytest.warns(UserWarning, match='cannot be used.*does not match its digest'):
            second = load_cifar100(tmp_path)
        assert len(reads) == n + 2 and torch.equal(first.train.images, second.train.images)
        assert cache.read_bytes() == raw


@pytest.mark.parametrize('damage', ['cut', 'empty', 'garbage', 'older'])
def test_damaged_cache_is_rebuilt(tmp_path, reads, damage):
    first = load_cifar100(make_cifar(tmp_path))
    cache = tmp_path / 'cifar100.npz'
    raw, older = cache.read_bytes(), io.BytesIO()
    np.savez(older, **unpack_arrays(raw))
    cache.write_bytes(dict(cut=raw[: len(raw) // 2], empty=b'', garbage=b'x' * 1000, older=older.getvalue())[damage])
    with pytest.warns(UserWarning, match='cannot be used'):
        second = load_cifar100(tmp_path)
    assert len(reads) == 4 and torch.equal(first.train.images, second.train.images)
    load_cifar100(tmp_path)
    assert len(reads) == 4


def forge(file):
    return file.getvalue()[:-32] + digest(file.getvalue()[:-32]).encode()


@pytest.mark.parametrize('how', ['header', 'compressed'])
def test_a_small_file_that_claims_two_gigabytes_takes_no_memory(how):
    "With a correct digest: the file was forged, not damaged"
    member, file = io.BytesIO(), io.BytesIO()
    n = 2**31 if how == 'header' else 2**25
    np.lib.format.write_array_header_1_0(member, dict(descr='|u1', fortran_order=False, shape=(n,)))
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED if how == 'header' else zipfile.ZIP_DEFLATED) as z:
        z.comment = bytes(32)
        z.writestr('images.npy', member.getvalue() + (b'' if how == 'header' else bytes(n)))
    raw = forge(file)
    assert len(raw) < 100_000
    tracemalloc.start()
    with pytest.raises(ValueError, match='images.npy claims .* bytes and holds'):
        unpack_arrays(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize(
    'change',
    [
        dict(train_images=np.zeros((24, 3, 16, 16), np.uint8)),
        dict(train_images=np.zeros((23, 3, 32, 32), np.uint8)),
        dict(train_images=np.zeros((24, 3, 32, 32), np.float32)),
        dict(test_labels=np.zeros(8, np.int64)),
        dict(train_labels=np.zeros(24, np.int32)),
        dict(test_images=None),
        dict(more=np.zeros(3)),
    ],
)
def test_a_whole_cache_of_other_arrays_is_rebuilt(tmp_path, change):
    first = load_cifar100(make_cifar(tmp_path))
    cache = tmp_path / 'cifar100.npz'
    arrays = {**unpack_arrays(cache.read_bytes()), **change}
    cache.write_bytes(pack_arrays(**{k: v for k, v in arrays.items() if v is not None}))
    with pytest.warns(UserWarning, match='cannot be used'):
        second = load_cifar100(tmp_path)
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.test.labels, second.test.labels)


def test_changed_folder_rebuilds(tmp_path, reads):
    assert len(load_cifar100(make_cifar(tmp_path)).train.labels) == 24
    save_image(tmp_path / 'train' / 'fish' / 'ray' / 'ray_new.png', 7)
    os.utime(tmp_path / 'train' / 'fish' / 'ray', ns=(1, 1))  # coarse clocks would not tell otherwise
    assert len(load_cifar100(tmp_path).train.labels) == 25 and len(reads) == 4


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    make_cifar(tmp_path)
    (tmp_path / 'cifar100.npz').mkdir()  # no file can take this place
    (tmp_path / 'cifar100.npz' / 'x').touch()
    with pytest.warns(UserWarning, match='cannot be written'):
        data = load_cifar100(tmp_path)
    assert len(data.train.labels) == 24 and not list(tmp_path.glob('*.tmp'))


def test_what_a_killed_process_left_is_removed(tmp_path):
    make_cifar(tmp_path)
    script = (
        "import os; os.replace = lambda *a: os._exit(9)\n"
        f"from gini_loss.datasets import load_cifar100; load_cifar100({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', script])
    assert done.returncode == 9 and [o.suffix for o in tmp_path.iterdir() if o.is_file()] == ['.tmp']
    load_cifar100(tmp_path)
    assert [o.name for o in tmp_path.iterdir() if o.is_file()] == ['cifar100.npz']


# ---------------------------------------------------------------- split


def test_split_counts_and_purity():
    labels = torch.arange(100).repeat_interleave(500)
    train, valid = split_train_valid(labels)
    assert (len(train), len(valid)) == (46_000, 4_000) and train.dtype == valid.dtype == torch.int64
    assert labels[valid].bincount().tolist() == [40] * 100
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(50_000))
    assert torch.equal(train, train.sort().values) and torch.equal(valid, valid.sort().values)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert torch.equal(split_train_valid(labels)[1], valid)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert not torch.equal(split_train_valid(labels, seed=1)[1], valid)
    assert torch.equal(split_train_valid(labels.tolist())[1], valid)
    assert torch.equal(split_train_valid(labels.numpy())[1], valid)


def test_split_does_not_depend_on_how_classes_are_interleaved():
    labels = torch.arange(5).repeat_interleave(30)
    name = torch.arange(150)
    mixed = labels[torch.randperm(150, generator=torch.Generator().manual_seed(1))]
    mixed_name = torch.empty_like(name)
    for k in range(5):
        mixed_name[mixed == k] = name[labels == k]  # each class keeps its own sequence
    assert torch.equal(mixed_name[split_train_valid(mixed, 5)[1]].sort().values, split_train_valid(labels, 5)[1])


def test_split_keeps_copies_in_training():
    images, labels = make_set(60, 3)
    for i in range(0, 15, 3):
        images[i + 30] = images[i]  # five images of class 0 are there twice

    def leaks(seed, **kwargs):
        train, valid = split_train_valid(labels, 4, seed, **kwargs)
        assert len(valid) == 12
        return len(find_duplicates(images[valid], images[train]))

    assert sum(leaks(seed) for seed in range(10)) > 0
    assert sum(leaks(seed, images=images) for seed in range(10)) == 0
    with pytest.raises(ValueError, match='class 0 has 20 images, 0 of them'):
        split_train_valid(labels, per_class=4, images=torch.zeros_like(images))


def test_split_errors():
    with pytest.raises(ValueError, match='class 1 has 3'):
        split_train_valid([0] * 10 + [1] * 3, per_class=3)
    with pytest.raises(ValueError, match='per_class'):
        split_train_valid([0, 1], per_class=0)
    with pytest.raises(TypeError, match='integers'):
        split_train_valid([0.0, 1.0])
    with pytest.raises(ValueError, match='must not be negative, got -1'):
        split_train_valid([0, 0, -1], per_class=1)
    with pytest.raises(ValueError, match='one dimension'):
        split_train_valid(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match='seed'):
        split_train_valid([0, 1], seed=0.5)
    with pytest.raises(ValueError, match='seed'):
        split_train_valid([0, 1], seed=-1)
    with pytest.raises(ValueError, match='3 images but 4 labels'):
        split_train_valid([0] * 4, 1, images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8))


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
    with pytest.raises(TypeError, match='uint8'):
        find_duplicates(images.float())


# ---------------------------------------------------------------- Caltech 101


@pytest.fixture(scope='module')
def caltech(tmp_path_factory):
    root = tmp_path_factory.mktemp('caltech')
    base = root / 'caltech101' / '101_ObjectCategories'
    (base / 'BACKGROUND_Google').mkdir(parents=True)
    for k, (name, (_, n)) in enumerate(CALTECH12.items()):
        for i in range(n):  # each image is one flat colour that tells its class; every seventh one is grey
            path, grey = base / name / f'image_{i + 1:04d}.jpg', i % 7 == 0
            path.parent.mkdir(exist_ok=True)
            Image.new('L' if grey else 'RGB', (60, 40), 20 * k if grey else (20 * k,) * 3).save(path)
    for other in ('crocodile_head', 'windsor_chair', 'zebra'):
        save_image(base / other / 'image_0001.jpg', 0)
    return root


def test_caltech(caltech):
    images, labels = load_caltech12(caltech, size=16)
    assert images.shape == (781, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    for k, (label, n) in enumerate(CALTECH12.values()):
        assert (labels == label).sum() == n and (images[labels == label].float() - 20 * k).abs().max() <= 1
    again = load_caltech12(caltech, size=16)
    assert torch.equal(images, again.images) and torch.equal(labels, again.labels)
    assert load_caltech12(caltech, size=8).images.shape[-1] == 8  # another size has a cache of its own


def test_caltech_errors(caltech, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'download=True'):
        load_caltech12(tmp_path)
    assert not (tmp_path / 'caltech101').exists()  # looking must not leave an empty folder behind
    base = caltech / 'caltech101' / '101_ObjectCategories'
    last = base / 'lobster' / 'image_0041.jpg'
    kept = last.read_bytes()
    last.unlink()
    try:
        with pytest.raises(ValueError, match='expected 781 .* found 780 .*lobster: 40 instead of 41'):
            load_caltech12(caltech)
    finally:
        last.write_bytes(kept)


# ---------------------------------------------------------------- any folder, any classes


def test_load_folder(tmp_path):
    for name, n, mode in (('b', 5, 'RGB'), ('a', 3, 'L')):
        for i in range(n):
            save_image(tmp_path / name / f'{i}.png', i, size=(40, 24), mode=mode)
    images, labels, classes = load_folder(tmp_path, size=16)
    assert images.shape == (8, 3, 16, 16) and classes == ['a', 'b'] and labels.tolist() == [0] * 3 + [1] * 5
    assert torch.equal(images[:3, 0], images[:3, 1])  # grey
    few = load_folder(tmp_path, size=16, max_per_class=2)
    assert few.labels.tolist() == [0, 0, 1, 1] and len(find_duplicates(few.images, images)) == 4
    assert torch.equal(few.images, load_folder(tmp_path, size=16, max_per_class=2).images)


def test_load_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        load_folder(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='0 class folders'):
        load_folder(tmp_path)
    save_image(tmp_path / 'a' / '1.png', 0)
    with pytest.raises(NotADirectoryError):
        load_folder(tmp_path / 'a' / '1.png')
    with pytest.raises(ValueError, match='1 class folders'):
        load_folder(tmp_path)
    (tmp_path / 'b').mkdir()
    with pytest.raises(ValueError, match='no images in .*b'):
        load_folder(tmp_path)
    (tmp_path / 'b' / 'broken.jpg').write_bytes(b'\xff\xd8\xff broken')
    with pytest.raises(ValueError, match='1 of 2 images .*broken.jpg'):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match='size'):
        load_folder(tmp_path, size=0)
    with pytest.raises(ValueError, match='max_per_class'):
        load_folder(tmp_path, max_per_class=0)


def make_folders(root, *names):
    for i, name in enumerate(names):
        save_image(root / name, seed=i, size=(8, 8))
    return root


@pytest.mark.parametrize('splits', [('training', 'testing'), ('A', 'B', 'C'), ('2019', '2020')])
def test_splits_are_recognised_by_structure(tmp_path, splits):
    make_folders(tmp_path, *[f'{s}/{c}/0.png' for s in splits for c in ('cat', 'dog')])
    with pytest.raises(
        ValueError, match=f'holds splits, not classes: .*{splits[0]}.*cat, dog.*give one of them instead'
    ):
        load_folder(tmp_path, 4)
    assert load_folder(tmp_path / splits[0], 4).classes == ['cat', 'dog']


def test_splits_of_which_one_lacks_a_class_or_has_no_classes(tmp_path):
    make_folders(
        tmp_path,
        *[f'{s}/{c}/0.png' for s in ('fit', 'check') for c in ('cat', 'dog')],
        'fit/owl/0.png',
        'unlabelled/0.png',
    )
    with pytest.raises(ValueError, match='not classes: check, fit with cat, dog inside'):
        load_folder(tmp_path, 4)


def test_a_lone_split_is_recognised_by_its_name_and_its_lack_of_images(tmp_path):
    make_folders(tmp_path, 'train/cat/0.png', 'train/dog/0.png', 'unlabelled/0.png')
    with pytest.raises(ValueError, match='not classes: train with cat, dog inside.*such as .*train'):
        load_folder(tmp_path, 4)


@pytest.mark.parametrize(
    'files',
    [
        ('train/1.png', 'test/1.png'),  # classes that are called like splits
        ('fish/ray/1.png', 'fish/cod/1.png', 'tree/oak/1.png', 'tree/fir/1.png'),  # superclasses
        ('a/images/1.png', 'b/images/1.png'),  # one subfolder each, of one name
        ('a/x/1.png', 'a/y/1.png', 'a/1.png', 'b/x/1.png', 'b/y/1.png', 'b/1.png'),
    ],
)  # images beside subfolders
def test_what_are_classes_is_not_taken_for_splits(tmp_path, files):
    assert len(load_folder(make_folders(tmp_path, *files), 4).labels) == len(files)


def test_links_that_lead_back_or_up_are_not_followed(tmp_path):
    make_folders(tmp_path, 'a/1.png', 'a/deep/2.png', 'b/1.png')
    (tmp_path / 'a' / 'self').symlink_to('.')
    (tmp_path / 'a' / 'deep' / 'up').symlink_to('..')
    (tmp_path / 'a' / 'deep' / 'root').symlink_to(tmp_path)
    (tmp_path / 'a' / 'again.png').symlink_to('1.png')
    (tmp_path / 'a' / 'round').symlink_to('round')
    (tmp_path / 'c').symlink_to(tmp_path)
    assert [o.name for o in find_images(tmp_path / 'a')] == ['1.png', '2.png']
    data = load_folder(tmp_path, 4)
    assert data.classes == ['a', 'b'] and data.labels.tolist() == [0, 0, 1]


def test_links_elsewhere_are_followed(tmp_path):
    make_folders(tmp_path, 'data/a/1.png', 'data/b/1.png', 'store/x/2.png', 'store/3.png')
    (tmp_path / 'data' / 'a' / 'more').symlink_to(tmp_path / 'store' / 'x')
    (tmp_path / 'data' / 'b' / '3.png').symlink_to(tmp_path / 'store' / '3.png')
    assert load_folder(tmp_path / 'data', 4).labels.tolist() == [0, 0, 1, 1]
    (tmp_path / 'data' / 'c').symlink_to(tmp_path / 'data' / 'a')
    with pytest.raises(ValueError, match='a and c in .* are one folder'):
        class_folders(tmp_path / 'data')


def test_a_broken_link_is_named(tmp_path):
    make_folders(tmp_path, 'a/1.png', 'b/1.png')
    (tmp_path / 'a' / 'gone.png').symlink_to('nowhere.png')
    with pytest.raises(ValueError, match='gone.png .No such file'):
        load_folder(tmp_path, 4)


def test_a_broken_image_of_a_class_that_was_not_asked_for_does_not_matter(tmp_path):
    make_folders(tmp_path, *[f'{c}/{i}.png' for c in 'abc' for i in range(6)])
    whole = load_folder(tmp_path, 4, max_per_class=3, seed=5)
    (tmp_path / 'a' / '0.png').write_bytes(b'broken')
    (tmp_path / 'empty').mkdir()
    some = load_folder(tmp_path, 4, max_per_class=3, seed=5, classes=['c', 'b'])
    assert some.classes == ['b', 'c'] and some.labels.tolist() == [0] * 3 + [1] * 3
    assert torch.equal(some.images, whole.images[3:])  # the same draw as among all classes
    with pytest.raises(ValueError, match='0.png'):
        load_folder(tmp_path, 4, classes=['a', 'b'])
    with pytest.raises(ValueError, match="no class 'd'"):
        load_folder(tmp_path, 4, classes=['a', 'd'])


def test_select_classes():
    images, labels = make_set(60, 5)
    small = select_classes(images, labels, [3, 1])
    assert len(small.labels) == 24 and small.labels.bincount().tolist() == [12, 12]
    for i in range(24):
        j = (images == small.images[i]).flatten(1).all(1).nonzero().item()
        assert labels[j] == [3, 1][small.labels[i]]
    few = select_classes(images, labels, [3, 1], per_class=4, seed=1)
    assert few.labels.bincount().tolist() == [4, 4]
    assert torch.equal(few.images, select_classes(images, labels, [3, 1], 4, seed=1).images)
    with pytest.raises(ValueError, match='class 9 has 0'):
        select_classes(images, labels, [9])
    with pytest.raises(ValueError, match='class 3 has 12 images, 13'):
        select_classes(images, labels, [3], per_class=13)
    with pytest.raises(ValueError, match='different'):
        select_classes(images, labels, [3, 3])


# ---------------------------------------------------------------- the real sets


def test_real_cifar(cifar100_folder):
    data = load_cifar100()
    assert data.train.images.shape == (50_000, 3, 32, 32) and data.test.images.shape == (10_000, 3, 32, 32)
    assert data.train.labels.bincount().tolist() == [500] * 100 and data.test.labels.bincount().tolist() == [100] * 100
    assert data.classes == sorted(data.classes) and len(data.superclasses) == 20
    assert data.superclass_of.bincount().tolist() == [5] * 20
    assert data.superclasses[data.superclass_of[data.classes.index('beaver')]] == 'aquatic_mammals'
    for name, (label, _) in CALTECH12.items():
        assert data.classes[label] == name
    assert (
        len(find_duplicates(data.train)),
        len(find_duplicates(data.test)),
        len(find_duplicates(data.train, data.test)),
    ) == (14, 2, 10)


def test_real_caltech(caltech101_folder):
    images, labels = load_caltech12()
    assert images.shape == (781, 3, 32, 32)
    assert {k: (labels == k).sum().item() for k in labels.unique().tolist()} == dict(CALTECH12.values())
