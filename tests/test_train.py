"The training engine on synthetic images: equal seeds, interruptions, damaged files, several processes, switches."

import errno, json, os, signal, subprocess, sys, threading, time, types, warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

warnings.filterwarnings('ignore', category=FutureWarning)
from gini_loss import checkpoint as checkpoints, records, train as engine
from gini_loss.datasets import CALTECH12, load_caltech12
from gini_loss.losses import diagnostics
from gini_loss.tap import FeatureTap
from gini_loss.train import (
    CheckpointError,
    Config,
    RECIPES,
    RunLock,
    RunLocked,
    build_dls,
    build_learner,
    is_locked,
    load_checkpoint,
    main,
    read_checkpoint_header,
    recipe,
    save_checkpoint,
    train,
)

from graphs import make_graphed_callables
from processes import finish, run_train, start, take_a_lock_often, train_an_epoch

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
# without the group of processes that these tests may run in
ALONE = {k: v for k, v in ENV.items() if k not in ('WORLD_SIZE', 'RANK')}
VOLATILE = ('finished', 'seconds', 'source', 'digest')


def small(**changes):
    return recipe('test', **{**dict(train_per_class=10, epochs=3), **changes})


def run(config, where, **options):
    return train(
        config,
        where / 'results',
        where / 'checkpoints',
        **{**dict(verbose=False, device='cpu', checkpoint_every=1), **options},
    )


def where(folder, results='r', checkpoints='c'):
    "Options of the command for a folder of records and one of checkpoints"
    return ['--results', str(folder / results), '--checkpoints', str(folder / checkpoints)]


SHORT = '--preset test --epochs 1 --start-epoch 0 --train-per-class 10'.split()  # small(epochs=1, start_epoch=0)


def comparable(record):
    return {
        k: ({n: c for n, c in v.items() if n != 'seconds'} if k == 'epochs' else v)
        for k, v in record.items()
        if k not in VOLATILE
    }


def arrays(folder, config):
    with np.load(next((folder / 'results').rglob(f'{config.run_id}.npz'))) as f:
        return {k: f[k] for k in f.files}


def assert_same(config, a, b):
    ra, rb = (json.loads(next((o / 'results').rglob(f'{config.run_id}.json')).read_text()) for o in (a, b))
    assert comparable(ra) == comparable(rb)
    x, y = arrays(a, config), arrays(b, config)
    assert x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)


# --- the commit of the sources


def test_commit_of_sources_without_git(tmp_path, monkeypatch):
    "Outside a checkout: from the variable, else from pip's note of a git address, else None"
    monkeypatch.delenv('GINI_LOSS_COMMIT', raising=False)
    monkeypatch.setattr(records.gini_loss, '__file__', str(tmp_path / 'gini_loss' / '__init__.py'))
    (tmp_path / 'gini_loss').mkdir()
    commit = records.source_commit.__wrapped__
    assert commit() is None
    note = tmp_path / 'gini_loss-0.1.0.dist-info'
    note.mkdir()
    (note / 'METADATA').write_text('Metadata-Version: 2.1\nName: gini_loss\nVersion: 0.1.0\n')
    monkeypatch.setattr(
        records, 'distribution', lambda name: __import__('importlib.metadata').metadata.Distribution.at(note)
    )
    assert commit() is None
    for text, expected in (
        ('{"url": "https://example.org/x.whl", "archive_info": {}}', None),
        ('{', None),
        ('[]', None),
        (
            json.dumps(dict(url='https://example.org/x.git', vcs_info=dict(vcs='git', commit_id='1f' * 20))),
            dict(commit='1f' * 20, modified=None),
        ),
    ):
        (note / 'direct_url.json').write_text(text)
        assert commit() == expected
    monkeypatch.setenv('GINI_LOSS_COMMIT', 'ab' * 20)
    assert commit() == dict(commit='ab' * 20, modified=None)
    monkeypatch.setenv('GINI_LOSS_COMMIT', 'main')
    with pytest.raises(ValueError, match="GINI_LOSS_COMMIT is 'main'.*40 hexadecimal"):
        commit()
    monkeypatch.setattr(records.gini_loss, '__file__', str(tmp_path / 'elsewhere' / 'gini_loss' / '__init__.py'))
    monkeypatch.delenv('GINI_LOSS_COMMIT')
    assert commit() is None  # pip's note is of another copy


# --- configurations


def test_paper_recipes():
    "The paper's numbers, Section 4.2"
    for arch in ('resnet17', 'resnet18'):
        c = recipe(arch)
        assert (c.epochs, c.bs, c.optimizer, c.lr, c.schedule, c.factor, c.patience, c.threshold) == (
            200,
            500,
            'adam',
            1e-3,
            'plateau',
            0.5,
            10,
            1e-2,
        )
    c = recipe('resnet50')
    assert (c.epochs, c.bs, c.optimizer, c.lr, c.momentum, c.weight_decay, c.factor, c.milestones) == (
        250,
        200,
        'sgd',
        0.1,
        0.9,
        5e-4,
        0.2,
        (60, 120, 160, 200),
    )
    c = recipe('cvt7')
    assert (c.epochs, c.bs, c.optimizer, c.lr) == (200, 200, 'adamax', 2e-3)
    for arch in ('resnet17', 'resnet18', 'resnet50', 'cvt7'):
        c = recipe(arch)
        assert (c.lambda_gini, c.lambda_kl, c.start_epoch, c.reverse_kl) == (0.5, 0.5, 10, False)
    assert all(source for r in RECIPES.values() for _, source in r.values())


def test_hashes_do_not_drift():
    "Committed records are found by these names: a change of a default or of the hash would lose them"
    assert recipe('laptop', loss='ce').run_id == 'resnet18-ce-s0-62297e14'
    assert recipe('laptop', loss='both', seed=2).run_id == 'resnet18-both-s2-6bf31709'


def test_each_field_counts():
    base = Config(arch='resnet50', loss='both')
    other = dict(
        arch='resnet18',
        loss='gini',
        seed=1,
        epochs=2,
        bs=3,
        optimizer='sgd',
        lr=0.5,
        momentum=0.5,
        weight_decay=0.5,
        schedule='none',
        factor=0.1,
        patience=1,
        threshold=0.5,
        monitor='epoch',
        milestones=(1,),
        lambda_gini=0.1,
        lambda_kl=0.1,
        start_epoch=0,
        reverse_kl=True,
        rectify='relu',
        layer='layer3',
        width=3,
        dropout=0.4,
        data='synthetic',
        train_per_class=3,
        valid_per_class=3,
        split_seed=3,
        normalize=True,
        padding=0,
        flip=0.0,
        rotation=9.0,
        precision='bfloat16',
        channels_last=True,
        compile=True,
        final_relu=False,
        classes='caltech12',
        class_prior='train',
        objective='center',
        objective_weight=0.5,
    )
    assert set(other) == set(asdict(base))
    for k, v in other.items():
        start = replace(base, arch='resnet17') if k == 'final_relu' else base
        if k == 'objective_weight':
            start = replace(base, objective='center', objective_weight=0.1)
        changed = replace(start, **{k: v}, **(dict(objective_weight=0.1) if k == 'objective' else {}))
        assert changed.run_hash != start.run_hash, k
        assert (changed.config_hash == start.config_hash) == (k == 'seed'), k


