"Studies on synthetic images: files, order, budget, workers, the state of runs."

import json, os, signal, subprocess, sys, time, warnings
from pathlib import Path
import pytest
import torch

warnings.filterwarnings('ignore', category=FutureWarning)
from gini_loss import study as module
from gini_loss.records import environment, read_predictions, write_record
from gini_loss.study import Study, list_studies, load_study, main, run_study, study_state
from gini_loss.train import RunLock, recipe
from made_up import put
from processes import finish, import_engine, start
from processes import run_study as run_study_command


def tiny(*seeds):
    return Study(
        'tiny',
        'tiny',
        [recipe('test', loss=l, seed=s, epochs=2, train_per_class=4) for s in seeds or (0,) for l in ('ce', 'both')],
    )


def folders(tmp_path):
    return dict(results=str(tmp_path / 'results'), checkpoints=str(tmp_path / 'checkpoints'))


def command(folder, runs, *options):
    "Write a study of these lines, and return the arguments of `gini_study` for it"
    path = folder / 'small.ini'
    path.write_text('\n'.join(['[runs]', 'preset = test', 'train_per_class = 4', *runs]))
    return [str(path), '--results', str(folder / 'r'), '--checkpoints', str(folder / 'c'), '--device', 'cpu', *options]


def run_command(start, args, **options):
    "Run the command in a new interpreter, started with `start` and `args`"
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.run([sys.executable, *start, *args], env=env, capture_output=True, text=True, **options)


def test_shipped_studies():
    assert {'table1', 'table2', 'kl-direction', 'lambda', 'start-epoch', 'layer', 'laptop'} <= set(list_studies())
    sizes = {name: len(load_study(name).configs) for name in list_studies()}
    assert sizes['table1'] == 40 and sizes['table2'] == 20 and sizes['kl-direction'] == 15 and sizes['laptop'] == 12
    for name in list_studies():
        study = load_study(name)
        assert study.title and len({c.run_id for c in study.configs}) == len(study.configs)
    assert {c.data for name in list_studies() if name != 'test' for c in load_study(name).configs} == {'cifar100'}


