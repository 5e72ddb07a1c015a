"Probing and analysing: the cache of features, whole runs on every kind of data, and what is refused."
import os, resource, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import clipdino.analysis as analysis
import clipdino.probe as probe
from clipdino.core import CannotWrite, SettingsError, cache_dir, run_dir, write_json
from clipdino.encoders import TimmEncoder, load_encoder
from clipdino.objectives import make_encoder
from clipdino.pretrain import Probe, labelled_task, pretrain, settings as pretrain_settings
from clipdino.readouts import report
from helpers import shard

ENCODER = 'random:clipdino_vit_smoke'

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "Runs and features in folders of the test's own"
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    (tmp_path/'cache').mkdir()
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'cache'))

class Set:
    "Some pictures"
    name, fingerprint = 'some', 'some'
    def __init__(self, n=40): self.images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8)
    def __len__(self): return len(self.images)
    def batch(self, ids, size): return self.images[ids]

def picture_folder(root:Path, classes=3, train=20, test=8, size=(40, 30)):
    "Class folders whose pictures tell their class by colour"
    g = np.random.default_rng(0)
    for split, n in ('train', train), ('test', test):
        for c in range(classes):
            (d := root/split/f'class {c}').mkdir(parents=True)
            for i in range(n):
                im = np.full((size[1], size[0], 3), (40*c, 200 - 60*c, 90)) + g.normal(0, 20, (size[1], size[0], 3))
                Image.fromarray(im.clip(0, 255).astype(np.uint8)).save(d/f'{i}.png')

def files(): return sorted(p.name for p in (cache_dir()/'features').iterdir() if not p.name.endswith('.lock'))

# features

def test_features_are_made_once_and_right(monkeypatch):
    e, s = load_encoder(ENCODER), Set()
    x = probe.features(e, s, batch=16)
    (cls, patches), = e.tokens(e.prepare(s.images))
    assert np.allclose(x[:, 0], cls, atol=1e-6) and np.allclose(x[:, 1], patches.mean(1), atol=1e-6) and x.shape == (40, 2, 32)
    assert np.allclose(probe.features(e, s, probe.patch_tokens), patches, atol=1e-6)
    monkeypatch.setattr(e, 'tokens', None)
    assert (probe.features(e, s, batch=7) == x).all()
    with pytest.raises(ValueError): x[0] = 0

def test_features_in_half_precision():
    "Are others, and half as large"
    e, s = load_encoder(ENCODER), Set()
    x, half = (probe.features(e, s, probe.patch_tokens, dtype=d) for d in ('float32', 'float16'))
    assert (half.dtype, 2*half.nbytes, len(files())) == (np.float16, x.nbytes, 2) and np.allclose(half, x, atol=1e-2) and not (half == x).all()

def test_features_too_large_for_half_precision(monkeypatch):
    "Are refused, and the file of single precision is kept"
    e, s = load_encoder(ENCODER), Set()
    of = e.tokens
    monkeypatch.setattr(e, 'tokens', lambda x, layers: [(cls, patches + 1e5) for cls, patches in of(x, layers)])
    with pytest.raises(SettingsError, match='^features of picture 0 of some are not finite under .* give cached=false or precision=fp32$'):
        probe.features(e, s, probe.patch_tokens, dtype='float16')
    assert not files() and np.isfinite(probe.features(e, s, probe.patch_tokens)).all()

def test_features_are_read_in_one_of_three_ways():
    def pooled(encoder, x, layer): return encoder.tokens(x, (layer,))[0][1].mean(1, keepdim=True)
    with pytest.raises(SettingsError, match='^features are read by one of pooled, joint, patch_tokens,'):
        probe.features(load_encoder(ENCODER), Set(), pooled)

def test_features_of_pictures_that_processes_read(monkeypatch):
    e, s = load_encoder(ENCODER), Set()
    x = np.array(probe.features(e, s, batch=16))
    s.fingerprint = 'read by others'
    monkeypatch.setattr(probe, 'readers', lambda device: 2)
    assert (probe.features(e, s, batch=16) == x).all() and len(files()) == 2
    def broken(ids, size): raise SettingsError('picture 16 is broken')
    s.fingerprint, s.batch = 'broken', lambda ids, size: s.images[ids] if not ids[0] else broken(ids, size)
    for n in 2, 0:
        monkeypatch.setattr(probe, 'readers', lambda device: n)
        with pytest.raises(SettingsError, match='^picture 16 is broken$'): probe.features(e, s, batch=16)

