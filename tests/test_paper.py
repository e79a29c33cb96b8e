"Tables and summaries where records of several kinds lie in one folder. The records are made up."

import json, shutil
from dataclasses import replace

import matplotlib

matplotlib.use('Agg')
import pandas as pd
import pytest

pytest.importorskip('fastai', reason="training needs fastai")
import made_up
from gini_loss.plots import plot_runs
from gini_loss.paper import (
    SWITCHES,
    answer_box,
    at_paper_scale,
    format_comparison,
    format_details,
    image_comparison,
    laptop_comparison,
    laptop_markdown,
    markdown_table,
    paper_comparison,
    records_path,
    study_progress,
    study_runs,
    study_to_train,
    summary_markdown,
    verdicts_in_words,
)
from gini_loss.records import load_results
from gini_loss.study import load_study, main
from gini_loss.train import recipe

LAPTOP = records_path() / 'laptop'
pytestmark = pytest.mark.skipif(not list(LAPTOP.glob('*.json')), reason="the records of the laptop study are not here")
SAMPLE = next(iter(sorted(LAPTOP.glob('*.json'))), None)


def put(folder, config, accuracy=None, device='a device'):
    "A record of `config` in `folder`"
    if accuracy is None:
        accuracy = (
            0.7 + 0.01 * config.seed + 0.02 * (config.loss == 'both') + 0.0005 * config.seed * (config.loss == 'both')
        )
    made_up.put(folder, config, accuracy, caltech=0.5, best=0.7, device=device)


@pytest.fixture
def laptop(tmp_path):
    return shutil.copytree(LAPTOP, tmp_path / 'results' / 'laptop').parent


def test_none_stays_none_and_whole_numbers_whole(laptop):
    put(laptop / 'table2', recipe('resnet18'))
    runs = load_results(laptop)
    paper, small = runs[runs.study == 'table2'].iloc[0], runs[runs.study == 'laptop'].iloc[0]
    assert paper.width is None and paper.train_per_class is None and paper.layer is None
    assert small.width == 8 and isinstance(small.width, int) and small.train_per_class == 100


def test_paper_scale_and_laptop_in_one_folder(laptop):
    before = laptop_comparison(load_results(laptop))
    for c in load_study('table2').configs:
        put(laptop / 'table2', c)
    for c in load_study('table1').configs:
        if c.arch == 'resnet18':
            put(laptop / 'table2', c)
    runs = load_results(laptop)
    assert (
        len(runs) == 32
        and len(at_paper_scale(runs)) == 20
        and len(study_runs(runs, 'laptop')) == 12
        and len(study_runs(runs, 'table2')) == 20
    )
    one, two = paper_comparison(runs, 1), paper_comparison(runs, 2)
    assert (one.n >= 2).sum() == 2 and (two.n >= 2).sum() == 3 and two.set_index('loss').verdict['both'] == 'replicated'
    pd.testing.assert_frame_equal(laptop_comparison(runs), before)
    assert study_progress('table2', laptop).done.tolist() == [5] * 4
    text = summary_markdown(laptop)
    assert '| Table 1 | 8 | 2 |' in text and '| Table 2 | 3 | 3 |' in text and 'Before cross-entropy is solved' in text


@pytest.mark.parametrize(
    'extra', [dict(lambda_gini=1.0, lambda_kl=1.0), dict(precision='bfloat16'), dict(lr=3e-3), dict(start_epoch=3)]
)
@pytest.mark.parametrize('seeds', [(0,), (0, 1, 2)])
def test_changed_runs_among_those_of_the_laptop_study_are_left_out(laptop, extra, seeds):
    before, text = laptop_comparison(load_results(laptop)), summary_markdown(laptop)
    for s in seeds:
        for loss in ('ce', 'both') if 'lr' in extra or 'precision' in extra else ('both',):
            put(laptop / 'laptop', recipe('laptop', loss=loss, seed=s, **extra), 0.5)
    runs = load_results(laptop)
    assert len(runs) > 12 and len(study_runs(runs, 'laptop')) == 12
    pd.testing.assert_frame_equal(laptop_comparison(runs), before)
    assert summary_markdown(laptop) == text
    with pytest.raises(ValueError, match=f"several configurations.*they differ in {next(iter(extra))}"):
        plot_runs(runs)
    plot_runs(study_runs(runs, 'laptop'))
    matplotlib.pyplot.close('all')


def test_further_seeds_of_the_same_configurations_count(laptop):
    for loss in ('ce', 'gini', 'kl', 'both'):
        put(laptop / 'more', recipe('laptop', loss=loss, seed=3), 0.2)
    assert laptop_comparison(load_results(laptop)).n.tolist() == [4] * 6