@pytest.mark.parametrize(
    'bad',
    [
        dict(loss='all'),
        dict(arch='vgg'),
        dict(epochs=0),
        dict(lr=-1.0),
        dict(dropout=0.4),
        dict(precision='float16'),
        dict(loss='both', lambda_gini=0),
        dict(lr=float('inf')),
        dict(lr=float('nan')),
        dict(lambda_gini=float('inf')),
        dict(arch='resnet50', dropout=1.0),
        dict(flip=2.0),
        dict(rotation=900.0),
        dict(factor=1.0),
        dict(final_relu=False),
    ],
)
def test_impossible_values(bad):
    with pytest.raises(ValueError):
        Config(**bad)


@pytest.mark.parametrize(
    'bad', [dict(epochs='3'), dict(lr='fast'), dict(seed=1.5), dict(reverse_kl=1), dict(epochs=True)]
)
def test_wrong_types(bad):
    with pytest.raises(TypeError):
        Config(**bad)


# --- the seed


def test_same_seed_same_run(tmp_path):
    c = small()
    run(c, tmp_path / 'a')
    run(c, tmp_path / 'b')
    assert_same(c, tmp_path / 'a', tmp_path / 'b')


def test_seed_fixes_weights_and_order_for_every_loss():
    learners = [
        build_learner(c, build_dls(c, device='cpu')) for c in (small(loss=l) for l in ('ce', 'gini', 'kl', 'both'))
    ]
    first = learners[0]
    for other in learners[1:]:
        assert all(
            torch.equal(a, b)
            for a, b in zip(first.plain_model.state_dict().values(), other.plain_model.state_dict().values())
        )
        first.dls.train.set_epoch(0)
        for (xa, ya), (xb, yb) in zip(first.dls.train, other.dls.train):
            assert torch.equal(xa, xb) and torch.equal(ya, yb)
    c = small(seed=1)
    x, _ = next(iter(build_dls(c, device='cpu').train))
    assert not torch.equal(x, next(iter(build_dls(small(), device='cpu').train))[0])


def test_ce_is_plain_training():
    "A callback that only measures does not change the training, to the last bit"
    c = small(loss='ce')
    learn = build_learner(c, build_dls(c, device='cpu'))
    learn.fit(2)
    plain = build_learner(c, build_dls(c, device='cpu'))
    plain.remove_cbs([cb for cb in plain.cbs if not type(cb).__name__ == 'TrainEvalCallback'])
    for epoch in range(2):
        torch.manual_seed(0)
        plain.fit(1, lr=c.lr)
    assert all(
        torch.equal(a, b)
        for a, b in zip(learn.plain_model.state_dict().values(), plain.plain_model.state_dict().values())
    )


def test_random_state_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(5)
    run(small(epochs=1, start_epoch=0), tmp_path)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize('optimizer', ['adam', 'adamax', 'sgd'])
def test_what_the_configuration_says_reaches_the_optimizer_the_schedule_and_the_loader(optimizer):
    schedule = dict(schedule='plateau', factor=0.25, patience=7, threshold=0.03)
    augmentation = dict(padding=2, flip=0.25, rotation=9.0)
    momentum = dict(momentum=0.3) if optimizer == 'sgd' else {}
    c = small(optimizer=optimizer, weight_decay=0.02, **momentum, **schedule, **augmentation)
    learn = build_learner(c, build_dls(c, device='cpu'))
    learn.fit(1)
    group, scheduler = learn.opt.opt.param_groups[0], learn.learning_rate.scheduler
    assert type(learn.opt.opt).__name__.lower() == optimizer and len(learn.opt.opt.param_groups) == 1
    assert {k: group[k] for k in ('lr', 'weight_decay', *momentum)} == dict(lr=c.lr, weight_decay=0.02, **momentum)
    assert (scheduler.factor, scheduler.patience, scheduler.threshold) == (0.25, 7, 0.03)
    assert {k: getattr(learn.dls.train, k) for k in augmentation} == augmentation and learn.dls.train.augment
    assert not learn.dls.valid.augment


# --- schedules


def test_schedules():
    c = small(loss='ce', epochs=6, milestones=(2, 4))
    learn = build_learner(c, build_dls(c, device='cpu'))
    learn.fit(6)
    assert np.allclose(learn.epoch_log.columns['lr'], [0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004])
    c = small(loss='ce', epochs=6, schedule='plateau', patience=1, factor=0.5, monitor='epoch')
    learn = build_learner(c, build_dls(c, device='cpu'))
    learn.fit(6)
    assert np.allclose(learn.epoch_log.columns['lr'], [0.01, 0.01, 0.01, 0.005, 0.005, 0.0025])


def test_the_total_has_the_terms_from_their_first_epoch_on_and_the_best_epoch_is_named(tmp_path):
    record = run(small(start_epoch=1, lambda_gini=0.5, lambda_kl=2.0, epochs=4), tmp_path)
    epochs, best = record['epochs'], record['best']
    accuracies = epochs['valid_accuracy']
    assert (best['epoch'], best['valid_accuracy']) == (accuracies.index(max(accuracies)), max(accuracies))
    assert record['last']['epoch'] == 3
    loss, gini, kl = (np.array(epochs[f'train_{name}']) for name in ('loss', 'gini', 'kl'))
    assert epochs['train_total'] == pytest.approx(loss + np.array([0, 1, 1, 1]) * (0.5 * gini + 2 * kl))


def test_the_first_of_the_best_epochs_is_kept():
    kept, model = engine.KeepBest(), torch.nn.Linear(1, 1)
    for epoch, accuracy in enumerate((0.4, 0.5, 0.5, 0.3)):
        torch.nn.init.constant_(model.weight, epoch)
        log = types.SimpleNamespace(row=dict(valid_accuracy=accuracy))
        kept.learn = types.SimpleNamespace(epoch=epoch, epoch_log=log, plain_model=model)
        kept.after_epoch()
    assert (kept.best_epoch, kept.accuracy, kept.weights['weight'].item()) == (1, 0.5, 1)


# --- interruptions


def stop_after_each_epoch(monkeypatch):
    class Stop(engine.Deadline):
        def before_epoch(self):
            if self.learn.epoch > self.learn.first_epoch:
                self.stop()
            super().before_epoch()

    monkeypatch.setattr(engine, 'Deadline', Stop)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(optimizer='sgd', momentum=0.9, schedule='plateau', patience=0),
        dict(arch='resnet50', dropout=0.4, width=2, epochs=2),
    ],
    ids=['adam', 'sgd-plateau', 'dropout'],
)
def test_stopped_after_each_epoch(tmp_path, monkeypatch, changes):
    "A run that is stopped after each epoch and continued by a new learner ends like an uninterrupted one"
    c = small(**changes)
    run(c, tmp_path / 'whole')
    stop_after_each_epoch(monkeypatch)
    for _ in range(c.epochs - 1):
        assert run(c, tmp_path / 'parts') is None
    record = run(c, tmp_path / 'parts')
    assert record['seconds']['sessions'] == c.epochs
    assert_same(c, tmp_path / 'whole', tmp_path / 'parts')
    assert not list((tmp_path / 'parts' / 'checkpoints').iterdir())


def test_a_run_that_goes_on_elsewhere_says_where_it_was(tmp_path, monkeypatch):
    "The record has the environment of its last session, and of earlier ones those that differ, each once"
    here, commits = engine.environment('cpu'), iter(['a' * 40, 'a' * 40, 'b' * 40])
    monkeypatch.setattr(engine, 'environment', lambda device: {**here, 'source': dict(commit=next(commits))})
    stop_after_each_epoch(monkeypatch)
    assert run(small(), tmp_path) is None and run(small(), tmp_path) is None
    record = run(small(), tmp_path)
    assert record['source'] == dict(commit='b' * 40)
    assert record['earlier'] == [{**here, 'source': dict(commit='a' * 40)}]