@pytest.mark.parametrize('what', ['weights', 'data', 'layer', 'size', 'mean', 'std', 'activation'])
def test_features_are_stale_when_anything_differs(what):
    def made(): return TimmEncoder('e', make_encoder('clipdino_vit_smoke', 32, 0), 32)  # which takes pictures of any size
    s, layer = Set(), -1
    x, e = np.array(probe.features(made(), s)), made()
    if what == 'weights':
        with torch.no_grad(): e.model.blocks[0].mlp.fc1.weight[0, 0] += .5
    if what == 'data': s.fingerprint, s.images = 'other', 255 - s.images
    if what == 'layer': layer = 1
    if what == 'size': e.size = 48
    if what == 'mean': e.mean = (.4, .5, .5)
    if what == 'std': e.std = (.4, .5, .5)
    if what == 'activation':
        for b in e.model.blocks: b.mlp.act = torch.nn.Tanh()  # as QuickGELU for GELU: the weights are the same
    assert not np.allclose(probe.features(e, s, layer=layer), x) and len(files()) == 2

@pytest.mark.parametrize('damage', [lambda p: p.write_bytes(p.read_bytes()[:-100]), lambda p: p.write_bytes(b''),
                                    lambda p: p.write_bytes(b'noise'*40)])
def test_damaged_features_are_made_again(damage):
    e, s = load_encoder(ENCODER), Set()
    x = np.array(probe.features(e, s))
    path = cache_dir()/'features'/files()[0]
    damage(path)
    (path.parent/f'.{path.name}.123.tmp').write_bytes(b'of a process that was killed')
    assert (probe.features(e, s) == x).all() and files() == [path.name]

def test_features_that_are_not_finite_are_refused_and_not_kept():
    e, s, calls = load_encoder(ENCODER), Set(), []
    def tokens(x, layers):
        calls.append(1)
        cls = torch.ones(len(x), 8)
        if len(calls) == 2: cls[3] = torch.nan
        return [(cls, torch.ones(len(x), 4, 8))]
    e.tokens = tokens
    with pytest.raises(SettingsError, match='features of picture 19 of some are not finite under random:clipdino_vit_smoke'):
        probe.features(e, s, batch=16)
    assert files() == []

def test_a_full_or_read_only_cache_says_so(monkeypatch, tmp_path):
    e, s = load_encoder(ENCODER), Set()
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1 << 20))
    with pytest.raises(SettingsError, match='the features need 0 MiB, and 1 MiB are free; set CLIPDINO_CACHE to a roomier folder'):
        probe.features(e, s)
    assert files() == []
    monkeypatch.undo()
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'cache'))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as on a disk that gets full in the middle
    try:
        with pytest.raises(CannotWrite, match='npy can not be written: File too large. Nothing was lost; make room'): probe.features(e, s)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files() == []
    assert probe.features(e, s).shape == (40, 2, 32)
    (tmp_path/'file').touch()
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'file'))
    with pytest.raises(CannotWrite, match='file can not be written: File exists. Nothing was lost; move what is in its way'):
        probe.features(e, s)
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'cache'))
    if os.geteuid() == 0: pytest.skip('root may write anywhere')
    (tmp_path/'cache'/'features').chmod(0o500)
    with pytest.raises(CannotWrite, match='can not be written: Permission denied'): probe.features(e, s, layer=1)

def test_features_need_little_memory(tmp_path):
    "400 MB of features, while the process grows by less than a tenth of that"
    script = '''
import numpy as np, re, torch
import clipdino.probe as probe
class Encoder:
    name, size, mean, std, fingerprint, model, device = 'e', 8, (0,), (1,), 'e', torch.nn.Identity(), torch.device('cpu')
    def prepare(self, x): return torch.from_numpy(x).float()
    def tokens(self, x, layers): return [(x.flatten(1).repeat(1, 5)[:, :500], x.flatten(1).repeat(1, 5)[:, None, :500])]
class Set:
    name = fingerprint = 's'
    def __len__(self): return 100_000
    def batch(self, ids, size): return np.repeat(np.asarray(ids)[:, None], 192, 1).reshape(-1, 8, 8, 3).astype(np.uint8)
def anonymous(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = anonymous()
x = probe.features(Encoder(), Set(), batch=512)
assert x.nbytes == 400_000_000 and x[777, 0, 3] == 777 % 256
print(anonymous() - before)
'''
    if not Path('/proc/self/status').exists(): pytest.skip('memory is read from /proc')
    grown = int(subprocess.run([sys.executable, '-c', script], check=True, capture_output=True, text=True,
                               env=dict(os.environ, PYTHONPATH=str(Path(probe.__file__).parent.parent))).stdout)
    assert grown < 40_000, f'{grown} kB'

