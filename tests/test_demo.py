"The command gini_demo, end to end: results, files, messages, exit codes"

import io, os, signal, struct, subprocess, sys, time, zlib
import numpy as np
import pytest, torch

for name in ('fastai', 'sklearn', 'matplotlib', 'pandas', 'safetensors'):
    pytest.importorskip(name, reason=f"the demonstration needs {name}")
import pandas as pd
from PIL import Image
from gini_loss import demo
from gini_loss.demo import Demo, SaveStopped, demo_data, demo_report, main, plot_demo, run_demo, save_demo
from gini_loss.models import load_network

TINY = dict(quick=True, width=2, device='cpu')
ARGS = '--quick --width 2 --device cpu'.split()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Three classes of 12 colour images, each class with its own bright channel, in sizes other than the network's"
    root, rng = tmp_path_factory.mktemp('data') / 'pictures', np.random.default_rng(0)
    for k, name in enumerate(('blue', 'green', 'red')):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 120, (20, 24, 3), dtype=np.uint8)
            pixels[..., 2 - k] += 120
            Image.fromarray(pixels).save(root / name / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def tiny():
    return run_demo(**TINY)


def of_loss(frame, loss):
    "The rows of one loss, without what may differ"
    return frame[frame.loss == loss].drop(columns=['loss', 'seconds'], errors='ignore').reset_index(drop=True)


def same(a, b):
    a, b = (frame.drop(columns='seconds', errors='ignore') for frame in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


TABLES = ['figure.png', 'history.csv', 'report.txt', 'summary.csv']
NETWORKS = ['network-both-s0.safetensors', 'network-ce-s0.safetensors']

# --- results


def test_command_writes_report_tables_and_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(ARGS) == 0
    out, err = capsys.readouterr()
    assert err == '' and not {'\r', '\033'} & set(out), "no control characters without a terminal"
    assert out.isascii()
    assert out.rstrip().endswith('gini_demo_out')
    folder = tmp_path / 'gini_demo_out'
    assert sorted(o.name for o in folder.iterdir()) == sorted([*TABLES, *NETWORKS])
    summary, history = pd.read_csv(folder / 'summary.csv'), pd.read_csv(folder / 'history.csv')
    assert list(summary.loss) == ['ce', 'both']
    assert len(history) == 4 and history.notna().all().all()
    assert {'train_gini', 'train_kl', 'test_accuracy'} <= set(history)
    with Image.open(folder / 'figure.png') as image:
        assert min(image.size) > 600
        image.load()
    report = (folder / 'report.txt').read_text()
    assert report.startswith('gini_demo --quick') and 'lambda_gini = 0.5' in report
    for row in summary.itertuples():
        assert f"{100 * row.accuracy:.1f} %" in out and f"{row.gini:.3f}" in out


def test_an_earlier_run_is_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'mine.txt').write_text('keep')
    (tmp_path / 'runs-2').write_text('a file')
    assert main([*ARGS, '--out', str(tmp_path / 'runs')]) == 0
    assert (tmp_path / 'runs' / 'mine.txt').read_text() == 'keep' and len(list((tmp_path / 'runs').iterdir())) == 1
    assert (tmp_path / 'runs-2').read_text() == 'a file'
    assert (tmp_path / 'runs-3' / 'summary.csv').exists()
    assert 'runs-3' in capsys.readouterr().out


def test_an_empty_name_for_the_results_is_refused(tmp_path, monkeypatch, capsys):
    "Else they would go beside the current folder"
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here' / 'mine.txt').write_text('keep')
    monkeypatch.chdir(tmp_path / 'here')
    with pytest.raises(SystemExit):
        main([*ARGS, '--out', ''])
    assert 'empty name' in capsys.readouterr().err and [o.name for o in tmp_path.iterdir()] == ['here']


def test_folder_of_class_folders(pictures, tmp_path, capsys):
    args = ['--data', str(pictures), '--size', '16', '--classes', 'red,blue', '--out', str(tmp_path / 'out')]
    assert main([*ARGS, *args]) == 0
    assert '2 of 3 classes' in capsys.readouterr().out
    data = demo_data(str(pictures), classes=['red', 'blue'], size=16, per_class=4)
    assert data.classes == ['red', 'blue'] and data.train[0].shape == (8, 3, 16, 16)
    for images, labels in (data.train, data.test):
        red, blue = images[labels == 0].float().mean((0, 2, 3)), images[labels == 1].float().mean((0, 2, 3))
        assert red.argmax() == 0 and blue.argmax() == 2


def test_same_seed_same_numbers(tiny):
    again = run_demo(**TINY)
    same(tiny.summary, again.summary)
    same(tiny.history, again.history)
    assert demo_report(tiny).split('\n')[-1] == demo_report(again).split('\n')[-1]


def test_another_seed_other_numbers(tiny):
    other = run_demo(**TINY, seed=1)
    assert not tiny.history.train_loss.equals(other.history.train_loss)


def test_numbers_do_not_depend_on_the_global_generators(tiny):
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    demo_ = Demo(**TINY)
    demo_.model(0)
    assert torch.equal(state, torch.get_rng_state()), "building the network must leave the caller's generator alone"
    same(tiny.summary, demo_.run().summary)


def test_both_trainings_start_alike_and_part_at_start_epoch(tiny):
    ce, both = (of_loss(tiny.history, k) for k in ('ce', 'both'))
    pd.testing.assert_frame_equal(ce[:1], both[:1], check_exact=True)
    assert ce.train_loss[1] < both.train_loss[1], "the second loss includes the terms"
    a, b = Demo(**TINY), Demo(**TINY)
    for (k, v), w in zip(a.model(3).state_dict().items(), b.model(3).state_dict().values()):
        assert torch.equal(v, w), k
    for (x, y), (u, v) in zip(a.loaders(3).train, b.loaders(3).train):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_weights_zero_make_both_identical():
    r = run_demo(**TINY, lambda_gini=0, lambda_kl=0)
    for frame in (r.summary, r.history):
        a, b = (of_loss(frame, k) for k in ('ce', 'both'))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert r.comparisons[0].difference == 0 and r.comparisons[0].p == 1
    assert 'indistinguishable' in demo_report(r)


def test_only_one_term_is_named():
    r = run_demo(**TINY, lambda_kl=0)
    assert list(r.layers) == ['ce', 'gini'] and 'cross-entropy + Gini ' in demo_report(r)


def test_several_seeds():
    r = run_demo(**TINY, seeds=2)
    assert list(r.summary.seed) == [0, 0, 1, 1] and len(r.comparisons) == 2
    report = demo_report(r)
    assert '2 pairs' in report and '+/-' in report and 'interval' in report


def test_pairs_that_differ_alike_show_no_difference(tiny):
    "One image more in each of two pairs has no spread to compare it with, so the rule says p = 1"
    frames = [tiny.summary.assign(seed=seed, accuracy=[0.9, 0.91]) for seed in (0, 1)]
    report = demo_report(tiny._replace(summary=pd.concat(frames), comparisons=2 * tiny.comparisons))
    report = ' '.join(report.split())
    assert '+1.00 points on average over 2 pairs (no interval' in report and 'No difference is detected' in report


def test_summary_agrees_with_the_layers(tiny):
    for row in tiny.summary.itertuples():
        d = tiny.layers[row.loss]
        assert (row.gini, row.kl, row.dead_channels, row.channels) == (d.gini, d.kl, int(d.dead.sum()), 16)
        assert 1 <= row.classes_per_channel <= 10
    c = tiny.comparisons[0]
    assert c.difference == pytest.approx(100 * (tiny.summary.accuracy[1] - tiny.summary.accuracy[0]), abs=1e-4)


def test_figure_copes_with_dead_channels(tiny, tmp_path):
    layers = {}
    for key, d in tiny.layers.items():
        probs, dead = d.probs.clone(), d.dead.clone()
        probs[:3], dead[:3] = 0, True
        layers[key] = d._replace(probs=probs, dead=dead)
    fig = plot_demo(tiny._replace(layers=layers))
    fig.savefig(tmp_path / 'f.png')
    for ax, d in zip((fig.axes[0], fig.axes[2]), layers.values()):
        assert f', {d.dead.sum()} dead' in ax.get_title(loc='left')


def test_reverse_kl_is_the_other_divergence(tiny):
    r = run_demo(**TINY, reverse_kl=True)
    assert r.history.train_kl[0] != tiny.history.train_kl[0] and r.history.train_loss[0] == tiny.history.train_loss[0]


# --- data


def test_digits_are_split_alike_in_each_class():
    d = demo_data()
    assert len(d.train[1]) + len(d.test[1]) == 1797
    share = d.test[1].bincount() / (d.train[1].bincount() + d.test[1].bincount())
    assert (share - 0.2).abs().max() < 0.01
    assert d.train[0].dtype == torch.uint8 and d.train[0].max() == 255
    assert [o.item() for o in demo_data(classes=['7', '3']).train[1].unique()] == [0, 1]


def test_copies_do_not_reach_the_test_set(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate('ab'):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name / f'{i}.png')
    for i in range(10):
        (tmp_path / 'a' / f'{i}_copy.png').write_bytes((tmp_path / 'a' / f'{i}.png').read_bytes())
    d = demo_data(tmp_path, size=8)
    kept = {o.numpy().tobytes() for o in d.train[0]}
    assert not any(o.numpy().tobytes() in kept for o in d.test[0])
    assert 'left out as copies' in d.name


def test_classes_are_a_number_or_a_list_of_names():
    assert demo_data(classes=np.int64(3)).classes == ['0', '1', '2']
    with pytest.raises(ValueError, match="no class 3 among the 10 classes: did you mean '3'"):
        demo_data(classes=[3, 8])
    with pytest.raises(TypeError, match="a number or a list of names, got '38'"):
        demo_data(classes='38')


def test_cifar100():
    from fastai.data.external import fastai_path

    if not (fastai_path('data') / 'cifar100').is_dir():
        pytest.skip("CIFAR-100 is not unpacked in fastai's data folder")
    d = demo_data('cifar100', classes=['wolf', 'apple'], per_class=30)
    assert d.classes == ['wolf', 'apple'] and d.train[0].shape == (60, 3, 32, 32) and 190 <= len(d.test[1]) <= 200
    with pytest.raises(ValueError, match="did you mean 'wolf'"):
        demo_data('cifar100', classes=['wolv', 'apple'])


def test_the_second_minus_the_first(tiny):
    c, (ce, both) = tiny.comparisons[0], tiny.summary.accuracy
    assert c.n == 360 and (c.only_ours - c.only_baseline) / 360 == pytest.approx(both - ce)


# --- the trained networks are kept


def test_networks_are_kept_and_give_the_summary_again(tiny, tmp_path):
    save_demo(tiny, tmp_path)
    d = Demo(**TINY)
    for row in tiny.summary.itertuples():
        saved = load_network(tmp_path / f'network-{row.loss}-s{row.seed}.safetensors')
        assert saved.classes == d.data.classes and not saved.model.training
        assert saved.config['loss'] == row.loss and saved.config['mean'] == d.settings['mean']
        images, labels = d.data.test
        c = saved.config
        mean, std = (torch.tensor(c[k]).view(-1, 1, 1) for k in ('mean', 'std'))
        with torch.no_grad():
            right = saved.model((images / 255 - mean) / std).argmax(1) == labels
        assert right.float().mean().item() == pytest.approx(row.accuracy, abs=1 / 360 + 1e-6)


def test_networks_can_be_left_out(tmp_path):
    assert main([*ARGS, '--no-networks', '--out', str(tmp_path / 'out')]) == 0
    assert sorted(o.name for o in (tmp_path / 'out').iterdir()) == TABLES


# --- what is wrong is said before any training


@pytest.mark.parametrize(
    'args, words',
    [
        ('--data no_such', 'use digits, cifar100, or the path'),
        ('--classes 3,seven', "no class 'seven'"),
        ('--classes 11', 'from 2 to 10'),
        ('--classes 1', 'from 2 to 10'),
        ('--classes 3,3', 'two different names'),
        ('--per-class 0', 'argument --per-class: expected a whole number of at least 1'),
        ('--size 16', 'size applies to the images of a folder'),
        ('--epochs 0', 'epochs must be'),
        ('--epochs 1.5', "epochs='1.5': expected int"),
        ('--lr fast', "lr='fast': expected float"),
        ('--width wide', "width='wide': expected int"),
        ('--start-epoch 12', 'would never take part'),
        ('--start-epoch -1', 'start_epoch must be'),
        ('--batch-size 1', 'batch_size must be'),
        ('--batch-size 5000', 'only 1437 images'),
        ('--lr 0', 'lr must be above 0'),
        ('--lr nan', 'lr must be above 0'),
        ('--lambda-gini -1', 'lambda_gini must be finite and not negative'),
        ('--lambda-kl inf', 'lambda_kl must be finite and not negative'),
        ('--seed -1', 'seed must be'),
        ('--seeds 0', 'argument --seeds: expected a whole number of at least 1'),
        ('--width 0', 'width must be'),
        ('--threads 0', 'argument --threads: expected a whole number of at least 1'),
        ('--layer layer5', "did you mean 'layer4'"),
        ('--layer layer1.0.relu', 'ran 2 times'),
        ('--device nonsense', 'cannot be used'),
        ('--unknown', 'unrecognized arguments'),
    ],
)
def test_bad_argument(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Demo, 'run', lambda *a: pytest.fail("trained in spite of a bad argument"))
    with pytest.raises(SystemExit) as e:
        main(args.split())
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ''
    assert words in err and err.count('\n') == 1 and 'Traceback' not in err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def class_folders(p, images, write):
    "Two class folders with so many files, each written by `write(path, class, number)`"
    for k in 'ab':
        (p / k).mkdir()
        for i in range(images):
            write(p / k / f'{i}.png', k, i)


def no_image(path, k, i):
    path.write_text('no image')


def all_alike(path, k, i):
    Image.new('RGB', (8, 8)).save(path)


def each_its_own(path, k, i):
    Image.new('RGB', (8, 8), (i, ord(k), 0)).save(path)


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda p: None, '0 class folders'),
        (lambda p: class_folders(p, 0, no_image), 'no images in'),
        (lambda p: [(p / k / c).mkdir(parents=True) for k in ('fit', 'check') for c in 'ab'], "holds splits"),
        (lambda p: [(p / k).mkdir() for k in ('train', 'test')], "instead"),
        (lambda p: class_folders(p, 4, each_its_own), 'at least 5 are needed'),
        (lambda p: class_folders(p, 5, no_image), 'cannot be used'),
        (lambda p: class_folders(p, 5, all_alike), 'copies only'),
    ],
)
def test_bad_folder(make, words, tmp_path, capsys):
    (tmp_path / 'data').mkdir()
    make(tmp_path / 'data')
    with pytest.raises(SystemExit) as e:
        main(['--data', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_unwritable_output_is_found_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Demo, 'run', lambda *a: pytest.fail("trained although nothing can be saved"))
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(SystemExit) as e:
            main([*ARGS, '--out', str(path)])
        assert e.value.code == 2 and capsys.readouterr().err.count('\n') == 1

    def refuse(*a, **k):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(demo.tempfile, 'TemporaryFile', refuse)
    with pytest.raises(SystemExit) as e:
        main([*ARGS, '--out', str(tmp_path / 'closed')])
    assert e.value.code == 2 and 'cannot write into the folder' in capsys.readouterr().err


# --- when it ends early


@pytest.mark.parametrize(
    'error, code, words',
    [(KeyboardInterrupt(), 130, 'interrupted'), (ValueError("L_Gini became NaN"), 1, 'became NaN')],
)
def test_ends_cleanly(error, code, words, tmp_path, monkeypatch, capsys):
    def fail(*a, **k):
        raise error

    monkeypatch.setattr(demo, 'inspect_layer', fail)
    assert main([*ARGS, '--out', str(tmp_path / 'out')]) == code
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


# --- saving: each file whole or not there, and the message says which are


def stop_at(monkeypatch, name, error):
    "Let the writing of `name` fail with `error`"
    from gini_loss import files, models

    write = files.write_whole

    def stopping(path, *parts):
        if os.path.basename(path) == name:
            raise error
        return write(path, *parts)

    for module in (files, models):
        monkeypatch.setattr(module, 'write_whole', stopping)


@pytest.mark.parametrize(
    'name, there',
    [('report.txt', []), ('history.csv', ['report.txt', 'summary.csv']), (NETWORKS[0], sorted([*TABLES, NETWORKS[1]]))],
)
@pytest.mark.parametrize(
    'error, code, words',
    [
        (KeyboardInterrupt(), 130, 'interrupted'),
        (OSError(28, 'No space left on device', 'history.csv'), 1, 'No space left'),
    ],
)
def test_what_is_saved_is_said(name, there, error, code, words, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Demo, 'run', lambda *a: tiny)
    stop_at(monkeypatch, name, error)
    out = tmp_path / 'out'
    assert main([*ARGS, '--out', str(out)]) == code
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1
    assert (sorted(o.name for o in out.iterdir()) if out.exists() else []) == there
    if there:
        assert all(o in err for o in there) and 'nothing was saved' not in err
    else:
        assert 'nothing was saved' in err and not out.exists()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason="limits the size of files")
