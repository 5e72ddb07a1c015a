"What goes wrong around a run is counted, said in one sentence, and costs nothing that was done."
import json, os, resource
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import shard, start

import clipdino.analysis as analysis, clipdino.core as core, clipdino.probe as probe, clipdino.vlm as vlm, clipdino.vmcbench as vmcbench
from clipdino.core import CannotWrite, Metrics, SettingsError, whole
from clipdino.data import BadData, Shards
from clipdino.pretrain import Trainer, fit, pretrain, retrieval, settings, train
from clipdino.world import World

@pytest.fixture
def top(tmp_path, monkeypatch):
    "A folder that looks like the repository's top"
    (tmp_path/'settings.ini').touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    return tmp_path

def smoke(objective='clip', **given): return settings('smoke', objective, **{'name': 'x', 'probes': 0, **given})

@pytest.mark.parametrize('share', [.01, .1])
def test_bad_samples_are_counted_replaced_and_listed(top, share):
    "As often as they come up, which is the same for any number of loader processes"
    broken = range(0, 300, round(1/share))
    shard(top/'0.tar', 0, 300, broken)
    made = []
    for workers in 0, 2:
        r = pretrain(smoke(name=f'w{workers}', data='0.tar', samples=600, workers=workers, max_bad=.2))
        rows = [json.loads(l) for l in Path(f'runs/w{workers}/bad.jsonl').read_text().splitlines()]
        made.append((r['data'], r['loss'], rows, Path(f'runs/w{workers}/model.safetensors').read_bytes()))
    assert made[0] == made[1]
    data, _, rows, _ = made[0]
    assert data['bad'] == {'undecodable image': len(rows)} and data['seen'] == 592 + len(rows)
    assert {r['key'] for r in rows} == {f'0.tar/{i:06d}' for i in broken}  # two epochs have met each of them
    assert 2*len(broken) - 3 <= len(rows) <= 2.5*len(broken) + 2  # once an epoch, and now and then as a replacement

@pytest.mark.parametrize('share,message', [(.1, r'max_bad=0.05 allows 5.0%\), mostly: undecodable image; bad.jsonl lists them'),
                                           (1., '^sample 0.tar/[0-9]+ and the 16 that could replace it are all bad, mostly: undecodable image$')])
@pytest.mark.parametrize('workers', [0, 1])
def test_too_many_bad_samples_stop_the_run(top, share, message, workers):
    shard(top/'0.tar', 0, 300, range(0, 300, round(1/share)))
    with pytest.raises(BadData, match=message): pretrain(smoke(data='0.tar', samples=300, workers=workers))
    assert not Path('runs/x/result.json').exists()

def test_a_run_with_too_many_bad_samples_goes_on_if_they_are_allowed(top):
    "What is allowed changes no weight"
    shard(top/'0.tar', 0, 300, range(0, 300, 10))
    given = dict(data='0.tar', samples=300, save_every=32)
    with pytest.raises(BadData): pretrain(smoke(**given))
    on, new = (pretrain(smoke(**given, max_bad=.2, name=name)) for name in ('x', 'y'))
    assert on['loss'] == new['loss'] and on['data'] == new['data'] and on['data']['max_bad'] == .2

def test_bad_pairs_are_left_out_of_retrieval(top):
    "The same numbers as from shards without them"
    shard(top/'0.tar', 0, 20, (3, 11))
    for k, (a, n) in enumerate(((0, 3), (4, 7), (12, 8))): shard(top/f'good{k}.tar', a, n)
    t = Trainer(smoke(), Path('.'))
    found, want = (retrieval(t, Shards(spec, 32), batch=7) for spec in ('0.tar', 'good*.tar'))
    assert found.pop('bad') == 2 and want.pop('bad') == 0 and found == want and want['pairs'] == 18

def test_changed_data_are_refused(top):
    "The same names and counts, other bytes"
    shard(top/'0.tar', 0, 60)
    pretrain(smoke(data='0.tar'))
    shard(top/'0.tar', 60, 60)
    with pytest.raises(SettingsError, match='begun with other settings: the data or models that it reads are others now'):
        (top/'runs/x/result.json').rename(top/'runs/x/state-000000001.safetensors')  # as if it had been cut
        pretrain(smoke(data='0.tar'))

@pytest.mark.parametrize('start', (lambda: pretrain(smoke()),
                                   lambda: probe.probe(probe.settings('smoke', encoder='random:clipdino_vit_smoke', name='x'))))
def test_a_result_without_its_settings_is_not_taken_for_any(top, start):
    (top/'runs/x').mkdir(parents=True)
    (top/'runs/x/result.json').write_text('{}')
    with pytest.raises(SettingsError, match='x has a result.json and no settings.json: delete the folder'): start()
    assert not (top/'runs/x/settings.json').exists()

def test_settings_that_are_damaged(top):
    (top/'runs/x').mkdir(parents=True)
    for f in 'result.json', 'settings.json': (top/'runs/x'/f).write_text('{"objective": "cl')
    with pytest.raises(SettingsError, match='runs/x/settings.json is damaged'): pretrain(smoke())

def test_what_was_refused_binds_nobody(top):
    "Also not the next attempt under its name"
    with pytest.raises(SettingsError, match='batch=256 is more than the 128 pictures'): pretrain(smoke(batch=256, samples=256))
    assert pretrain(smoke(batch=32))['samples'] == 128