# tasks

def test_tasks_of_the_world_are_tested_on_other_pictures():
    e, run = load_encoder(ENCODER), probe.settings('smoke')
    for t in probe.world_tasks(e, run):
        assert t.test.world.split == 'test', t.name
        assert (t.x_test == probe.features(e, t.test)[slice(None) if t.rows is None else t.rows]).all()
        assert not (t.x[:, None, 0] == t.x_test[None, :, 0]).all(-1).any(), 'a picture is in training and test'

@pytest.mark.parametrize('where', [0, 1])
def test_which_features_a_readout_reads(where):
    "All but `linear` read the class token alone"
    g, y = np.random.default_rng(0), np.arange(200) % 2
    def made():
        x = g.normal(size=(200, 2, 8)).astype(np.float32)
        x[:, where, 0] += 12*y - 6
        return x
    r, *_ = probe.probe_task(probe.Task('t', ('a', 'b'), made(), y, made(), y, None), SimpleNamespace(has_text=False),
                             probe.settings('smoke', encoder='e'), {})
    assert r['linear']['top1'] > .95 and r['linear_cls']['setting']['readout'] == 'cls'
    for top1 in r['linear_cls']['top1'], r['knn']['top1'], r['few_shot']['10']['top1']: assert (top1 > .95) == (where == 0), r

def test_families_are_pooled_by_pictures():
    "One of six counts three times as much as one of two"
    results = {f'within {k}': dict(test=k, knn=dict(top1=float(np.mean(v)), chance=c, pictures=len(v)))
               for k, v, c in (('a', [1, 1], .5), ('b', [0]*6, .25))}
    right = {'within a': dict(knn=np.ones(2, bool)), 'within b': dict(knn=np.zeros(6, bool))}
    out, ok = probe.pool(results, right)
    assert out['knn']['top1'] == .25 and out['knn']['chance'] == (.5*2 + .25*6)/8 and ok['knn'].sum() == 2

# probing runs

def test_a_probing_run_on_the_world(capsys):
    pretrain(pretrain_settings('smoke', 'clip', name='c'))
    a = probe.probe(probe.settings('smoke', encoder='c'))
    t = a['tasks']
    assert {'object', 'word', 'colour', 'background', 'texture', 'style', 'count', 'position', 'within families', 'within chess',
            'maps of world'} <= set(t)
    assert {'linear', 'linear_cls', 'knn', 'zero_shot', 'tried'} <= set(t['object']) and t['position']['few_shot'].keys() >= {'1', '2'}
    for r in t.values():
        for how in ('linear', 'knn', 'zero_shot'):
            if how in r: assert r[how]['interval'][0] <= r[how]['top1'] <= r[how]['interval'][1] and 0 < r[how]['chance'] < 1
    assert t['within families']['linear']['pictures'] == sum(r['linear']['pictures']
                                                             for n, r in t.items() if n.startswith('within ') and n != 'within families')
    assert t['style']['linear']['pictures'] % 6 == 0
    with np.load('runs/probe-c/right.npz') as f: assert abs(f['object/linear'].mean() - t['object']['linear']['top1']) < 1e-6
    b = probe.probe(probe.settings('smoke', encoder='random:c', name='b', against='probe-c'))
    d = {(r['task'], r['how']): r for r in b['against']['differences']}
    assert d['object', 'knn']['difference'] == pytest.approx(b['tasks']['object']['knn']['top1'] - t['object']['knn']['top1'], abs=1e-6) and ('object', 'zero_shot') not in d
    before = Path('runs/probe-c/result.json').read_bytes()
    assert probe.probe(probe.settings('smoke', encoder='c')) == a and 'is complete' in capsys.readouterr().out
    assert probe.probe(probe.settings('smoke', encoder='c', name='probe-c')) == a, 'the name that it has anyway'
    with pytest.raises(SettingsError, match='begun with other settings: train was 96 and is now 128'):
        probe.probe(probe.settings('smoke', encoder='c', train=128))
    shutil.rmtree('runs/probe-c')
    again = probe.probe(probe.settings('smoke', encoder='c'))
    assert {k: v for k, v in again.items() if k != 'environment'} == {k: v for k, v in a.items() if k != 'environment'}