def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(tiny, tmp_path, monkeypatch):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(SaveStopped) as e:
            save_demo(tiny, tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert 'figure.png' in str(e.value) and e.value.saved == ['report.txt', 'summary.csv', 'history.csv']
    assert sorted(o.name for o in (tmp_path / 'out').iterdir()) == sorted(e.value.saved)
    assert all(o.stat().st_size > 50 for o in (tmp_path / 'out').iterdir())


def test_an_output_folder_that_is_removed_is_made_again(tiny, tmp_path, monkeypatch, capsys):
    def run(*a):
        (tmp_path / 'out').rmdir()
        return tiny

    monkeypatch.setattr(Demo, 'run', run)
    assert main([*ARGS, '--out', str(tmp_path / 'out')]) == 0
    assert (tmp_path / 'out' / 'summary.csv').exists()


def test_an_output_folder_that_cannot_be_made_again(tiny, tmp_path, monkeypatch, capsys):
    def run(*a):
        (tmp_path / 'out').rmdir()
        (tmp_path / 'out').write_text('a file')
        return tiny

    monkeypatch.setattr(Demo, 'run', run)
    assert main([*ARGS, '--out', str(tmp_path / 'out')]) == 1
    err = capsys.readouterr().err
    assert 'nothing was saved' in err and err.count('\n') == 1


# --- images, names and consoles of all kinds


def test_an_image_of_absurd_size_is_one_line(tmp_path, capsys):
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    (tmp_path / 'data').mkdir()
    class_folders(tmp_path / 'data', 5, each_its_own)
    header = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    (tmp_path / 'data' / 'a' / 'bomb.png').write_bytes(bomb)
    with pytest.raises(SystemExit) as e:
        main([*ARGS, '--data', str(tmp_path / 'data'), '--out', str(tmp_path / 'out')])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1 and 'Traceback' not in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason="names of any bytes")