def test_stopped_within_an_epoch(tmp_path, monkeypatch):
    c = small()
    run(c, tmp_path / 'whole')

    class Stop(engine.Deadline):
        def after_batch(self):
            if self.learn.epoch == 1 and self.learn.iter == 2:
                self.stop()

    with monkeypatch.context() as m:
        m.setattr(engine, 'Deadline', Stop)
        assert run(c, tmp_path / 'parts') is None
    run(c, tmp_path / 'parts')
    assert_same(c, tmp_path / 'whole', tmp_path / 'parts')


def command(folder, c):
    "Arguments of `gini_train` for `c`, with a checkpoint after each epoch"
    options = (
        f'--preset test --train-per-class {c.train_per_class} --epochs {c.epochs} --checkpoint-every 1 --device cpu'
    )
    return [*options.split(), *where(folder, 'results', 'checkpoints')]


def test_kill_9_at_random_points(tmp_path):
    c, rng, killed = small(epochs=8), np.random.default_rng(0), 0
    run(c, tmp_path / 'whole')
    folder = tmp_path / 'killed'
    path = folder / 'checkpoints' / f'{c.run_id}.pt'
    for _ in range(3):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(run_train, command(folder, c))
        # an epoch has ended when there is a new checkpoint; then kill at any moment, also during the next checkpoint
        while process.is_alive() and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed
    finish(start(run_train, command(folder, c)))
    assert_same(c, tmp_path / 'whole', folder)
    assert not list((folder / 'checkpoints').glob('*.pt'))


def test_deadline_saves_before_it_stops(tmp_path, monkeypatch):
    "Also with few checkpoints, and if the first epoch takes much longer than the others"
    c, now = small(epochs=50), [0.0]

    class Slow(engine.Deadline):
        def before_epoch(self):
            super().before_epoch()
            now[0] += 1.0 if self.learn.epoch == 0 else 0.2

    monkeypatch.setattr(engine, 'Deadline', Slow)
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(checkpoints, 'time', clock)

    def last_epoch_before(deadline):
        assert run(c, tmp_path, deadline=deadline, checkpoint_every=1000) is None
        return read_checkpoint_header(tmp_path / 'checkpoints' / f'{c.run_id}.pt')['epoch']

    assert last_epoch_before(2.0) == 4  # which ends at 1.8; the long first epoch did not count as the usual one
    assert last_epoch_before(2.5) == 7  # which ends at 2.4


def test_saving_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    saved, save = [], checkpoints.save_checkpoint

    def slow(path, header, state):
        saved.append(header['epoch'])
        time.sleep(0.5)
        save(path, header, state)

    monkeypatch.setattr(checkpoints, 'save_checkpoint', slow)
    c = small(epochs=12, train_per_class=4)
    run(c, tmp_path, checkpoint_every=None)
    assert saved[0] == 0 and saved[-1] == 11 and len(saved) < 6, saved
    saved.clear()
    run(c, tmp_path / 'each', checkpoint_every=5)
    assert saved == [4, 9, 11]


def test_counters_of_adam_stay_on_the_cpu(stopped):
    "On the device, each step would wait for them once per parameter"
    c, folder, path = stopped
    checkpoint = engine.Checkpoint(path, c)
    assert checkpoint.load() == 1
    parameters = [
        torch.nn.Parameter(torch.empty_like(o, device='meta'))
        for o in build_learner(c, build_dls(c, device='cpu')).plain_model.parameters()
    ]
    adam = torch.optim.Adam(parameters)
    adam.load_state_dict(checkpoint.state['optimizer'])
    assert {(s['step'].device.type, s['exp_avg'].device.type) for s in adam.state.values()} == {('cpu', 'meta')}