def test_the_authors_protocol_beside_the_other_readouts(tmp_path):
    "And the same when it is made again"
    picture_folder(tmp_path/'mine')
    a, b = (probe.probe(probe.settings('smoke', encoder=ENCODER, name=n, data=f'{tmp_path}/mine', authors=True))['tasks']['mine']
            for n in 'ab')
    assert a == b and {'linear', 'linear_cls', 'authors', 'knn'} <= set(a) and a['authors']['pictures'] == 24

def test_folders_shifted_sets_and_maps(tmp_path):
    picture_folder(tmp_path/'mine')
    g = np.random.default_rng(0)
    for name, n in (*((f'data_batch_{k}.bin', 8) for k in range(1, 6)), ('test_batch.bin', 10)):
        (tmp_path/'c10').mkdir(exist_ok=True)
        (tmp_path/'c10'/name).write_bytes(b''.join(bytes([i % 10]) + g.integers(0, 256, 3072, np.uint8).tobytes() for i in range(n*2)))
    (tmp_path/'c10'/'batches.meta.txt').write_text('\n'.join('airplane automobile bird cat deer dog frog horse ship truck'.split()) + '\n')
    (tmp_path/'c101').mkdir()
    np.save(tmp_path/'c101'/'cifar10.1_v6_data.npy', g.integers(0, 256, (12, 32, 32, 3), np.uint8))
    np.save(tmp_path/'c101'/'cifar10.1_v6_labels.npy', np.arange(12, dtype=np.int32) % 10)
    for split, n in ('train', 12), ('test', 4):
        for d in 'images', 'labels': (tmp_path/'my maps'/d/split).mkdir(parents=True)
        for i in range(n):
            y = np.kron(g.integers(0, 2, (4, 4)), np.ones((8, 8))).astype(np.uint8)
            Image.fromarray((y*200)[..., None].repeat(3, 2)).save(tmp_path/'my maps'/'images'/split/f'{i}.png')
            Image.fromarray(y).save(tmp_path/'my maps'/'labels'/split/f'{i}.png')
    r = probe.probe(probe.settings('smoke', encoder=ENCODER,
                                   data=f'{tmp_path}/mine, cifar10:{tmp_path}/c10, cifar10.1:{tmp_path}/c101, maps:{tmp_path}/my maps'))['tasks']
    assert r['mine']['linear']['top1'] > .9 and r['cifar10.1']['linear']['pictures'] == 12 and r['cifar10.1']['linear']['setting'] == r['cifar10']['linear']['setting']
    assert r['maps of my maps']['miou'] > r['maps of my maps']['constant'] + .2
    with pytest.raises(SettingsError, match='scored with the probe of cifar10: put cifar10:PATH before it'):
        probe.probe(probe.settings('smoke', encoder=ENCODER, name='b', data=f'cifar10.1:{tmp_path}/c101'))

@pytest.mark.parametrize('train', [5, 17])
def test_few_pictures_per_class(tmp_path, train):
    "After training and during it; settings are chosen by probes that were fitted"
    picture_folder(tmp_path/'few', train=train)
    r = probe.probe(probe.settings('smoke', encoder=ENCODER, data=f'{tmp_path}/few'))['tasks']['few']
    assert r['linear']['top1'] > .9 and max(t['accuracy'] for t in r['tried']) > .9
    during = Probe(labelled_task(f'{tmp_path}/few', 32, 'test'))(load_encoder(ENCODER).model, 32)
    assert during['classes_linear'] > .9

@pytest.mark.parametrize('given, said', [
    (dict(encoder='no-such-thing'), "'no-such-thing' names no encoder"),
    (dict(encoder=ENCODER, data='cifar:x'), 'no set is called cifar .did you mean cifar10'),
    (dict(encoder=ENCODER, data=' , '), 'data names no set'),
    (dict(encoder=ENCODER, data='world, nowhere'), 'nowhere is not there: give a folder of class folders, shards, or NAME:PATH'),
    (dict(encoder=ENCODER, data='world, nowhere-{0..9}.tar'), 'no shards at nowhere'),
    (dict(encoder=ENCODER, data='world, world'), 'two sets of data are called world'),
    (dict(encoder=ENCODER, layer=3), 'layer 3 is not there: random:clipdino_vit_smoke has layers 1 to 2'),
    (dict(encoder=ENCODER, against='nothing'), 'nothing is no finished probing run')])