def test_names_that_other_programs_would_parse(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / 'my $data_set λ'
    for name in (b'$x_1', b'_under', b'$\\frac{$', 'λ'.encode(), b'caf\xe9'):
        folder = os.path.join(os.fsencode(root), name)
        os.makedirs(folder)
        for i in range(10):
            image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            with open(os.path.join(folder, b'%d.png' % i), 'wb') as f:
                image.save(f, 'png')
    start = "import sys; from gini_loss.demo import main; sys.exit(main())"
    env = {**os.environ, 'PYTHONIOENCODING': 'cp1252', 'PYTHONUTF8': '0'}
    command = [sys.executable, '-c', start, *ARGS, '--data', str(root), '--size', '8']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode('cp1252')
    assert b'\\u03bb' in done.stdout and not done.stderr
    report = (tmp_path / 'gini_demo_out' / 'report.txt').read_text(encoding='utf-8')
    assert 'λ' in report and 'caf' in report
    saved = load_network(tmp_path / 'gini_demo_out' / 'network-ce-s0.safetensors')
    assert len(saved.classes) == 5 and 'λ' in saved.classes and '$x_1' in saved.classes


def test_help_where_the_console_has_another_encoding():
    start = "import sys; from gini_loss.demo import main; sys.exit(main())"
    for encoding in ('ascii', 'cp1252', 'cp437'):
        env = {**os.environ, 'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '0'}
        done = subprocess.run([sys.executable, '-c', start, '--help'], env=env, capture_output=True)
        assert done.returncode == 0 and b'--lambda-gini' in done.stdout, done.stderr


# --- Ctrl-C


@pytest.mark.skipif(sys.platform == 'win32', reason="sends SIGINT")
def test_ctrl_c_in_training(tmp_path):
    # a shell starts its background jobs with SIGINT ignored, and a child inherits that: a person's terminal does not
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " from gini_loss.demo import main; sys.exit(main())"
    )
    command = [sys.executable, '-c', start, *'--epochs 1000 --width 2 --device cpu'.split()]
    p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in p.stdout:
            if line.startswith('ResNet-18'):
                break
        time.sleep(1)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=300)
    finally:
        p.kill()
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())


def test_progress_bar_on_a_terminal_only(tiny, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def run(self, progress, report):
        for done in (1, 4):
            progress(done, 4, 'cross-entropy', 0)
        return tiny

    monkeypatch.setattr(Demo, 'run', run)
    for stream in (plain := io.StringIO(), terminal := Terminal()):
        monkeypatch.setattr(sys, 'stderr', stream)
        assert main([*ARGS, '--no-networks', '--out', str(tmp_path / type(stream).__name__)]) == 0
    assert plain.getvalue() == ''
    assert ' 25%' in terminal.getvalue() and '100%' in terminal.getvalue() and 'left' in terminal.getvalue()


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 0
    for settings in demo.DEFAULTS.values():
        for v in settings.values():
            assert f'{v:g} for' in text