@pytest.mark.parametrize(
    'text,message',
    [
        ('[runs]\nlos = ce', 'los is not a field'),
        ('[runs]\nloss = all', 'ce, gini, kl, both'),
        ('[runs]\nseed = x', "seed='x'"),
        ('[runs]\nseed =\n[more]\nseed = 1', r'\[runs\]: seed has no value'),
        ('[runs]\nseed = 4-0\n[more]\nseed = 1', r'\[runs\]: seed=4-0: a range must go up'),
        ('[study]\ntitle = a', 'lists no runs'),
        ('seed = 0', 'no section'),
        ('[runs]\npreset = desk', 'desk'),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / 'bad.ini'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_study(path)


def test_a_file_of_another_encoding(tmp_path):
    path = tmp_path / 'old.ini'
    path.write_bytes('[runs]\n# café\nloss = ce\n'.encode('latin-1'))
    with pytest.raises(ValueError, match='old.ini is not UTF-8'):
        load_study(path)


def test_values(tmp_path):
    path = tmp_path / 'a.ini'
    path.write_text(
        '[runs]\nloss = both # a remark\nseed = 0-1 7\nreverse_kl = no yes\nlayer = none layer3\nmilestones = 3, 5\n'
    )
    configs = load_study(path).configs
    assert [c.seed for c in configs] == [0] * 4 + [1] * 4 + [7] * 4
    assert {(c.reverse_kl, c.layer) for c in configs} == {(a, b) for a in (False, True) for b in (None, 'layer3')}
    assert all(c.milestones == (3, 5) for c in configs)
    assert {c.precision for c in load_study(path, precision='bfloat16').configs} == {'bfloat16'}


def test_nothing_twice_in_any_folder(tmp_path, monkeypatch):
    study = tiny()
    assert run_study(study, **folders(tmp_path), verbose=False)['done'] == 2
    assert len(list((tmp_path / 'results' / 'tiny').glob('*.json'))) == 2
    (tmp_path / 'results' / 'tiny').rename(tmp_path / 'results' / 'elsewhere')
    monkeypatch.setattr('gini_loss.train.build_dls', lambda *a: pytest.fail("trained again"))
    assert run_study(study, **folders(tmp_path), verbose=False) == dict(done=2, failed=0, locked=0, no_time=0)


def test_locked_and_failing_runs_do_not_stop_the_others(tmp_path, capsys):
    study = tiny(0, 1)
    first, second = study.configs[:2]
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / f'{second.run_id}.pt').write_bytes(b'junk')
    with RunLock(tmp_path / 'checkpoints' / f'{first.run_id}.lock'):
        assert [s.state for s in study_state(study, **folders(tmp_path))] == [
            'running',
            'stopped',
            'missing',
            'missing',
        ]
        assert run_study(study, **folders(tmp_path), verbose=False) == dict(done=2, failed=1, locked=1, no_time=0)
    assert second.run_id in capsys.readouterr().err


@pytest.mark.parametrize('where', ['here', 'elsewhere'])
def test_budget_starts_nothing_that_does_not_fit(tmp_path, where):
    "By the time of recorded runs on this device. A run that is done needs no time"
    study, (slow,) = tiny(0, 1), tiny(2).configs[:1]
    run_study(Study('tiny', '', study.configs[:1]), **folders(tmp_path), verbose=False)
    name = environment('cpu')['hardware']['device_name'] if where == 'here' else 'a slower one'
    for path in (tmp_path / 'results').rglob('*.json'):
        record = json.loads(path.read_text())
        record['hardware']['device_name'] = 'another'
        write_record(path.parent, record, read_predictions(path))
    put(tmp_path / 'results', slow, device=name, seconds=1000.0 * slow.epochs)
    counts = run_study(study, **folders(tmp_path), budget=500, verbose=False)
    assert counts == dict(done=1 if where == 'here' else 4, failed=0, locked=0, no_time=3 if where == 'here' else 0)
    assert not list((tmp_path / 'checkpoints').glob('*'))


def test_budget_stops_at_a_checkpoint(tmp_path):
    long = Study('long', '', [recipe('test', epochs=10_000, train_per_class=4)])
    assert run_study(long, **folders(tmp_path), budget=5, verbose=False)['no_time'] == 1
    (state,) = study_state(long, **folders(tmp_path))
    assert state.state == 'stopped' and 0 < state.epochs < 10_000 and state.estimate > 0


def test_absent_data_is_an_error(tmp_path, capsys):
    where = ['--results', str(tmp_path / 'r'), '--checkpoints', str(tmp_path / 'c')]
    assert main(['laptop', '--data-root', str(tmp_path / 'no'), *where]) == 1
    assert 'no folder' in capsys.readouterr().err


def test_command(tmp_path, capsys):
    assert main([]) == 0 and 'table1' in capsys.readouterr().out
    assert main(['nothing']) == 1 and 'laptop' in capsys.readouterr().err
    assert main(['laptop', '--set', 'speed=9']) == 1 and 'FIELD=VALUE' in capsys.readouterr().err
    assert main(['--set', 'lr=1', 'laptop']) == 1 and 'laptop: expected FIELD=VALUE' in capsys.readouterr().err
    assert main(['laptop', '--set', 'lr=1', '--set', 'lr=2']) == 1 and 'lr is set twice' in capsys.readouterr().err
    assert main(['table2', '--list', '--results', str(tmp_path)]) == 0 and '20 missing' in capsys.readouterr().out


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    "A study of four runs by two workers, started in a folder with files that have the names of modules"
    folder = tmp_path_factory.mktemp('shared')
    here = folder / 'here'
    (here / 'gini_loss').mkdir(parents=True)
    for name in ('statistics', 'filelock', 'gini_loss/__init__', 'gini_loss/study'):
        (here / f'{name}.py').write_text(f"open({str(folder / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    package = str(Path(module.__file__).parents[1])
    code = f"import sys; sys.path[0] = {package!r}; from gini_loss.study import main; sys.exit(main(sys.argv[1:]))"
    args = command(folder, ['loss = ce both', 'seed = 0-1', 'epochs = 2'], '--workers', '2')
    done = run_command(['-c', code], args, cwd=here)
    assert done.returncode == 0, done.stderr
    return folder


def test_workers_share_the_runs(shared):
    "All runs are done, and the records say how many ran at a time"
    records = [json.loads(path.read_text()) for path in (shared / 'r' / 'small').glob('*.json')]
    assert len(records) == 4 and {record['hardware']['workers'] for record in records} == {2}
    assert not list((shared / 'c').glob('*'))


def test_workers_run_no_code_of_the_current_folder(shared):
    "They run the package of the command that started them"
    assert not (shared / 'ran').exists()


def test_out_of_memory_is_tried_once_more_after_the_others(tmp_path, monkeypatch, capsys):
    study, order = tiny(0, 1), []

    def crowded(config, *args, **options):
        order.append(config.run_id)
        if config.run_id == study.configs[0].run_id or len(order) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {}

    monkeypatch.setattr(module, 'train', crowded)
    assert run_study(study, **folders(tmp_path)) == dict(done=3, failed=1, locked=0, no_time=0)
    ids = [c.run_id for c in study.configs]
    assert order == [*ids, *ids[:2]] and 'will be tried again' in capsys.readouterr().err


def test_set_may_be_given_several_times(tmp_path, capsys):
    assert main(['laptop', '--set', 'lr=.5', '--set', 'bs=50', '--list', '--results', str(tmp_path)]) == 0
    assert load_study('laptop', lr=0.5, bs=50).configs[0].run_id in capsys.readouterr().out


def test_without_memory_the_others_go_on(tmp_path, monkeypatch):
    def crowded(config, *args, **options):
        raise MemoryError

    monkeypatch.setattr(module, 'train', crowded)
    assert run_study(tiny(0, 1), **folders(tmp_path)) == dict(done=0, failed=4, locked=0, no_time=0)


def test_a_lost_gpu_ends_the_worker(tmp_path, monkeypatch, capsys):
    class Lost(RuntimeError):
        pass

    def lost(config, *args, **options):
        raise Lost("device-side assert triggered")

    monkeypatch.setattr(module, '_LOST_DEVICE', Lost)
    monkeypatch.setattr(module, 'train', lost)
    assert run_study(tiny(0, 1), **folders(tmp_path)) == dict(done=0, failed=1, locked=0, no_time=0)
    assert 'start the command again for the other 3 runs' in capsys.readouterr().err


def test_files_that_are_not_the_data_fail_one_run_only(tmp_path, monkeypatch):
    def missing(config, *args, **options):
        raise FileNotFoundError(2, 'No such file', 'a cache')

    monkeypatch.setattr(module, 'train', missing)
    assert run_study(tiny(0, 1), **folders(tmp_path))['failed'] == 4


def test_nothing_is_begun_in_the_time_that_a_stopped_run_left(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(module, 'train', lambda config, *args, **options: begun.append(config))
    assert run_study(tiny(0, 1), **folders(tmp_path), budget=1000)['no_time'] == 4 and len(begun) == 1


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason="reads /proc")
@pytest.mark.parametrize('how', ['SIGTERM', 'SIGKILL'])
def test_workers_end_with_the_command(tmp_path, how):
    args = command(tmp_path, ['loss = ce both', 'epochs = 100000'], '--workers', '2')
    p = start(run_study_command, args)

    def wait(until):
        end = time.monotonic() + 120
        while not until():
            assert time.monotonic() < end and time.sleep(0.1) is None

    children = lambda: [int(o) for o in open(f'/proc/{p.pid}/task/{p.pid}/children').read().split()]

    def gone(pid):
        try:
            return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] == 'Z'
        except OSError:
            return True

    try:
        wait(lambda: len(list((tmp_path / 'c').glob('*.lock'))) == 2)
        workers = children()
        assert len(workers) == 2
        os.kill(p.pid, getattr(signal, how))
        p.join(60)
        assert p.exitcode == (143 if how == 'SIGTERM' else -signal.SIGKILL)
        wait(lambda: all(map(gone, workers)))
    finally:
        p.kill()


@pytest.mark.skipif(os.name == 'nt', reason="Windows has no signals")
def test_a_worker_that_is_killed_is_reported(tmp_path, monkeypatch, capsys):
    class Worker(subprocess.Popen):
        def __init__(self, command, env):
            super().__init__([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'])

    monkeypatch.setattr(module.subprocess, 'Popen', Worker)
    where = ['--results', str(tmp_path / 'r'), '--checkpoints', str(tmp_path / 'c'), '--device', 'cpu']
    assert main(['test', '--workers', '2', *where]) == 1
    assert 'a worker was ended by SIGKILL, perhaps because memory ran out' in capsys.readouterr().err


def test_workers_share_the_deadline(tmp_path, monkeypatch):
    "The budget counts from the command's start, not from that of each worker"
    started, given = [], []

    class Worker:
        def __init__(self, command, env):
            started.append(env)

        def wait(self):
            return 3

    monkeypatch.setattr(module.subprocess, 'Popen', Worker)
    before = time.monotonic()
    where = ['--results', str(tmp_path / 'r'), '--checkpoints', str(tmp_path / 'c'), '--device', 'cpu']
    assert main(['test', '--workers', '2', '--budget', '1000', *where]) == 3
    assert len(started) == 2 and len({o['GINI_LOSS_DEADLINE'] for o in started}) == 1
    assert before + 1000 <= float(started[0]['GINI_LOSS_DEADLINE']) <= time.monotonic() + 1000
    monkeypatch.setenv('GINI_LOSS_DEADLINE', started[0]['GINI_LOSS_DEADLINE'])
    monkeypatch.setattr(module.time, 'monotonic', lambda: before + 900)  # a worker that took long to start
    monkeypatch.setattr(
        module,
        'run_study',
        lambda study, results, checkpoints, budget, **options: (
            given.append(budget) or dict(done=0, failed=0, locked=0, no_time=4)
        ),
    )
    assert main(['test', '--workers', '1', '--budget', '1000', *where]) == 3
    assert 100 <= given[0] < 200


def test_workers_stop_in_time(tmp_path):
    "Runs that do not end within the budget leave a checkpoint"
    args = command(tmp_path, ['loss = ce both', 'epochs = 100000'], '--budget', '5')
    finish(start(import_engine))
    workers = [start(run_study_command, args, time.monotonic() + 5) for _ in range(2)]
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 3
    states = [s.state for s in study_state(load_study(tmp_path / 'small.ini'), tmp_path / 'r', tmp_path / 'c')]
    if 'missing' in states:
        pytest.skip("this machine was too busy to train an epoch in five seconds")
    assert states == ['stopped', 'stopped']


def test_a_record_that_cannot_be_read_is_named_and_not_done(tmp_path, capsys):
    study = tiny()
    run_study(study, **folders(tmp_path), verbose=False)
    file = tmp_path / 'results' / 'tiny' / f'{study.configs[0].run_id}.json'
    file.write_bytes(b'')
    assert run_study(study, **folders(tmp_path), verbose=False) == dict(done=1, failed=1, locked=0, no_time=0)
    assert file.name in capsys.readouterr().err
    assert [s.state for s in study_state(study, **folders(tmp_path))] == ['damaged', 'done']


def test_a_study_keeps_networks_only_if_asked(tmp_path):
    args = command(tmp_path, ['loss = ce', 'epochs = 1', 'start_epoch = 0'])
    assert main(args) == 0 and not list(tmp_path.rglob('*.safetensors'))
    assert main([*args, '--set', 'seed=1', '--weights', str(tmp_path / 'w')]) == 0
    assert len(list((tmp_path / 'w').glob('*.safetensors'))) == 1


def test_stopped_from_the_keyboard(tmp_path, monkeypatch, capsys):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'train', stopped)
    assert main(['test', '--results', str(tmp_path / 'r'), '--checkpoints', str(tmp_path / 'c')]) == 130
    assert 'The same command continues' in capsys.readouterr().err