def test_what_a_probing_run_refuses(given, said, capsys):
    with pytest.raises(SettingsError, match=said): probe.probe(probe.settings('smoke', **given))
    # before anything is computed
    assert not list(Path('.').glob('runs/*/result.json')) and not Path('runs/nothing').exists() and not capsys.readouterr().out

def test_sets_of_ones_own_may_be_called_as_the_worlds_are(tmp_path):
    "But not beside it"
    for name in 'world', 'object': picture_folder(tmp_path/name)
    r = probe.probe(probe.settings('smoke', encoder=ENCODER, data=f'{tmp_path}/world, {tmp_path}/object'))['tasks']
    assert list(r) == ['world', 'object'] and r['world']['linear']['pictures'] == r['object']['linear']['pictures'] == 24
    with pytest.raises(SettingsError, match='object is the name of a task of the world too'):
        probe.probe(probe.settings('smoke', encoder=ENCODER, name='b', data=f'{tmp_path}/object, world'))

def test_a_mistake_can_be_mended_under_the_same_name(tmp_path):
    picture_folder(tmp_path/'mine')
    for data in 'nowhere', f'{tmp_path}/mine':
        run = probe.settings('smoke', encoder=ENCODER, name='x', data=data)
        if data == 'nowhere':
            with pytest.raises(SettingsError, match='nowhere is not there'): probe.probe(run)
        else: assert probe.probe(run)['tasks']['mine']['linear']['pictures'] == 24

def test_other_pictures_under_the_same_path(tmp_path, monkeypatch):
    "Are not those that a finished run was about, and nothing to compare with"
    picture_folder(tmp_path/'mine')
    run = probe.settings('smoke', encoder=ENCODER, name='x', data=f'{tmp_path}/mine')
    assert probe.probe(run) == probe.probe(run)
    shutil.rmtree(tmp_path/'mine')
    picture_folder(tmp_path/'mine', classes=4)
    with pytest.raises(SettingsError, match='the data or models that it reads are others now'): probe.probe(run)
    monkeypatch.setattr(probe, 'probe_all', None)
    with pytest.raises(SettingsError, match='x has no task with the same test pictures'):
        probe.probe(probe.settings('smoke', encoder=ENCODER, name='y', data=run.data, against='x'))

def test_another_world_under_the_same_settings(monkeypatch):
    run = probe.settings('smoke', encoder=ENCODER, name='x')
    assert probe.probe(run) == probe.probe(run)
    monkeypatch.setattr('clipdino.world.VERSION', 'other')
    with pytest.raises(SettingsError, match='the data or models that it reads are others now'): probe.probe(run)

def test_settings_of_other_data():
    with pytest.raises(SettingsError, match='limit=5 is for sets other than the world'): probe.settings('smoke', limit=5)
    with pytest.raises(SettingsError, match="against='x/' must be the name of a run"): probe.settings('smoke', against='x/')

@pytest.mark.parametrize('device', ['gpu0', 'cuda:99', 'meta', 'hpu'])
def test_a_device_that_is_not_there(device):
    with pytest.raises(SettingsError, match=f'device={device} can not be used here (.*): give cpu'):
        probe.probe(probe.settings('smoke', encoder=ENCODER, device=device))

def test_a_folder_of_another_kind_is_left_alone():
    "A pre-training that was cut, whose states would bind a run of its name"
    write_json(note := run_dir('cut')/'settings.json', dict(objective='clip', preset='smoke', fingerprint='f'))
    before = note.read_bytes()
    for go, run in (probe.probe, probe.settings('smoke', encoder=ENCODER, name='cut')), (analysis.analyse, analysis.settings('smoke', encoders=f'{ENCODER},random:clipdino_vit_mini', name='cut')):
        with pytest.raises(SettingsError, match='cut is a run of pretrain, and not of (probe|analysis): give this one another name'):
            go(run)
        assert note.read_bytes() == before

def test_an_analysis_of_pictures_that_share_no_class(tmp_path):
    picture_folder(tmp_path/'mine', classes=12, train=2, test=1)
    r = analysis.analyse(analysis.settings('smoke', encoders=f'{ENCODER},random:clipdino_vit_mini', name='a', data=str(tmp_path/'mine'),
                                           pictures=12, pairs=1))
    assert 'uniformity' in str(r['structure']) and 'within' not in str(r['structure'])