@pytest.fixture
def deterministic():
    "Sums in the same order each time, also on a GPU (cuBLAS needs CUBLAS_WORKSPACE_CONFIG=:4096:8)"
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.usefixtures('deterministic')
def test_resumed_on_a_gpu(tmp_path, monkeypatch):
    "A resumed run ends like an uninterrupted one, and none of its steps waits for the device"
    c = small()

    class Stop(engine.Deadline):
        def before_epoch(self):
            if self.learn.epoch == 1 and self.learn.first_epoch == 0:
                self.stop()
            super().before_epoch()

    with monkeypatch.context() as m:
        m.setattr(engine, 'Deadline', Stop)
        assert run(c, tmp_path, device='cuda') is None
    step = torch.optim.Adam.step

    def watched(self, *args):
        torch.cuda.set_sync_debug_mode('error')
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode('default')

    monkeypatch.setattr(torch.optim.Adam, 'step', watched)
    whole, parts = run(c, tmp_path / 'whole', device='cuda'), run(c, tmp_path, device='cuda')
    assert parts['epochs']['train_loss'] == pytest.approx(whole['epochs']['train_loss'], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.usefixtures('deterministic')
@pytest.mark.parametrize(
    'changes',
    [dict(precision='float32'), dict(precision='bfloat16'), dict(arch='cvt7'), dict(layer='layer3')],
    ids=lambda changes: '-'.join(changes.values()),
)
def test_cuda_graphs_give_the_numbers_of_the_engine_without(tmp_path, changes):
    "Stages recorded as graphs give the same losses, terms and pulls"
    c = small(channels_last=True, width=8, **changes)
    plain = run(c, tmp_path / 'plain', device='cuda')
    graphs = run(c, tmp_path / 'graphs', device='cuda', cuda_graphs=True)
    for column in ('train_loss', 'train_gini', 'train_kl', 'grad_main', 'valid_loss'):
        assert graphs['epochs'][column] == pytest.approx(plain['epochs'][column], rel=1e-4), column


@pytest.mark.parametrize(
    'changes',
    [
        *[dict(arch=arch) for arch in RECIPES if arch in ('resnet17', 'resnet18', 'resnet50', 'cvt7')],
        *[dict(layer=layer) for layer in ('layer2', 'layer4.0', 'conv1')],
        dict(optimizer='sgd', class_prior='train', channels_last=True),
        dict(objective='center', objective_weight=0.1),
    ],
    ids=lambda changes: '-'.join(map(str, changes.values())),
)
def test_recorded_stages_give_the_numbers_of_the_engine_without(monkeypatch, changes):
    "On a CPU, with stages whose memory is overwritten by each batch: equal weights, losses, terms and pulls"
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', make_graphed_callables)
    c, found = small(**{**dict(epochs=2, start_epoch=1, width=4), **changes}), []
    for cuda_graphs in (False, True):
        torch.manual_seed(0)
        learn = build_learner(c, build_dls(c, device='cpu'), cuda_graphs=cuda_graphs)
        learn.fit_from(0, c.epochs)
        columns = {k: v for k, v in learn.epoch_log.columns.items() if k != 'seconds'}
        found.append((columns, learn.model.state_dict()))
    (plain, weights), (recorded, recorded_weights) = found
    assert recorded.keys() == plain.keys() and all(
        recorded[k] == pytest.approx(plain[k], rel=1e-6, nan_ok=True) for k in plain
    )
    assert all(torch.equal(recorded_weights[k], weights[k]) for k in weights)


def test_cuda_graphs_need_a_gpu(tmp_path):
    with pytest.raises(ValueError, match='needs a GPU'):
        run(small(), tmp_path, cuda_graphs=True)


def test_finished_in_between(tmp_path, monkeypatch):
    "Another process writes the record before this one has the lock: the run is not trained again, leftovers are removed"
    c = small(epochs=1, start_epoch=0)
    done, lock = run(c, tmp_path / 'other'), engine.RunLock.__enter__
    (tmp_path / 'checkpoints').mkdir()
    for name in (f'{c.run_id}.pt', f'{c.run_id}.pt.4711.tmp'):
        (tmp_path / 'checkpoints' / name).write_bytes(b'of a killed process')

    def enter(self):
        (tmp_path / 'other' / 'results').rename(tmp_path / 'results' / 'theirs')
        return lock(self)

    monkeypatch.setattr(engine.RunLock, '__enter__', enter)
    monkeypatch.setattr(engine, 'build_dls', lambda *args: pytest.fail("trained again"))
    (tmp_path / 'results').mkdir()
    assert run(c, tmp_path) == done
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_a_finished_run_leaves_nothing_in_memory(tmp_path):
    import gc, weakref

    kept, build = [], engine.build_learner

    def watched(*args):
        learn = build(*args)
        kept.append(weakref.ref(learn.plain_model))
        return learn

    engine.build_learner = watched
    gc.disable()
    try:
        for seed in range(2):
            run(small(epochs=1, start_epoch=0, seed=seed), tmp_path)
        assert len(kept) == 2 and all(ref() is None for ref in kept)
    finally:
        gc.enable()
        engine.build_learner = build


def test_compiled_networks_are_not_mixed_up(monkeypatch):
    "Graphs of another configuration are dropped, seeds and losses share graphs, and the batch size is fixed"
    reset, options = [], []
    monkeypatch.setattr(torch._dynamo, 'reset', lambda: reset.append(1))
    monkeypatch.setattr(torch, 'compile', lambda model, **k: options.append(k) or model)
    monkeypatch.setattr(engine, '_compiled_for', [None])
    made = [small(compile=True, seed=s, loss=l) for s in (0, 1) for l in ('ce', 'both')] + [
        small(compile=True, precision='bfloat16'),
        small(compile=True, width=4),
        small(compile=True, width=4),
    ]
    counts = []
    for c in made:
        build_learner(c, build_dls(c, device='cpu'))
        counts.append(len(reset))
    assert counts == [1, 1, 1, 1, 2, 3, 3] and options == [dict(dynamic=False)] * 7


# --- files


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    "A run with a checkpoint after its first epoch"

    class Stop(engine.Deadline):
        def before_epoch(self):
            if self.learn.epoch == 1:
                self.stop()
            super().before_epoch()

    c = small()
    with monkeypatch.context() as m:
        m.setattr(engine, 'Deadline', Stop)
        assert run(c, tmp_path) is None
    return c, tmp_path, tmp_path / 'checkpoints' / f'{c.run_id}.pt'


def test_records_and_checkpoints_in_one_folder(tmp_path):
    "A record that is there already is not one that was rescued"
    record = train(small(), tmp_path, tmp_path, verbose=False, device='cpu')
    (tmp_path / f'{small().run_id}.pt').write_bytes(b'killed before this was removed')
    assert train(small(), tmp_path, tmp_path, verbose=False, device='cpu') == record
    assert sorted(o.suffix for o in tmp_path.iterdir()) == ['.json', '.npz']


def test_what_a_killed_process_left_is_removed_everywhere(tmp_path):
    left = [tmp_path / folder / f'{small().run_id}.x.999999999.0.tmp' for folder in ('results', 'checkpoints', 'nets')]
    for file in left:
        file.parent.mkdir()
        file.touch()
    run(small(epochs=1), tmp_path, weights=tmp_path / 'nets')
    assert all(file.exists() for file in left)  # of another run
    run(small(), tmp_path, weights=tmp_path / 'nets')
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize('folder', ['../elsewhere', '.hidden', Path('/elsewhere').absolute()])
def test_a_record_goes_where_it_is_found_again(tmp_path, folder):
    with pytest.raises(ValueError, match='expected a path below results'):
        run(small(), tmp_path, folder=folder)


def test_more_images_than_there_are(tmp_path):
    with pytest.raises(ValueError, match='train_per_class=57, but a class has only 56'):
        engine.load_images(small(train_per_class=57))
    assert len(engine.load_images(small(train_per_class=56))[0].labels) == 560


def test_damaged_checkpoints_are_named(stopped):
    c, folder, path = stopped
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, len(good), 12).tolist(), 0, len(good) - 1]:
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path, c)
    for size in (0, 10, 40, 2000, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError, match=path.name):
            run(c, folder)
    path.write_bytes(b'PK\x03\x04 something else')
    with pytest.raises(CheckpointError, match='--restart'):
        run(c, folder)
    assert run(c, folder, restart=True)['seconds']['sessions'] == 1


def test_a_checkpoint_with_another_number_in_its_header_is_named(stopped):
    c, _, path = stopped
    good = path.read_bytes()
    place = good.index(b'"seconds": ') + len(b'"seconds": ')
    path.write_bytes(good[:place] + (b'2' if good[place : place + 1] == b'1' else b'1') + good[place + 1 :])
    assert read_checkpoint_header(path)['epoch'] == 0
    with pytest.raises(CheckpointError, match=f'{path.name} is damaged'):
        load_checkpoint(path, c)


def test_seconds_add_up_over_the_sessions(stopped):
    c, folder, path = stopped
    header, state = load_checkpoint(path, c)
    save_checkpoint(path, {**header, 'seconds': 1000.0}, state)
    seconds = run(c, folder)['seconds']
    assert 1000 < seconds['training'] < 1000 + seconds['session'] and seconds['sessions'] == 2


def test_foreign_checkpoint(stopped):
    c, folder, path = stopped
    other = replace(c, seed=1)
    path.rename(path.with_name(f'{other.run_id}.pt'))
    with pytest.raises(CheckpointError, match='seed=0 instead of 1'):
        run(other, folder)


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'run.pt'
    save_checkpoint(path, dict(epoch=0), dict(a=torch.arange(3)))

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
        save_checkpoint(path, dict(epoch=1), dict(a=torch.arange(4)))
    assert read_checkpoint_header(path) == dict(epoch=0) and len(load_checkpoint(path)[1]['a']) == 3
    assert [o.name for o in tmp_path.iterdir()] == ['run.pt']


def test_full_disk_does_not_end_the_run(tmp_path, monkeypatch):
    c, save = small(), checkpoints.save_checkpoint
    run(c, tmp_path / 'whole')

    def full(path, header, state):
        if header['epoch'] == 1:
            raise OSError(28, 'No space left on device')
        save(path, header, state)

    monkeypatch.setattr(checkpoints, 'save_checkpoint', full)
    with pytest.warns(UserWarning, match='epoch 1 was not saved'):
        run(c, tmp_path / 'full')
    assert_same(c, tmp_path / 'whole', tmp_path / 'full')


def full_for(*folders):
    "A `write_record` for which the disk of these folders is full"

    def write(folder, *args):
        if not folders or Path(folder) in map(Path, folders):
            raise OSError(28, 'No space left on device', str(folder))
        return records.write_record(folder, *args)

    return write


