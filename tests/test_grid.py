"The grid: which runs it has, and the engine that makes them, on runs that take no time; and a small grid for real."
import json, os, signal, subprocess, sys, time
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from papermill.cli import _resolve_type

from clipdino import grid as g
from clipdino.core import SettingsError, run_dir, write_json
from clipdino.grid import CONNECTORS, KINDS, POLICIES, RUNS, STUDIES, Engine, Job, collect, cost, expected, jobs, main, run_grid, settings, slots, speeds, states, submit
from clipdino.pretrain import check_settings, samples_at_cost_of

top = Path(__file__).parent.parent
process = get_context('fork').Process  # an engine of its own, at once

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder that looks like the repository's top"
    (tmp_path/'settings.ini').touch()
    (tmp_path/'runs').mkdir()
    (tmp_path/'nbs').symlink_to(top/'nbs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.setattr(Engine, 'poll', .01)
    return tmp_path

@dataclass(frozen=True)
class Fake(Job):
    "A job that notes when it starts and ends, and does something in between"
    code: str = ''
    @property
    def command(self):
        note = f"\ndef note(what): open('notes', 'a').write(f'{{what}} {self.name} {{os.getpid()}} {{os.environ.get(\"CUDA_VISIBLE_DEVICES\")}} {{os.environ[\"OMP_NUM_THREADS\"]}}\\n')\n"
        return ['python', '-c', f'import os, pathlib, signal, sys, time{note}d = pathlib.Path("runs/{self.name}")\nd.mkdir(exist_ok=True)\nnote("start")\n{self.code}\nnote("end")\n(d/"result.json").touch()']
    def state(self):
        d = Path('runs')/self.name
        return 'complete' if (d/'result.json').exists() else 'started' if (d/'state-1').exists() else 'new'

def fake(name, *needs, code='', kind='probe'): return Fake(name, kind, dict(preset='smoke'), needs, code)
def workers(n): return [dict(OMP_NUM_THREADS='1')]*n
def notes(): return [l.split() for l in Path('notes').read_text().splitlines()] if Path('notes').exists() else []
def told(what): return [n[1] for n in notes() if n[0] == what]
def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError: return False
def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it never came'
        time.sleep(.01)

# --- which runs there are

def of(study, preset='mini', **given): return {j.name: j for j in jobs(settings(preset, studies=study, **given))}

def test_every_job_is_a_run_that_can_be_typed():
    made = of(','.join(STUDIES), seeds=1)
    names = list(made)
    for j in made.values():
        if j.kind == 'lm': continue
        assert j.run.folder_name == j.name and all(names.index(n) < names.index(j.name) for n in j.needs)
        words = j.command[5:]
        assert words[::3] == ['-p']*len(j.parameters)
        typed = {k: _resolve_type(v) for k, v in zip(words[1::3], words[2::3])}  # as papermill reads it
        assert typed == j.parameters and RUNS[j.kind].settings(**typed) == j.run
        assert (top/j.command[1]).exists()

def test_the_main_study():
    made = of('main', seeds=2)
    encoders = [f'{o}-mini-s0' for o in ('clip', 'dino', 'siglip', 'clip-lm')]
    random = 'random:clip-mini-s0'
    first = [j for j in made.values() if not j.name.replace('-blind', '').endswith('s1')]
    def named(kind): return {j.name for j in first if j.kind == kind}
    assert named('pretrain') == set(encoders)
    assert named('probe') == {f'probe-{e}' for e in (*encoders, 'random-clip-mini-s0')}
    assert named('vlm') == {f'vlm-{e}' for e in (*encoders, 'random-clip-mini-s0')}
    assert named('score') == {f'score-{v}' for v in named('vlm')} | {f'score-vlm-{o}-mini-s0-blind' for o in ('clip', 'dino')}
    analysis, = [j for j in first if j.kind == 'analysis']
    assert analysis.parameters == dict(preset='mini', encoders=','.join([*encoders, random])) and set(analysis.needs) == set(encoders)
    assert made['vlm-random-clip-mini-s0'].parameters == dict(preset='mini', encoder=random, seed=0) and made['vlm-random-clip-mini-s0'].needs == ('clip-mini-s0', 'lm-mini')
    assert made['score-vlm-dino-mini-s1-blind'].run.blind and made['vlm-dino-mini-s1'].run.seed == 1
    assert {**of('main', seeds=1), **of('main', seeds=1, first_seed=1)} == made
    assert len(made) == 2*(4 + 5 + 1 + 5 + 7) + 1

def test_the_other_studies():
    scale, captions, connector, llm, hybrid = (of(s, seeds=1) for s in ('scale', 'captions', 'connector', 'llm', 'hybrid'))
    for o in 'clip', 'dino':
        images = {j.run.images for j in scale.values() if j.kind == 'pretrain' and j.run.objective == o}
        assert images == {3072, 12288, 196608} and {j.run.samples for j in scale.values() if j.kind == 'pretrain'} == {196608}
    assert {j.run.captions for j in captions.values() if j.kind == 'pretrain'} == set(POLICIES) and {j.run.captions for j in captions.values() if j.kind == 'vlm'} == {'web'}
    assert captions['analysis-captions-mini-s0'].run.names[:2] == ['clip-mini-s0', 'clip-mini-s0-captions-no-text']
    v = [j.run for j in connector.values() if j.kind == 'vlm']
    assert {(r.encoder, r.connector) for r in v} == {(f'{o}-mini-s0', c) for o in ('clip', 'dino') for c in CONNECTORS if c != 'mlp'}
    for s, times in ('stage1', 1/8), ('stage2', 4):
        v = [j.run for j in of(s, seeds=1).values() if j.kind == 'vlm']
        assert [r.encoder for r in v] == ['clip-mini-s0', 'dino-mini-s0', 'random:clip-mini-s0'] and {getattr(r, f'{s}_samples') for r in v} == {times*getattr(g.vlm_settings('mini'), f'{s}_samples')}
    early, = (j.run for j in of('early_stage2', seeds=1).values() if j.kind == 'vlm')
    assert early.encoder in of('early', seeds=1) and early.encoder.startswith('clip-mini-s0-samples-') and early.stage2_samples == 4*g.vlm_settings('mini').stage2_samples
    unnamed, = (j.run for j in of('captions_stage2', seeds=1).values() if j.kind == 'vlm')
    assert (unnamed.encoder, unnamed.stage2_samples) == ('clip-mini-s0-captions-no-text', early.stage2_samples)
    assert set(llm) == {'clip-mini-s0', 'dino-mini-s0', 'lm-mini-wide',
                        *(f'{s}vlm-{o}-mini-s0-world-wide' for o in ('clip', 'dino') for s in ('', 'score-'))}
    assert llm['lm-mini-wide'].run.width == 2*g.lm_settings('mini').width
    assert {(j.run.llm, j.run.template) for j in of('llm', preset='paper', given='pretrain.data=a.tar vlm.stage1_data=a.json vlm.stage2_data=b.json').values() if j.kind == 'vlm'} == {('Qwen/Qwen2-7B-Instruct', '')} and g.vlm_settings('paper').template == 'vicuna'
    shorter, = (j.run for j in of('compute', seeds=1).values() if j.kind == 'pretrain' and j.run.objective == 'dino')
    assert shorter.samples == samples_at_cost_of(g.pretrain_settings('mini', 'dino')) < g.pretrain_settings('mini', 'dino').samples
    assert of('compute', seeds=1)['analysis-compute-mini-s0'].run.names == ['clip-mini-s0', shorter.folder_name]
    for preset, given in ('mini', ''), ('mini', 'pretrain.warmup=0.02'), ('mini', 'pretrain.warmup=0'), ('paper', 'pretrain.data=a.tar vlm.stage1_data=a.json vlm.stage2_data=b.json'):
        short, full = ({j.run.samples*j.run.warmup for j in of(s, preset, seeds=1, kinds='pretrain', objectives='clip', given=given).values() if 'samples' in j.name or s == 'main'} for s in ('early', 'main'))
        assert short.pop() == pytest.approx(full.pop()), 'as many samples of warm-up'
    assert [j.run.objective for j in hybrid.values() if j.kind == 'pretrain'] == ['hybrid', 'clip', 'dino'] and [j.name for j in hybrid.values() if j.kind == 'vlm'] == ['vlm-hybrid-mini-s0']
    assert hybrid['analysis-hybrid-mini-s0'].run.names == ['clip-mini-s0', 'hybrid-mini-s0', 'dino-mini-s0']
    both = of('main,captions', seeds=1)
    assert len(both) == len(of('main', seeds=1).keys() | captions.keys()) and both['clip-mini-s0'] == captions['clip-mini-s0']

def test_what_runs_are_counted_in():
    def amount(kind, **given): return RUNS[kind].amount(RUNS[kind].settings(**given))
    for n, given in (40, {}), (8, dict(limit=8)), (40, dict(limit=1000)), (1000, dict(limit=1000, questions='q.tsv')):
        assert amount('score', preset='smoke', **given) == n
    assert g.lm_settings('paper') == g.lm_settings('small')

def test_kinds_bring_what_they_need():
    assert [j.kind for j in of('main', seeds=1, objectives='dino', kinds='probe').values()] == ['pretrain', 'probe', 'probe']
    assert {j.kind for j in of('main', seeds=1, kinds='score').values()} == {'pretrain', 'lm', 'vlm', 'score'}

def test_given():
    made = of('main', seeds=1, given='pretrain.data="a b/{0..9}.tar" vlm.lora=8 pretrain.lr=1e-4 vlm.llm=org/model')
    assert made['dino-mini-s0'].run.data == 'a b/{0..9}.tar' and made['dino-mini-s0'].run.lr == 1e-4
    assert made['vlm-dino-mini-s0-org-model'].run.lora == 8 and not any(j.kind == 'lm' for j in made.values())
    for given, message in (('vlm.rank=8', 'no such setting: rank'), ('vlm.lora=x', 'must be int'),
                           ('model.lora=8', 'is not KIND.SETTING=VALUE')):
        with pytest.raises(SettingsError, match=message): of('main', given=given)
    with pytest.raises(SettingsError, match='vlm.stage1_data=... vlm.stage2_data=...'):
        of('main', 'paper', objectives='clip', given='pretrain.data=x.tar')
    with pytest.raises(SettingsError, match='can only be changed in the world'): of('captions', given='pretrain.data=x.tar')
    for given in 'pretrain.seed=5', 'probe.name=mine', 'pretrain.preset=mini':
        with pytest.raises(SettingsError, match='the grid itself says'): of('main', given=given)
    with pytest.raises(SettingsError, match='not beside llm=world:wide'): of('llm', given='vlm.llm=world:wide')

def test_given_settings_go_to_objectives_that_have_them():
    made = of('main', seeds=1, objectives='clip,dino', kinds='pretrain', given='pretrain.momentum=.9 pretrain.vocab=2048 pretrain.lr=1e-4')
    assert {o: {k: v for k, v in made[f'{o}-mini-s0'].parameters.items() if k not in ('preset', 'objective', 'seed')} for o in ('clip', 'dino')} == dict(clip=dict(vocab=2048, lr=1e-4), dino=dict(momentum=.9, lr=1e-4))

@pytest.mark.parametrize('wrong', [dict(studies='main,all'), dict(objectives='mae'), dict(kinds=''), dict(seeds=0), dict(first_seed=-1),
                                   dict(workers=-1), dict(preset='huge'), dict(sedes=1), dict(objectives='clip,clip'), dict(submit=True),
                                   dict(options='--x'), dict(given='a="b'), dict(slurm=True, options='--a="b')])
def test_wrong_grids_are_refused(wrong):
    with pytest.raises(SettingsError): settings(**wrong)

def test_a_row_that_was_left_unfinished(here):
    "Is no row, and takes none that follows along"
    job = next(iter(of('main', 'smoke', seeds=1, objectives='clip', kinds='pretrain').values()))
    (here/'runs/grid.jsonl').write_text('{"event": "skipped"}\n{"event": "sta')
    engine = Engine([job], [dict(OMP_NUM_THREADS='1')])
    for k in range(2): engine.note('failed', job, why=str(k))
    assert [(r['event'], r.get('why')) for r in g.events()] == [('skipped', None), ('failed', '0'), ('failed', '1')]

def test_a_grid_without_runs(here):
    with pytest.raises(SettingsError, match='stage1 has no runs of the kinds analysis'):
        run_grid(settings('smoke', studies='stage1', kinds='analysis'))

# --- how far they have come

def begin(job, done=False, fingerprint='f', **changes):
    "The folder of a run that was made with these settings"
    d = run_dir(job.name)
    check_settings(d, replace(job.run, **changes), fingerprint)
    if done: write_json(d/'result.json', {})
    return d

def test_states(here):
    made = of('main', 'smoke', seeds=1, objectives='clip')
    clip, probe, vlm, score = (made[f'{k}clip-smoke-s0'] for k in ('', 'probe-', 'vlm-', 'score-vlm-'))
    # the language model may be there
    assert set(states(list(made.values())).values()) - {'complete'} == {'new'} and list((here/'runs').iterdir()) == []
    d = begin(clip)
    assert clip.state() == 'new'
    (d/'state-00000008.safetensors').touch()
    assert clip.state() == 'started'
    write_json(d/'result.json', {})
    assert clip.state() == 'complete'
    begin(vlm).joinpath('stage1').mkdir()
    (here/'runs'/vlm.name/'stage1/state-00000002.safetensors').touch()
    assert vlm.state() == 'started'
    begin(score).joinpath('predictions.jsonl').touch()
    assert score.state() == 'started'
    begin(probe, seed=7)
    assert probe.state() == 'new'  # an attempt that did not end binds nobody

def test_what_changes_nothing_is_no_conflict(here):
    clip = of('main', 'smoke', seeds=1)['clip-smoke-s0']
    begin(clip, done=True, workers=3, save_every=9, processes=4, name=clip.name)
    assert clip.state() == 'complete'

def test_conflicts_stop_the_grid_before_it_starts(here):
    made = of('main', 'smoke', seeds=1)
    begin(made['clip-smoke-s0'], samples=64).joinpath('state-000000001.safetensors').touch()
    begin(made['probe-dino-smoke-s0'], done=True, train=128)
    with pytest.raises(SettingsError) as e: run_grid(settings('smoke', seeds=1))
    assert str(e.value).splitlines() == ['clip-smoke-s0 was begun with other settings: samples was 64 and is now 128; give the new run another name',
                                         'probe-dino-smoke-s0 was begun with other settings: train was 128 and is now 96; give the new run another name']
    assert not Path('runs/grid.jsonl').exists()

def test_results_that_are_older_than_what_they_were_made_from(here):
    made = [j for j in jobs(settings('smoke', seeds=1, kinds='probe'))]
    for j in made: begin(j, done=True)
    assert g.older(made, states(made)) == []
    late = time.time() + 9
    os.utime('runs/dino-smoke-s0/result.json', (late, late))
    assert g.older(made, states(made)) == ['probe-dino-smoke-s0']

# --- what they cost

def test_no_multiple_is_taken_of_all_there_is():
    given = 'pretrain.data=a.tar vlm.stage1_data=a.json:b vlm.stage2_data=a.json:b'
    with pytest.raises(SettingsError, match='stage1_samples=0 of the preset paper means all that there is'):
        jobs(settings('paper', studies='stage1', given=given))
    v = [j.run for j in jobs(settings('paper', studies='stage1', seeds=1, given=f'{given} vlm.stage1_samples=80000')) if j.kind == 'vlm']
    assert {r.stage1_samples for r in v} == {10000}

def row(seconds, before='new', what='clip', amount=128, threads=1, device='here', event='done'):
    return dict(event=event, kind='pretrain', preset='smoke', what=what, amount=amount, threads=threads, device=device, seconds=seconds,
                before=before)

def test_speeds_are_of_this_device_where_it_is_known(monkeypatch):
    monkeypatch.setattr(g, 'device', lambda: 'here')
    rows = [row(10.), row(30.), row(14.), row(1., before='started'), row(2., event='failed'), row(99., threads=2), row(98., amount=1024),
            row(5., device='there'), row(64., what='dino', device='there', threads=16)]
    t = collect(rows)
    assert t.seconds.tolist() == [14., 99., 98., 5., 64.] and t.runs.tolist() == [3, 1, 1, 1, 1]
    known = speeds(1, t)
    assert known == {('pretrain', 'smoke', 'clip'): [(128, 14/128, 'here'), (1024, 98/1024, 'here')],
                     ('pretrain', 'smoke', 'dino'): [(128, .5, 'there')]}
    made = jobs(settings('smoke', seeds=1, kinds='pretrain', given='pretrain.samples=256'))
    takes = expected(made, known)
    assert takes == {'clip-smoke-s0': (28., 'here'), 'dino-smoke-s0': (128., 'there')}, '256 is nearer to 128 than to 1024'
    c = cost(made, dict.fromkeys([j.name for j in made], 'new') | {'clip-smoke-s0': 'complete'}, takes).loc['pretrain']
    assert (c.complete, c.to_do, c.amount, c.unknown, c.measured_on) == (1, 3, 768, 2, 'there') and c.hours == round(128/3600, 2)

def test_the_table_that_comes_along():
    t = pd.read_csv(top/'nbs/results/cost_grid.csv', keep_default_na=False)
    assert set(t.columns) == set(collect([]).columns) and set(t.kind) <= set(RUNS) and (t.seconds > 0).all()
    made = jobs(settings('mini', objectives='clip,dino,siglip,clip-lm'))
    assert not {j.name for j in made} - set(expected(made, speeds(1, t)))

# --- one machine

def test_each_after_what_it_needs_and_never_more_at_once_than_workers(here):
    chain = [fake('a', code='time.sleep(.2)'), fake('b', code='time.sleep(.2)'), fake('c', 'a', code='time.sleep(.2)'),
             fake('d', 'a', 'b', code='time.sleep(.2)'), fake('e', 'c', 'd'), *(fake(f'x{i}', code='time.sleep(.1)') for i in range(4))]
    out = Engine(chain, workers(3))()
    assert sorted(out['done']) == sorted(j.name for j in chain) and out['failed'] == out['skipped'] == {}
    when = {(n[0], n[1]): i for i, n in enumerate(notes())}
    for j in chain: assert all(when['end', n] < when['start', j.name] for n in j.needs)
    events = g.events()
    assert max(np.cumsum([1 if e['event'] == 'started' else -1 for e in events])) == 3
    assert [e['run'] for e in events if e['event'] == 'done'] == out['done'] and all(e['seconds'] >= .1 for e in events if e['event'] == 'done' and e['run'][0] in 'abcdx')

def test_a_failure_takes_only_its_own_along(here, capsys):
    chain = [fake('a', code='raise ValueError("\\x1b[31mbroken\\x1b[0m")'), fake('b', 'a'), fake('c', 'b'), fake('d'), fake('e', 'd'),
             fake('k', code='os.kill(os.getpid(), 9)'), fake('n', code='os._exit(0)')]
    out = Engine(chain, workers(1))()
    assert out == dict(done=['d', 'e'], failed=dict(a='ValueError: broken', k='killed by SIGKILL', n='it ended without a result'),
                       skipped=dict(b='a', c='b'))
    assert told('start') == ['a', 'd', 'e', 'k', 'n']
    said = capsys.readouterr().out
    assert '2 of 7 runs done, 3 failed, 2 skipped' in said and 'a: ValueError: broken  (runs/a.log)' in said
    again = Engine([replace(j, code='') for j in chain if j.state() != 'complete'], workers(2))()
    assert sorted(again['done']) == ['a', 'b', 'c', 'k', 'n']

def test_a_command_that_is_not_there_is_a_failure(here, monkeypatch):
    monkeypatch.setattr(Fake, 'command', ['no-such-program'])
    assert 'no-such-program' in Engine([fake('a')], workers(1))()['failed']['a']

def test_gpus_are_workers(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,7')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(12), raising=False)
    monkeypatch.setattr(g, 'device', lambda: 'a GPU')
    assert slots() == [dict(OMP_NUM_THREADS='4', CUDA_VISIBLE_DEVICES=i) for i in '457']
    assert [s['CUDA_VISIBLE_DEVICES'] for s in slots(5, 1)] == ['4', '5', '7', '4', '5']
    Engine([fake(n, code='time.sleep(.3)') for n in 'abc'] + [fake('d')], slots())()
    assert {n[3] for n in notes() if n[1] in 'abc'} == {'4', '5', '7'} and {n[4] for n in notes()} == {'4'}
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert [s['CUDA_VISIBLE_DEVICES'] for s in slots()] == ['0', '1', '2']

def test_cores_are_workers_as_far_as_memory_goes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(8), raising=False)
    for gb, n in ((64, 8), (10, 5), (1, 1)):
        monkeypatch.setattr(os, 'sysconf', lambda k, gb=gb: 4096 if k == 'SC_PAGE_SIZE' else gb*2**18)
        assert slots() == workers(n)
    assert slots(2, 3) == [dict(OMP_NUM_THREADS='3')]*2

@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGTERM])
def test_an_engine_that_is_interrupted_leaves_no_processes(here, sent):
    "One run ends when it is told to, one does not; and all go on afterwards"
    deaf = 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n'
    wait = '(d/"state-1").exists() or ((d/"state-1").touch(), time.sleep(60))'
    chain = [fake('a', code=wait), fake('b', code=deaf + wait), fake('c', 'a')]
    def engine():
        for s in signal.SIGINT, signal.SIGTERM:
            signal.signal(s, signal.default_int_handler)  # as in the program, however the tests were started
        Engine.grace = .5
        Engine(chain, workers(2))()
    p = process(target=engine)
    p.start()
    until(lambda: all((here/f'runs/{n}/state-1').exists() for n in 'ab'))
    os.kill(p.pid, sent)
    p.join(30)
    assert p.exitcode == 1 and not any(alive(n[2]) for n in notes())
    assert [j.state() for j in chain] == ['started', 'started', 'new']
    assert sorted(Engine(chain, workers(2))()['done']) == ['a', 'b', 'c'] and told('end') != []
    assert [(e['run'], e['before']) for e in g.events() if e['event'] == 'started'] == [('a', 'new'), ('b', 'new'), ('a', 'started'), ('b', 'started'), ('c', 'new')]