def test_the_way_with_the_most_pairs_counts_and_the_rest_is_told(tmp_path):
    for s in range(5):
        put(tmp_path / 'r', recipe('resnet18', loss='ce', seed=s))
    for s in range(2):
        for loss in ('ce', 'both'):
            put(tmp_path / 'r', recipe('resnet18', loss=loss, seed=s, precision='bfloat16', compile=True))
    runs = load_results(tmp_path / 'r')
    full = at_paper_scale(runs)
    assert set(full.precision) == {'bfloat16'} and len(full) == 4 and full.attrs['set_aside'] == 5
    table = paper_comparison(runs, 1)
    assert table.n.max() == 2 and 'Set aside' in verdicts_in_words(table) and '5 runs' in verdicts_in_words(table)
    progress = study_progress('table1', tmp_path / 'r').set_index(['network', 'loss']).done
    assert progress['ResNet-18', 'ce'] == 5 and progress['ResNet-18', 'both'] == 2


def test_each_table_chooses_the_way_by_its_own_pairs(tmp_path):
    for s in range(3):
        for loss in ('ce', 'gini', 'kl'):
            put(tmp_path / 'r', recipe('resnet18', loss=loss, seed=s))
    for s in range(2):
        for loss in ('ce', 'both'):
            put(tmp_path / 'r', recipe('resnet18', loss=loss, seed=s, precision='bfloat16'))
    for loss in ('ce', 'both'):
        put(tmp_path / 'r', recipe('resnet50', loss=loss))
        put(tmp_path / 'r', recipe('resnet50', loss=loss, compile=True))
    runs = load_results(tmp_path / 'r')
    one, two = paper_comparison(runs, 1), paper_comparison(runs, 2).set_index('loss')
    assert (
        one[(one.arch == 'resnet18') & (one.data == 'CIFAR-100')].n.tolist() == [2] and one.attrs['set_aside'] == 3 + 2
    )
    assert two.n.to_dict() == dict(gini=3, kl=3, both=0) and two.attrs['set_aside'] == 4
    assert set(at_paper_scale(runs, 1).loss) == {'ce', 'both'} and set(at_paper_scale(runs, 2).arch) == {'resnet18'}


def test_runs_without_a_partner_of_their_way_are_told(tmp_path):
    for s in range(2):
        put(tmp_path / 'r', recipe('resnet18', loss='ce', seed=s))
        put(tmp_path / 'r', recipe('resnet18', loss='both', seed=s, precision='bfloat16'))
    words = verdicts_in_words(paper_comparison(load_results(tmp_path / 'r'), 1))
    assert 'None of the 8' in words and 'Set aside' in words and '2 runs' in words


def test_what_is_left_to_train_completes_the_pairs_that_count(tmp_path):
    study = load_study('table1')
    assert study_to_train('table1', tmp_path / 'none').configs == study.configs
    for s in range(5):
        put(tmp_path / 'r', recipe('resnet18', loss='ce', seed=s))
    for s in range(2):
        for loss in ('ce', 'both'):
            put(tmp_path / 'r', recipe('resnet18', loss=loss, seed=s, precision='bfloat16', compile=True))
    for c in study.configs:
        if c.arch == 'resnet17':
            put(tmp_path / 'r', replace(c, precision='bfloat16'))
    left = study_to_train('table1', tmp_path / 'r')
    assert left.name == 'table1' and {c.arch for c in left.configs} == {'resnet18', 'resnet50', 'cvt7'}
    small = [c for c in left.configs if c.arch == 'resnet18']
    assert [(c.loss, c.seed, c.precision, c.compile) for c in small] == [
        (l, s, 'bfloat16', True) for s in (2, 3, 4) for l in ('ce', 'both')
    ]
    assert all(replace(c, **SWITCHES) == c for c in left.configs if c.arch != 'resnet18')
    for c in small:
        put(tmp_path / 'r', c)
    done = load_results(tmp_path / 'r')
    assert paper_comparison(done, 1).n.max() == 5 and not [
        c for c in study_to_train('table1', tmp_path / 'r').configs if c.arch == 'resnet18'
    ]


def test_details_hold_what_the_rule_promises(tmp_path):
    for c in load_study('table2').configs:
        put(tmp_path / 'r', c, device='one device' if c.seed else 'another device')
    table = paper_comparison(load_results(tmp_path / 'r'), 2)
    details = format_details(table).set_index('loss')
    row, judged = details.loc['both'], table.set_index('loss').loc['both']
    assert (
        row['last epoch'] == f'{judged.difference:+.2f} [{judged.low:+.2f}, {judged.high:+.2f}]'
        and row['best epoch'] == '+0.00'
    )
    assert (
        row['p, sign flips (least possible)'] == f'{judged.p_sign:.3f} ({judged.p_sign_minimum:.3f})' == '0.062 (0.062)'
    )
    assert (
        row["paper's difference in the interval"] == ('yes' if judged.paper_inside else 'no') == 'no'
        and row.hardware == 'another device, one device'
    )
    assert details.loc['gini']["paper's difference in the interval"] == ''  # all pairs equal: no interval
    assert float(row['sd of the differences']) == round(judged.sd, 2) and row['p, Holm'] == f'{judged.p_holm:.3f}'
    assert (
        len(format_comparison(table)) == 3
        and len(format_details(paper_comparison(load_results(tmp_path / 'r'), 1))) == 2
    )