def test_full_disk_at_the_record_keeps_the_checkpoint(tmp_path, monkeypatch):
    "No folder has room for the record: the error names the checkpoint, and the run can be finished from it"
    c = small(epochs=2)
    with monkeypatch.context() as m:
        m.setattr(engine, 'write_record', full_for())
        with pytest.raises(
            OSError,
            match=r'the record could not be written .*No space left on device.*trained network is in .*read just now',
        ) as e:
            run(c, tmp_path)
    path = tmp_path / 'checkpoints' / f'{c.run_id}.pt'
    assert str(path) in str(e.value) and read_checkpoint_header(path)['epoch'] == 1
    run(c, tmp_path)
    run(c, tmp_path / 'whole')
    assert_same(c, tmp_path / 'whole', tmp_path)


def test_a_record_without_room_goes_beside_the_checkpoint_and_comes_home(tmp_path, monkeypatch):
    c, results, checkpoint_folder = small(epochs=2), tmp_path / 'results', tmp_path / 'checkpoints'
    with monkeypatch.context() as m:
        m.setattr(engine, 'write_record', full_for(results))
        with pytest.raises(OSError, match='could not be written .* It is in .*start the same run again') as e:
            run(c, tmp_path)
    left = checkpoint_folder / f'{c.run_id}.json'
    assert (
        repr(str(left)) in str(e.value)
        and records.read_record(str(left))['run_id'] == c.run_id
        and not list(results.iterdir())
    )
    monkeypatch.setattr(engine, 'build_dls', lambda *args: pytest.fail("trained again"))
    run(c, tmp_path)
    assert not list(checkpoint_folder.iterdir()) and len(list(results.iterdir())) == 2


def test_a_record_without_room_goes_to_the_temporary_folder(tmp_path, monkeypatch):
    "Also if no checkpoint could be saved: the message names only what is there"
    c = small(epochs=2)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints, 'save_checkpoint', full)
    monkeypatch.setattr(engine, 'write_record', full_for(tmp_path / 'results', tmp_path / 'checkpoints'))
    monkeypatch.setattr(engine.tempfile, 'tempdir', str(tmp_path))
    with pytest.warns(UserWarning, match='epoch 0 was not saved .*there is no good checkpoint, training continues'):
        with pytest.raises(OSError, match='It is in .*move both files to') as e:
            run(c, tmp_path)
    (left,) = tmp_path.glob('gini_loss-*/*.json')
    assert repr(str(left)) in str(e.value) and records.read_record(str(left))['run_id'] == c.run_id
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_without_any_room_the_process_waits_with_what_it_has(tmp_path, monkeypatch, capsys):
    c, waited, room = small(epochs=2), [], [full_for()]

    def full(*args):
        raise OSError(28, 'No space left on device')

    def wait(seconds):
        waited.append(seconds)
        room[0] = records.write_record  # somebody freed a folder

    monkeypatch.setattr(checkpoints, 'save_checkpoint', full)
    monkeypatch.setattr(engine, 'write_record', lambda *args: room[0](*args))
    monkeypatch.setattr(engine.time, 'sleep', wait)
    with pytest.warns(UserWarning), pytest.raises(OSError, match='It is in'):
        run(c, tmp_path)
    assert waited == [60] and 'next try in a minute' in capsys.readouterr().err
    assert (tmp_path / 'checkpoints' / f'{c.run_id}.json').exists()


SMALL_DISK = '''
mount -t tmpfs -o size=3m none {disk} || exit 77
mkdir {disk}/r {disk}/c
head -c {fill} /dev/zero > {disk}/fill
{command}
echo "status $?"
ls {disk}/c {disk}/r
'''


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="mounts a tmpfs")
@pytest.mark.parametrize('left', [196_608, 4096], ids=['no room for a checkpoint', 'no room for the record'])
def test_results_and_checkpoints_on_a_small_tmpfs(tmp_path, left):
    "There is no room for a checkpoint: the record is in the results folder, or where the error says"
    c, disk, spare = small(epochs=2, width=32), tmp_path / 'disk', tmp_path / 'spare'
    disk.mkdir()
    spare.mkdir()
    options = '--preset test --width 32 --epochs 2 --train-per-class 10 --device cpu --no-weights --checkpoint-every 1'
    args = ['-m', 'gini_loss.train', *options.split(), *where(disk)]
    script = SMALL_DISK.format(disk=disk, fill=3 * 2**20 - left, command=' '.join([sys.executable, *args]))
    try:
        done = subprocess.run(
            ['unshare', '-Urm', 'sh', '-c', script], env={**ENV, 'TMPDIR': str(spare)}, capture_output=True, text=True
        )
    except OSError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or 'unshare' in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert 'epoch 1 was not saved' in done.stderr and 'there is no good checkpoint' in done.stderr, done.stderr
    name = f'{c.run_id}.json'
    if left > 100_000:
        assert 'status 0' in done.stdout and name in done.stdout
        return
    (file,) = spare.glob('gini_loss-*/*.json')
    assert 'status 1' in done.stdout and f'It is in {str(file)!r}' in done.stderr and file.name == name
    assert records.read_record(str(file))['run_id'] == c.run_id and name not in done.stdout


def test_lock(tmp_path):
    c = small(epochs=1, start_epoch=0)
    path = tmp_path / 'checkpoints' / f'{c.run_id}.lock'
    with RunLock(path):
        assert is_locked(path)
        with pytest.raises(RunLocked, match=str(os.getpid())):
            run(c, tmp_path)
    assert not is_locked(path) and not path.exists()
    path.write_text('process 1')  # left by a process that is no more
    run(c, tmp_path)


def test_record_is_not_trained_twice(tmp_path, monkeypatch):
    c = small(epochs=1, start_epoch=0)
    first = run(c, tmp_path, folder='some/where')
    monkeypatch.setattr(engine, 'build_dls', lambda *args: pytest.fail("trained again"))
    assert run(c, tmp_path) == first


def test_nan_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='NaN or infinite'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run(small(optimizer='sgd', lr=1e30, loss='ce'), tmp_path)


# --- command line


def test_command_line(tmp_path, capsys):
    assert main(['--arch', 'resnet50', '--loss', 'kl', '--reverse-kl', '--dropout', '0.4', '--show']) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (
        shown['reverse_kl'] is True
        and shown['dropout'] == 0.4
        and shown['epochs'] == 250
        and shown['milestones'] == [60, 120, 160, 200]
    )
    assert main(['--arch', 'vgg']) == 1 and 'resnet17' in capsys.readouterr().err
    assert main(['--preset', 'test', '--epochs', 'many']) == 1 and "epochs='many'" in capsys.readouterr().err
    assert main(['--preset', 'test', '--budget', '0', *where(tmp_path)]) == 3


@pytest.mark.parametrize('option', ['--results', '--checkpoints'])
@pytest.mark.parametrize('kind', ['a file', 'below a file', 'of the system'])
def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, capsys, option, kind):
    (tmp_path / 'afile').write_text('')
    folder = {
        'a file': tmp_path / 'afile',
        'below a file': tmp_path / 'afile' / 'deeper',
        'of the system': Path('/proc/nope'),
    }[kind]
    if kind == 'of the system' and not Path('/proc/self').exists():
        pytest.skip("no /proc here")
    monkeypatch.setattr(engine, 'build_dls', lambda *args: pytest.fail("trained first"))
    other = '--checkpoints' if option == '--results' else '--results'
    assert main(['--preset', 'test', option, str(folder), other, str(tmp_path / 'fine')]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f'gini_train: cannot write to the folder {str(folder)!r} (') and err.count('\n') == 1