def test_one_class_is_refused(tmp_path):
    picture_folder(tmp_path/'one', classes=1)
    with pytest.raises(SettingsError, match='a probe takes at least two'):
        probe.probe(probe.settings('smoke', encoder=ENCODER, data=f'{tmp_path}/one'))

# analyses

def test_an_analysis_of_the_world():
    run = analysis.settings('smoke', encoders=f'{ENCODER},random:clipdino_vit_mini', name='a')
    r = analysis.analyse(run)
    assert len(r['sensitivity']) == 6*len(analysis.CHANGED) and len(r['symbols']) == 18 and len(r['conflicts']) == 2 and len(r['structure']['rows']) == 2
    for s in 'first', 'second':
        assert {'object', 'style', 'colour'} <= {q['factor'] for q in r['disagreement'][s]['shared']} and Path(f'runs/a/pairs-{s}-ranks.csv').exists()
    assert np.array(r['structure']['cka'][0]['layers']).shape == (2, 3)
    shutil.copytree('runs/a', 'runs/kept')
    shutil.rmtree('runs/a')
    again = analysis.analyse(run)
    assert {k: v for k, v in again.items() if k != 'environment'} == {k: v for k, v in r.items() if k != 'environment'}
    assert Path('runs/a/pairs-first-ranks.csv').read_bytes() == Path('runs/kept/pairs-first-ranks.csv').read_bytes()
    rows = analysis.collect([Path('runs/a')])
    assert set(rows.readout) == set(analysis.EMBEDDINGS)
    old = {k: [{f: x for f, x in v.items() if f != 'readout'} for v in r[k] if v['readout'] == 'class token']
           for k in ('sensitivity', 'symbols')}
    write_json(Path('runs/a/result.json'), {**r, **old})  # as from before there were others
    assert analysis.collect([Path('runs/a')]).equals(rows[rows.readout == 'class token'].reset_index(drop=True))
    with pytest.raises(SettingsError, match='begun with other settings: scenes was 12 and is now 13'):
        analysis.analyse(analysis.settings('smoke', encoders=run.encoders, name='a', scenes=13))

def test_patches_of_an_early_layer():
    "A CNN has more of them than at its end"
    assert analysis.patch_colours(load_encoder('random:resnet18'), np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8), 2).shape == (2, 56, 56, 3)

def test_pairs_of_folders_and_shards(tmp_path):
    picture_folder(tmp_path/'mine', test=5)
    (tmp_path/'shards').mkdir()
    for k in range(2): shard(tmp_path/'shards'/f'{k}.tar', 12*k, 12)
    for data in f'{tmp_path}/mine', f'{tmp_path}/shards':
        r = analysis.analyse(analysis.settings('smoke', encoders=f'{ENCODER},random:clipdino_vit_mini', name=Path(data).name, data=data,
                                               pairs=20))['disagreement']
        assert r['pictures'] > 10 and [q['factor'] for q in r['first']['shared']] == (['class'] if 'mine' in data else [])
    with pytest.raises(SettingsError, match='k=500 pairs are wanted, but 15 pictures have 105'):
        analysis.analyse(analysis.settings('smoke', encoders=f'{ENCODER},random:clipdino_vit_mini', name='b', data=f'{tmp_path}/mine',
                                           pairs=500))
    with pytest.raises(SettingsError, match='nowhere is not there'):
        analysis.analyse(analysis.settings('smoke', encoders=f'{ENCODER},random:clipdino_vit_mini', name='c', data=f'{tmp_path}/nowhere'))
    assert not Path('runs/b/result.json').exists()

def test_classes_of_one_name_are_two():
    r = report(torch.eye(3)[[0, 2, 2]], [0, 1, 2], ('crane', 'crane', 'dog'))
    assert r['mean_class'] == pytest.approx(2/3) and r['per_class'] == {'crane (0)': 1., 'crane (1)': 0., 'dog': 1.}

def test_a_readers_own_objective_is_drawn_too():
    ax = plt.figure().subplots()
    rows = pd.DataFrame(dict(encoder=['clip-mini-s0', 'simclr-mini-s0', 'random:clip-mini-s0', 'clip-mini-s0-captions-full', 'timm:x'], row='object', value=[.9, .5, .1, .2, .3]))
    probe.over_seeds(ax, rows, ['object'])
    assert {c.get_label(): c.lines[0].get_xdata().item() for c in ax.containers} == dict(clip=90, simclr=50, untrained=10)