def test_an_engine_that_is_killed_is_waited_for_by_the_next(here, monkeypatch):
    "Its run lives on, here until the next has seen it, and is not started twice"
    wait, said = 'for _ in range(6000):\n    if pathlib.Path("seen").exists(): break\n    time.sleep(.01)', []
    chain = [fake('a', code=wait), fake('b', 'a')]
    def hear(text):
        said.append(text)
        if 'a is being run by another process' in text: Path('seen').touch()
    monkeypatch.setattr(g, 'say', hear)
    p = process(target=lambda: Engine(chain, workers(1))())
    p.start()
    until(lambda: told('start') == ['a'])
    p.kill()
    p.join()
    assert alive(notes()[0][2])
    out = Engine(chain, workers(1))()
    assert out['done'] == ['a', 'b'] and told('start') == ['a', 'b'] == told('end')
    assert 'a is being run by another process' in str(said) and 'a was completed by another process' in str(said)

def test_two_engines_share_the_work(here):
    chain = [fake(f'x{i}', *([f'x{i - 3}'] if i > 2 else []), code='time.sleep(.1)') for i in range(9)]
    ps = [process(target=lambda: Engine(chain, workers(2))()) for _ in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(60)
    assert [p.exitcode for p in ps] == [0, 0] and sorted(told('start')) == sorted(j.name for j in chain)

# --- a cluster

SLURM = '''#!{python}
import json, os, sys
with open({log!r}, 'a') as f: f.write(json.dumps(sys.argv[1:]) + '\\n')
if '--job-name=dino-smoke-s0' in sys.argv and os.environ.get('FULL'): sys.exit('sbatch: error: the queue is full')
print(1000 + len(open({log!r}).readlines()))
'''
QUEUE = '''#!/bin/sh
[ "$*" = "--me --noheader --format=%i|%j|%Z" ] && cat {queue}
'''

@pytest.fixture
def slurm(here, monkeypatch):
    "Programs that stand for Slurm's: what was submitted, and the file that lists the queue"
    log, queue = here/'submitted', here/'queue'
    (here/'bin').mkdir()
    for name, text in (('sbatch', SLURM.format(python=sys.executable, log=str(log))), ('squeue', QUEUE.format(queue=queue))):
        (here/'bin'/name).write_text(text)
        (here/'bin'/name).chmod(0o755)
    queue.touch()
    monkeypatch.setenv('PATH', f'{here}/bin:{os.environ["PATH"]}')
    return (lambda: [json.loads(l) for l in log.read_text().splitlines()] if log.exists() else []), queue

GRID = dict(preset='smoke', seeds=1, objectives='clip,dino', kinds='probe,score', slurm=True, options='--gpus=1 --comment="two words"')

def test_slurm_shows_its_commands_first(slurm, capsys):
    sent, _ = slurm
    out = run_grid(settings(**GRID))
    said = capsys.readouterr().out
    assert sent() == [] and all(c in said for c in out['commands'])
    made = [j for j in jobs(settings(**GRID)) if j.state() != 'complete']
    subprocess.run(['bash', '-euc', '\n'.join(out['commands'])], check=True)
    shown = sent()
    ids = {j.name: str(1001 + i) for i, j in enumerate(made)}
    for j, args in zip(made, shown, strict=True):
        after = [f'--dependency=afterok:{":".join(ids[n] for n in j.needs if n in ids)}'] if any(n in ids for n in j.needs) else []
        assert [a for a in args if a.startswith('--dependency')] == after
        assert {'--parsable', f'--job-name={j.name}', '--requeue', '--kill-on-invalid-dep=yes', '--gpus=1', '--comment=two words',
                f'--wrap={g.shlex.join(j.command)}'} <= set(args)
    assert submit(made, settings(**GRID)) == {n: str(int(i) + len(made)) for n, i in ids.items()}
    def without_ids(rows): return [[a for a in r if not a.startswith('--dependency')] for r in rows]
    assert without_ids(sent()[len(made):]) == without_ids(shown)  # what is shown is what is sent

def test_slurm_is_not_asked_twice(slurm, here):
    sent, queue = slurm
    queue.write_text(f'77|clip-smoke-s0|{here}\n88|dino-smoke-s0|/elsewhere\n')
    out = run_grid(settings(**GRID, submit=True))['submitted']
    assert out['clip-smoke-s0'] == '77' and '--job-name=clip-smoke-s0' not in {a for r in sent() for a in r} and '--job-name=dino-smoke-s0' in {a for r in sent() for a in r}
    assert any('--dependency=afterok:77' in r for r in sent())
    done = {j.name: j for j in jobs(settings(**GRID))}['dino-smoke-s0']
    begin(done, done=True)
    assert 'dino-smoke-s0' not in run_grid(settings(**GRID, submit=True))['submitted']

def test_slurm_that_refuses(slurm, monkeypatch):
    monkeypatch.setenv('FULL', '1')
    with pytest.raises(SettingsError, match='sbatch refused dino-smoke-s0: sbatch: error: the queue is full'):
        run_grid(settings(**GRID, submit=True))
    Path('bin/squeue').unlink()
    with pytest.raises(SettingsError, match='there is no squeue here'): run_grid(settings(**GRID, submit=True))

# --- for real

def test_the_program(here, monkeypatch, capsys):
    seen = []
    def run(grid): return seen.append(grid) or dict(done=['a'], failed={}, skipped={})
    monkeypatch.setattr(g, 'run_grid', run)
    main(['--preset', 'smoke', '--seeds', '1', '--slurm', 'true', '--given', 'vlm.lora=8'])
    assert seen == [settings('smoke', seeds=1, slurm=True, given='vlm.lora=8')] and json.loads(capsys.readouterr().out) == dict(done=1, failed=0, skipped=0)
    monkeypatch.setattr(g, 'run_grid', lambda grid: dict(done=[], failed=dict(a='why'), skipped={}))
    with pytest.raises(SystemExit) as e: main(['--preset', 'smoke'])
    assert e.value.code == 1
    def stop(grid): raise KeyboardInterrupt
    monkeypatch.setattr(g, 'run_grid', stop)
    with pytest.raises(SystemExit) as e: main(['--preset', 'smoke'])
    assert e.value.code == 130
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def test_a_small_grid(here, monkeypatch, capsys):
    "All kinds of runs, by papermill; a second time there is nothing to do"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    small = settings('smoke', seeds=1, objectives='clip')
    made = [j for j in jobs(small) if j.name in ('clip-smoke-s0', 'lm-smoke', 'probe-random-clip-smoke-s0',
                                                 'analysis-clip-smoke-s0-random-clip-smoke-s0', 'vlm-clip-smoke-s0',
                                                 'score-vlm-clip-smoke-s0-blind')]
    out = Engine(made, slots(2))()
    assert out['failed'] == out['skipped'] == {} and len(out['done']) == 6
    assert set(states(made).values()) == {'complete'} and json.loads((here/'runs/score-vlm-clip-smoke-s0-blind/result.json').read_text())['blind']
    assert set(collect().kind) >= set(KINDS) and all((here/f'runs/{n}.ipynb').exists() for n in out['done'] if n != 'lm-smoke')
    assert {n for n, s in states(jobs(small)).items() if s == 'new'} == {'probe-clip-smoke-s0', 'vlm-random-clip-smoke-s0',
                                                                         'score-vlm-clip-smoke-s0', 'score-vlm-random-clip-smoke-s0'}

def test_a_grid_needs_a_clone(here):
    (here/'nbs').unlink()
    with pytest.raises(SettingsError, match='a grid runs the notebooks of a clone of the repository, and .* is in none'):
        run_grid(settings('smoke'))
    assert not list((here/'runs').iterdir())