@pytest.mark.parametrize(
    'options,status,message',
    [
        (['--device', 'cuda:99'], 1, "there is no device 'cuda:99'"),
        (['--device', 'foo'], 1, "there is no device 'foo'"),
        (['--threads', '-1'], 2, "expected a whole number of at least 1, got '-1'"),
        (['--checkpoint-every', '0'], 2, "expected a whole number of at least 1, got '0'"),
        (['--lambda-gini', 'inf'], 1, "lambda_gini must be finite"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, options, status, message):
    try:
        got = main(['--preset', 'test', *where(tmp_path), *options])
    except SystemExit as e:
        got = e.code
    assert got == status and message in capsys.readouterr().err
    assert not (tmp_path / 'r').exists()


def test_an_error_in_a_callback_says_why(tmp_path, capsys):
    assert main([*SHORT, *where(tmp_path), '--layer', 'nope']) == 1
    assert capsys.readouterr().err.startswith("gini_train: there is no layer 'nope'")


def test_a_run_that_is_done_says_so(tmp_path, capsys):
    args = [*SHORT, *where(tmp_path)]
    assert main(args) == 0 and 'is done' not in capsys.readouterr().out
    assert main(args) == 0
    out = capsys.readouterr().out
    assert 'is done: its record is' in out and out.count('\n') == 1


def test_the_last_relu_of_resnet17_is_there_unless_the_configuration_says_so():
    x = torch.rand(8, 3, 32, 32)
    found = [engine.build_model(small(arch='resnet17', final_relu=on), 10).eval()(x).min() for on in (True, False)]
    assert found[0] >= 0 > found[1]


def test_the_terms_over_the_validation_images_have_the_options_of_the_configuration():
    c = small(arch='cvt7', width=6, epochs=1, start_epoch=0, rectify='relu', reverse_kl=True)
    dls = build_dls(c, device='cpu')
    learn = build_learner(c, dls)
    learn.fit(1)
    model, layer = learn.plain_model, FeatureTap(learn.plain_model, c.layer).name
    features = engine.predict(model, dls.valid, layer, 'relu')[1]
    expected = diagnostics(features, dls.valid.dataset.labels, dls.c, reverse_kl=True)
    found = [learn.epoch_log.columns[name][-1] for name in ('valid_gini', 'valid_kl')]
    assert found == pytest.approx([expected.gini, expected.kl], rel=1e-4)


def test_resnet17_without_its_last_relu_trains(tmp_path):
    record = run(small(arch='resnet17', final_relu=False, epochs=1, start_epoch=0), tmp_path)
    assert (
        record['config']['final_relu'] is False
        and record['run_id'] != small(arch='resnet17', epochs=1, start_epoch=0).run_id
    )


def test_no_record_of_synthetic_images_says_cifar(tmp_path):
    record = run(small(epochs=1, start_epoch=0), tmp_path)
    assert record['config']['data'] == 'synthetic' and record['last']['caltech_accuracy'] is None
    assert not any(part in json.dumps(record) for part in ('/tmp', '/home', os.uname().nodename))


@pytest.fixture
def two_domains(tmp_path):
    "Folders of CIFAR-100, with five of its classes, and of Caltech 101: a colour for each class, less clear in the second"
    from PIL import Image

    rng = np.random.default_rng(0)
    cifar, caltech = tmp_path / 'cifar100', tmp_path / 'caltech101' / '101_ObjectCategories'
    colors = dict(apple=(0, 0, 0), beaver=(150, 0, 0), crab=(0, 150, 0), lobster=(0, 0, 150), wolf=(150, 150, 0))

    def save(path, name, size, shift):
        path.parent.mkdir(parents=True, exist_ok=True)
        color = np.array(colors.get(name, (75, 75, 75))) + rng.integers(0, shift, 3)
        pixels = color + rng.integers(0, 40, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)

    for name in colors:
        for split, n in (('train', 20), ('test', 4)):
            for i in range(n):
                save(cifar / split / 'some' / name / f'{name}_{i}.png', name, 32, 20)
    for name, (_, n) in CALTECH12.items():
        for i in range(n):
            save(caltech / name / f'image_{i:04d}.jpg', name, 8, 200)
    return dict(data_root=cifar, caltech_root=tmp_path)


def test_caltech_is_scored_by_the_names_of_its_classes(tmp_path, two_domains):
    "Among all classes of the network, and among those that Caltech 101 has; images of other classes are left out"
    names = ['beaver', 'crab', 'lobster', 'wolf']
    c = small(epochs=12, start_epoch=0, data='cifar100', classes='+'.join(names), milestones=())
    record = run(c, tmp_path, weights=tmp_path / 'w', **two_domains)
    loaded = engine.load_run(tmp_path / 'w' / f'{c.run_id}.safetensors')
    assert loaded.classes == names
    images, labels = load_caltech12(two_domains['caltech_root'])
    position = {label: names.index(name) for name, (label, _) in CALTECH12.items() if name in names}
    kept = torch.tensor([int(label) in position for label in labels])
    truth = torch.tensor([position[int(label)] for label in labels[kept]])
    with torch.no_grad():
        logits = loaded.model(loaded.transform(images[kept]))
    among_all, among_shared = logits.argmax(1), logits[:, :3].argmax(1)  # Caltech 101 has no wolf
    accuracies = [(pred == truth).double().mean().item() for pred in (among_all, among_shared)]
    assert [record['last'][f'caltech_{name}'] for name in ('accuracy', 'accuracy_12')] == accuracies
    assert len(truth) == 46 + 73 + 41 and 0.3 < accuracies[0] < accuracies[1] < 1
    found = arrays(tmp_path, c)
    assert np.array_equal(found['last_caltech_pred'], among_all)
    assert np.array_equal(found['last_caltech_pred_12'], among_shared)


# --- switches


@pytest.mark.parametrize(
    'changes',
    [
        dict(precision='bfloat16'),
        dict(channels_last=True, width=8),
        dict(precision='float64'),
        dict(arch='cvt7', width=6),
        dict(arch='resnet17'),
    ],
    ids=str,
)
def test_switches_train(tmp_path, changes):
    record = run(small(epochs=2, **changes), tmp_path)
    assert record['epochs']['train_loss'][-1] < record['epochs']['train_loss'][0]


def test_compiled_and_eager_agree(tmp_path, code_generator):
    c = small(epochs=2, lr=1e-4, width=8)
    eager, compiled = run(c, tmp_path), run(replace(c, compile=True), tmp_path)
    for column in ('train_loss', 'train_gini', 'train_kl'):
        assert np.allclose(eager['epochs'][column], compiled['epochs'][column], atol=1e-3)
    for column in ('grad_main', 'grad_gini', 'grad_kl'):  # both say how hard the terms pulled
        assert np.allclose(eager['epochs'][column], compiled['epochs'][column], rtol=5e-2)


# --- several processes


def torchrun(n, *args):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), *args]


def weights_after_ten_steps(folder, *options, turned=False, processes=1):
    "The network's state and the columns of its log"
    path = folder / f'{processes}-{turned}.pt'
    finish(*(start(train_an_epoch, path, *options, turned, rank, processes) for rank in range(processes)))
    return torch.load(path)


def largest_difference(one, other):
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


@pytest.mark.parametrize('arch', ['resnet18', 'cvt7'])
def test_two_processes_give_the_weights_of_one(tmp_path, arch):
    (one, a), (two, b) = (weights_after_ten_steps(tmp_path, arch, 'float64', 0.05, processes=n) for n in (1, 2))
    assert largest_difference(one, two) < 1e-6
    for k in ('train_loss', 'train_gini', 'train_kl'):
        assert np.allclose(a[k], b[k], rtol=0, atol=1e-6)