def test_each_pair_over_the_images():
    runs = study_runs(load_results(LAPTOP.parent), 'laptop')
    for data, n, column in (('CIFAR-100', 10_000, 'test_accuracy'), ('Caltech 101', 781, 'caltech_accuracy')):
        table = image_comparison(runs, data)
        assert table.seed.tolist() == sorted(set(runs.seed)) and len(table) >= 3
        for r in table.itertuples():
            a, b = (runs[(runs.loss == l) & (runs.seed == r.seed)][column].iloc[0] for l in ('both', 'ce'))
            assert r.only_with_loss - r.only_baseline == round(n * (a - b))
    with pytest.raises(ValueError, match="more than one run"):
        image_comparison(pd.concat([runs, runs]))
    with pytest.raises(ValueError, match="CIFAR-100 or Caltech 101, got 'caltech'"):
        image_comparison(runs, 'caltech')
    assert image_comparison(runs.iloc[:0]).empty


def test_a_record_that_lacks_its_seconds_does_not_end_the_list(laptop, capsys):
    path = next((laptop / 'laptop').glob('*-ce-s0-*.json'))
    for broken in ({}, {'training': None}, {'training': 'long'}, {'training': -1.0}, None):
        r = json.loads(SAMPLE.read_text())
        r['seconds'] = broken
        path.write_text(json.dumps(r))
        assert main(['laptop', '--list', '--results', str(laptop), '--checkpoints', str(laptop / 'c')]) == 0
    r['config']['epochs'] = 0
    path.write_text(json.dumps(r))
    assert main(['laptop', '--list', '--results', str(laptop), '--checkpoints', str(laptop / 'c')]) == 0


@pytest.mark.parametrize('option', ['--results', '--checkpoints'])
@pytest.mark.parametrize('workers', ['1', '2'])
def test_a_study_asks_for_its_folders_first(tmp_path, capsys, option, workers):
    (tmp_path / 'afile').write_text('')
    other = '--checkpoints' if option == '--results' else '--results'
    assert main(['test', option, str(tmp_path / 'afile'), other, str(tmp_path / 'fine'), '--workers', workers]) == 1
    err = capsys.readouterr().err
    assert err.startswith('gini_study: cannot write to the folder') and err.count('\n') == 1


@pytest.mark.parametrize('workers', ['0', '-1', 'two'])
def test_workers_are_counted_from_one(workers, capsys):
    with pytest.raises(SystemExit) as e:
        main(['test', '--workers', workers])
    assert e.value.code == 2 and 'expected a whole number of at least 1' in capsys.readouterr().err


def test_the_list_of_studies_on_its_page_is_the_present_one(capsys):
    page = LAPTOP.parents[1] / 'nbs' / '25_studies.ipynb'
    if not page.is_file():
        pytest.skip("no checkout")
    assert main([]) == 0
    printed = capsys.readouterr().out
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    outputs = [
        ''.join(o['text']) for c in cells if 'main([])' in ''.join(c['source']) for o in c['outputs'] if 'text' in o
    ]
    assert printed.split() in [o.split() for o in outputs]


def test_tables_for_pages():
    "Names of layers and of files are text, not mathematics; columns that are empty throughout do not appear"
    frame = pd.DataFrame(
        {'layer': ['a|b', 'c$d$'], 'gain': ['+1.00', '-0.50'], 'nothing': [None, float('nan')], 'blank': ['', pd.NA]}
    )
    assert markdown_table(frame).split('\n') == [
        '| layer | gain |',
        '| --- | ---: |',
        '| a\\|b | +1.00 |',
        '| c\\$d\\$ | −0.50 |',
    ]
    box = answer_box("**higher**, +1.0 points")
    assert box.startswith('::: {.callout-note') and box.endswith('\n:::') and '**higher**' in box


def test_the_small_study_in_one_paragraph(laptop):
    text = laptop_markdown(load_results(laptop))
    assert (
        text.count('\n') == 0
        and 'Before cross-entropy is solved' in text
        and 'Caltech 101' in text
        and 'none is detected' in text
    )
    runs = load_results(laptop)
    assert laptop_markdown(runs.iloc[:0]) == ''
    assert laptop_markdown(runs[runs.seed == 0]) == '', "one pair is not judged"


def test_the_old_name_works_with_a_warning():
    import importlib, sys

    sys.modules.pop('gini_loss.report', None)
    with pytest.warns(DeprecationWarning, match='gini_loss.paper'):
        old = importlib.import_module('gini_loss.report')
    assert old.paper_comparison is paper_comparison and old.records_path is records_path