@pytest.mark.parametrize('objective, vain', [('clip', dict(momentum=.5)), ('clip', dict(text_model='gpt2')),
                                             ('siglip', dict(clip_weight=3.)), ('dino', dict(captions='no-text')),
                                             ('dino', dict(vocab=2000)), ('hybrid', dict(unlocked=1)), ('clip-lm', dict(text_layers=4))])
def test_settings_that_an_objective_has_no_use_for(top, objective, vain):
    with pytest.raises(SettingsError, match=f'{next(iter(vain))}: {objective} has no use for it'): pretrain(smoke(objective, **vain))
    assert not (top/'runs').exists()

def test_a_world_that_was_cut_is_rendered_again(top, monkeypatch):
    monkeypatch.setenv('CLIPDINO_CACHE', str(top/'cache'))
    before = World('val', 8, 32).images.copy()
    path, = (top/'cache').glob('world-*.npy')
    path.write_bytes(path.read_bytes()[:-100])
    assert (World('val', 8, 32).images == before).all()

def limited(folder, size, out):
    "A run in a process whose files may not grow beyond `size` bytes"
    os.chdir(folder)
    torch.set_num_threads(1)
    if size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try: pretrain(smoke('dino', save_every=16, samples=128))
    except CannotWrite as e: out.put(str(e))

def test_a_full_disk_loses_nothing(top):
    "Files that may not grow stand for it: the state can't be written, what is there stays, and the next start goes on from it"
    from helpers import context
    out = context.Queue()
    (top/'straight').mkdir(), (top/'straight/settings.ini').touch()
    start(limited, top/'straight', 0, out).join()
    start(limited, top, 20_000, out).join()
    assert 'state-000000001.safetensors can not be written: File too large. Nothing was lost; make room and give the same command again' in out.get(timeout=5)
    assert sorted(p.name for p in (top/'runs/x').iterdir()) == ['.lock', 'bad.jsonl', 'metrics.jsonl', 'settings.json']
    start(limited, top, 0, out).join()
    assert (top/'runs/x/model.safetensors').read_bytes() == (top/'straight/runs/x/model.safetensors').read_bytes()
    assert [r['step'] for r in Metrics.read('runs/x/metrics.jsonl')] == list(range(1, 9))

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_is_read_only(top):
    (top/'runs').mkdir(mode=0o500)
    with pytest.raises(CannotWrite, match='runs/x can not be written: Permission denied. Nothing was lost; make it writable'):
        pretrain(smoke())

def test_a_name_that_is_too_long(top):
    with pytest.raises(CannotWrite, match='File name too long. Nothing was lost; give it a shorter name'): pretrain(smoke(name='x'*300))

@pytest.mark.parametrize('start', (lambda: pretrain(smoke()),
                                   lambda: vlm.train_vlm(vlm.settings('smoke', encoder='random:clipdino_vit_smoke', name='x')),
                                   lambda: probe.probe(probe.settings('smoke', encoder='random:clipdino_vit_smoke', name='x')),
                                   lambda: analysis.analyse(analysis.settings('smoke', encoders='random:clipdino_vit_smoke,random:vit_tiny_patch16_224', name='x')),
                                   lambda: vmcbench.evaluate(vmcbench.settings('smoke', vlm='untrained', name='x'))))
def test_a_second_process_is_refused(top, start, monkeypatch):
    monkeypatch.setattr(core, 'FileLock', lambda path, timeout: FileLock(path, timeout=.1))
    (top/'runs/x').mkdir(parents=True)
    with FileLock(top/'runs/x/.lock'), pytest.raises(SettingsError, match='another process is running x; wait for it'): start()
    assert [p.name for p in (top/'runs/x').iterdir()] == ['.lock']

def test_a_run_that_another_process_ended_meanwhile_is_not_repeated(top):
    "It waited for the folder's lock, and finds the result when it gets it"
    result = pretrain(smoke())
    before = Path('runs/x/result.json').stat().st_mtime_ns
    assert train(smoke(), Path('runs/x')) == result and Path('runs/x/result.json').stat().st_mtime_ns == before

def test_collapse_is_said(tmp_path, capsys):
    "Uniform targets, one prototype for all, and a training that is well"
    for k, (given, centre, message) in enumerate(((dict(teacher_temp=50., warmup_teacher_temp=50.), 0.,
                                                   'the targets are uniform and the loss stands at ln(32) = 3.47'),
                                                 (dict(centre_momentum=1.), -100., 'all pictures go to one prototype'), ({}, 0., ''))):
        (tmp_path/f'{k}').mkdir()
        t = Trainer(smoke('dino', samples=320, save_every=1000, **given), tmp_path/f'{k}')
        t.objective.centre[0] = centre
        fit(t)
        assert [s[:len(message)] for s in t.watch.said] == [message]*bool(message)
        assert capsys.readouterr().out.count('trouble at') == bool(message)

def test_two_writers_of_a_file_do_not_meet(tmp_path, monkeypatch):
    "Also on two machines that share the folder, where both may be process number 7"
    monkeypatch.setattr('os.getpid', lambda: 7)
    with whole(tmp_path/'x') as a:
        a.write_text('first')
        with whole(tmp_path/'x') as b: b.write_text('second')
    assert (tmp_path/'x').read_text() == 'first' and [p.name for p in tmp_path.iterdir()] == ['x']