def test_two_processes_in_single_precision_differ_by_rounding(tmp_path):
    "By no more than one process differs when the images of a batch are in another order"
    options = 'resnet18', 'float32', 0.001
    one, turned = (weights_after_ten_steps(tmp_path, *options, turned=t)[0] for t in (False, True))
    two = weights_after_ten_steps(tmp_path, *options, processes=2)[0]
    rounding = largest_difference(one, turned)
    assert 0 < largest_difference(one, two) < max(10 * rounding, 1e-5), (rounding, largest_difference(one, two))


def accelerate_launch(n, *args):
    options = f'--multi_gpu --num_processes {n} --num_machines 1 --mixed_precision no --dynamo_backend no'
    return [sys.executable, '-m', 'accelerate.commands.launch', *options.split(), '--main_process_port', '0', *args]


@pytest.mark.parametrize('launch', [torchrun, accelerate_launch], ids=['torchrun', 'accelerate launch'])
def test_the_same_command_in_two_processes(tmp_path, launch):
    if launch is accelerate_launch:
        pytest.importorskip('accelerate')
    args = ['-m', 'gini_loss.train', *command(tmp_path, small(epochs=2))]
    done = subprocess.run(launch(2, *args), env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(next((tmp_path / 'results').glob('*.json')).read_text())
    assert record['hardware']['processes'] == 2 and record['run_id'] == small(epochs=2).run_id
    assert not list((tmp_path / 'checkpoints').iterdir())


def test_help_tells_every_field(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    said = capsys.readouterr().out.replace('\n', ' ')
    said = ' '.join(said.split())
    for text in (
        'images in a batch, over all processes',
        'dotted name of the tapped layer',
        'learning rate at the start',
        'first epoch with the terms, counted from 0',
    ):
        assert text in said


def test_stopped_from_the_keyboard(tmp_path, monkeypatch, capsys, stopped):
    "The message describes the checkpoint that is there"
    c, folder, path = stopped

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, 'train', interrupted)
    args = ['--preset', 'test', '--epochs', '3', '--train-per-class', '10', '--results', str(tmp_path), '--checkpoints']
    assert main([*args, str(folder / 'checkpoints')]) == 130
    assert 'the checkpoint of epoch 0 is there. The same command continues from there' in capsys.readouterr().err
    assert main([*args, str(tmp_path / 'none')]) == 130
    assert 'there is no good checkpoint. The same command starts afresh' in capsys.readouterr().err


# --- a lock


def test_a_look_at_a_lock_refuses_nobody(tmp_path):
    "Looking takes a shared lock for a moment: a process that wants the run waits, and two looks do not disturb each other"
    fcntl = pytest.importorskip('fcntl')
    path = tmp_path / 'a.lock'
    path.write_text('')
    looks = open(path, 'rb')
    fcntl.flock(looks, fcntl.LOCK_SH)
    assert not is_locked(path)
    threading.Timer(0.15, looks.close).start()
    with RunLock(path):
        assert is_locked(path)
    assert not path.exists()


def test_looking_does_not_change_the_lock(tmp_path):
    with RunLock(tmp_path / 'a.lock'):
        before = (tmp_path / 'a.lock').read_bytes()
        assert (
            is_locked(tmp_path / 'a.lock')
            and (tmp_path / 'a.lock').read_bytes() == before == f'process {os.getpid()}'.encode()
        )
    assert not is_locked(tmp_path / 'none.lock') and not list(tmp_path.iterdir())


@pytest.mark.skipif(checkpoints.fcntl is None, reason="Windows locks files in another way")
@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints.fcntl, 'flock', flock)
    assert main([*SHORT, *where(tmp_path)]) == 1
    assert 'cannot lock files' in (err := capsys.readouterr().err) and 'choose another folder for the checkp' in err
    assert not any(is_locked(file) for file in (tmp_path / 'c').iterdir())


def test_a_link_is_no_lock(tmp_path):
    "Its target may be another user's file"
    (tmp_path / 'precious').write_text('of somebody')
    (tmp_path / 'a.lock').symlink_to(tmp_path / 'precious')
    with pytest.raises(OSError, match='a.lock.* is a symlink, expected a plain file'):
        with RunLock(tmp_path / 'a.lock'):
            pass
    assert (tmp_path / 'precious').read_text() == 'of somebody'


def test_many_processes_want_one_lock(tmp_path):
    "Each gets it in turn, never two at a time"
    finish(*(start(take_a_lock_often, tmp_path / 'a.lock', tmp_path / 'held') for _ in range(3)))
    assert not (tmp_path / 'a.lock').exists()


# --- checkpoints that cannot be of this run


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda h, s: h.update(epoch=7), 'is of epoch 7, but the epochs of this run are 0 to 2'),
        (lambda h, s: h.update(epoch=1), 'does not have 2 epochs'),
        (lambda h, s: s['best'].update(epoch=2), 'best epoch is not one of 0 to 0'),
        (lambda h, s: s['columns'].update(train_loss=1.0), 'does not have 1 epochs'),
        (lambda h, s: s.pop('optimizer'), 'does not hold a whole run'),
        (lambda h, s: s.update(model={}), 'does not fit this run'),
        (lambda h, s: s['loader'].update(bs=7), 'does not fit this run'),
        (lambda h, s: h.pop('sessions'), 'lacks sessions'),
    ],
)
def test_implausible_checkpoints_are_refused_before_training(stopped, monkeypatch, change, message):
    c, folder, path = stopped
    header, state = load_checkpoint(path)
    change(header, state)
    save_checkpoint(path, header, state)
    before = path.read_bytes()
    monkeypatch.setattr(engine.EpochLog, 'before_epoch', lambda self: pytest.fail("trained first"))
    with pytest.raises(CheckpointError, match=message):
        run(c, folder)
    assert path.read_bytes() == before and not list((folder / 'results').rglob('*.json'))


def test_a_compressed_state_is_not_unpacked(tmp_path):
    "A few kilobytes can state that they unpack to gigabytes"
    import io, struct, zipfile

    save_checkpoint(tmp_path / 'a.pt', {}, dict(a=torch.ones(2)))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', bytes(10_000_000))
    head, payload = b'{}', packed.getvalue()
    digest = checkpoints.hashlib.blake2b(head + bytes(1) + payload, digest_size=32).digest()
    (tmp_path / 'b.pt').write_bytes(
        checkpoints.CHECKPOINT_MAGIC + struct.pack('<Q', len(head)) + head + digest + payload
    )
    assert (tmp_path / 'b.pt').stat().st_size < 20_000
    monkey = torch.load
    try:
        torch.load = lambda *args, **options: pytest.fail("unpacked")
        with pytest.raises(CheckpointError, match='b.pt'):
            load_checkpoint(tmp_path / 'b.pt')
    finally:
        torch.load = monkey


def test_a_tensor_that_states_more_than_is_stored_is_refused(tmp_path):
    save_checkpoint(tmp_path / 'a.pt', {}, dict(a=[torch.zeros(1).expand(10**6)]))
    with pytest.raises(CheckpointError, match='a.pt cannot be read'):
        load_checkpoint(tmp_path / 'a.pt')


def test_durations_are_never_negative(tmp_path, monkeypatch):
    "A clock that jumps back a day"
    clock, now = [0.0], time.perf_counter
    monkeypatch.setattr(time, 'perf_counter', lambda: now() - clock[0])

    class Jump(engine.Deadline):
        def after_batch(self):
            clock[0] += 86_400.0
            super().after_batch()

    monkeypatch.setattr(engine, 'Deadline', Jump)
    record = run(small(epochs=2), tmp_path)
    assert min([*record['seconds'].values(), *record['epochs']['seconds']]) >= 0


# --- invalid records


@pytest.mark.parametrize('damage', ['empty', 'cut', 'foreign', 'no npz'])
def test_a_record_that_cannot_be_read_is_not_done(tmp_path, capsys, damage):
    c = small(epochs=1, start_epoch=0)
    run(c, tmp_path)
    file = tmp_path / 'results' / f'{c.run_id}.json'
    if damage == 'empty':
        file.write_bytes(b'')
    elif damage == 'cut':
        file.write_bytes(file.read_bytes()[:300])
    elif damage == 'foreign':
        file.write_text('{"format": 1}')
    else:
        file.with_suffix('.npz').unlink()
    args = [*SHORT, *where(tmp_path, 'results')]
    assert main(args) == 1
    err = capsys.readouterr().err
    assert file.name in err and err.count('\n') == 1


# --- options


@pytest.mark.parametrize(
    'options,status,message',
    [
        (['--device', 'meta'], 1, "the device 'meta' cannot be used here"),
        (['--device', 'xpu'], 1, "the device 'xpu' cannot be used here"),
        (['--seed', str(2**64)], 1, 'seed must be at most'),
        (['--budget', 'nan'], 2, "expected a number of seconds of at least 0, got 'nan'"),
        (['--budget', '-1'], 2, "expected a number of seconds"),
        (['--log', 'wandb'], 1, 'wandb is not installed, and --log wandb needs it: pip install wandb'),
        (['--log', 'paper'], 2, 'tensorboard'),
    ],
)
def test_what_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, options, status, message):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setattr(engine, 'build_dls', lambda *args: pytest.fail("trained first"))
    try:
        got = main(['--preset', 'test', *where(tmp_path), *options])
    except SystemExit as e:
        got = e.code
    err = capsys.readouterr().err
    assert got == status and message in err and 'Traceback' not in err
    assert status == 2 or len(err) < 300


@pytest.mark.parametrize('name', ['mps', 'xpu'])
def test_a_device_of_another_machine(name):
    try:
        torch.ones(1, device=name).item()
    except Exception:
        pass
    else:
        pytest.skip(f"there is a device {name} here")
    with pytest.raises(ValueError, match=f"the device '{name}' cannot be used here"):
        engine.find_device(name)


def test_a_device_without_double_precision(tmp_path, monkeypatch):
    "Sums are in single precision; a run in double precision raises an error before training"
    monkeypatch.setattr(engine, 'widest_float', lambda device: torch.float32)
    record = run(small(epochs=1, start_epoch=0), tmp_path)
    assert 0 < record['epochs']['train_loss'][0] < 10
    with pytest.raises(ValueError, match="no double precision"):
        run(small(precision='float64'), tmp_path)


# --- keeping the network


def test_the_command_keeps_the_network(tmp_path):
    args = [*SHORT, *where(tmp_path)]
    c = small(epochs=1, start_epoch=0)
    assert main([*args, '--seed', '1', '--no-weights']) == 0 and not (tmp_path / 'weights').exists()
    assert main(args) == 0
    loaded = engine.load_run(tmp_path / 'weights' / f'{c.run_id}.safetensors')
    record = records.read_record(c.run_id, tmp_path / 'r')
    images, labels = engine.load_images(c)[2]
    with torch.no_grad():
        right = (loaded.model(loaded.transform(images)).argmax(1) == labels).double().mean().item()
    assert right == record['last']['test_accuracy'] and not loaded.model.training
    assert loaded.config == c and loaded.classes == [f'pattern {i}' for i in range(10)]


@pytest.mark.parametrize('changes', [{}, dict(normalize=True, channels_last=True), dict(precision='float64')], ids=str)
def test_the_transform_is_that_of_the_evaluation(tmp_path, changes):
    from PIL import Image

    c = small(epochs=1, start_epoch=0, **changes)
    run(c, tmp_path, weights=tmp_path / 'w')
    state = torch.get_rng_state()
    loaded = engine.load_run(tmp_path / 'w' / f'{c.run_id}.safetensors')
    assert torch.equal(state, torch.get_rng_state())
    batch = next(iter(build_dls(c, device='cpu')[2]))[0]
    images = engine.load_images(c)[2].images
    assert torch.equal(loaded.transform(images[: len(batch)]), batch) and loaded.transform(images).dtype == batch.dtype
    picture = Image.fromarray(images[3].permute(1, 2, 0).numpy())
    picture.save(tmp_path / '3.png')
    assert torch.equal(loaded.transform([picture, tmp_path / '3.png']), batch[[3, 3]])
    with pytest.raises(TypeError, match='uint8'):
        loaded.transform(torch.rand(3, 32, 32))


def test_a_full_disk_at_the_weights_does_not_cost_the_record(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(engine.models, 'save_network', full)
    with pytest.warns(UserWarning, match='the trained network was not saved .No space left'):
        assert run(small(epochs=1, start_epoch=0), tmp_path, weights=tmp_path / 'w') is not None


# --- logs


def test_log_of_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c = small(epochs=2)
    record = run(c, tmp_path, log='tensorboard', log_folder=tmp_path / 'logs')
    events = EventAccumulator(str(tmp_path / 'logs' / c.run_id))
    events.Reload()
    for tag in (
        'train/loss',
        'train/accuracy',
        'valid/loss',
        'valid/accuracy',
        'train/gini',
        'train/kl',
        'pull/gini',
        'pull/kl',
        'lr',
    ):
        column = tag.replace('/', '_')
        assert [e.step for e in events.Scalars(tag)] == [0, 1]
        assert [e.value for e in events.Scalars(tag)] == pytest.approx(record['epochs'][column], rel=1e-5)


def test_log_of_tensorboard_has_each_epoch_once_after_an_interruption(tmp_path):
    "The second session starts at an epoch that the first one had logged, but not saved"
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    c, rows = small(epochs=3), []
    for first, last in ((0, 2), (1, 3)):
        learn = build_learner(c, build_dls(c, device='cpu'), [engine.RunLog('tensorboard', tmp_path, c)])
        learn.fit_from(first, last)
        rows.append(learn.epoch_log.columns['train_loss'])
    events = EventAccumulator(str(tmp_path / c.run_id))
    events.Reload()
    logged = events.Scalars('train/loss')
    assert [e.step for e in logged] == [0, 1, 2]
    assert [e.value for e in logged] == pytest.approx([rows[0][0], *rows[1]], rel=1e-5)


def test_log_of_wandb(tmp_path, monkeypatch):
    rows, begun = [], []

    class Run:
        def log(self, values, step):
            rows.append((step, values))

        def finish(self):
            rows.append('finished')

    fake = types.ModuleType('wandb')
    fake.init = lambda **options: begun.append(options) or Run()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    c = small(epochs=2)
    run(c, tmp_path, log='wandb', log_folder=tmp_path / 'logs')
    assert begun[0]['id'] == c.run_id and begun[0]['config']['bs'] == c.bs
    assert (
        [step for step, _ in rows[:2]] == [0, 1]
        and rows[2] == 'finished'
        and {'train/loss', 'pull/kl', 'valid/accuracy'} <= set(rows[0][1])
    )
