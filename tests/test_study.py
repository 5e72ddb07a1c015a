"From result files to verdicts: made-up results of which the verdict is known, and results that must be refused."
import json, math, re, shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student, ttest_1samp

import clipdino.analysis as analysis, clipdino.pretrain as pretrain, clipdino.probe as probe, clipdino.study as study, clipdino.vlm as vlm, clipdino.vmcbench as vmcbench
from clipdino.analysis import patch_colours
from clipdino.core import SettingsError, digest, read_json, stamp, write_json
from clipdino.encoders import load_encoder
from clipdino.grid import Grid
from clipdino.questions import GROUPS, LETTERS, VISION, Questions
from clipdino.study import CLAIMS, OTHERWISE, RESULTS, WAYS, Claim, Effect, Results, along, by_seed, collect, corrected_together, deciding, effect, judge, judgements, kinds_of_tasks, like, matched, mean_of, measured, moves, of_length, on_average, outcome, probed, read_table, sensitivity, show_moves, told, two_sided, verdicts
from clipdino.world import render, scene
from clipdino.worldvqa import WorldVQA

OBJECTIVES, SEEDS, N = ('clip', 'dino', 'siglip', 'clip-lm', 'untrained'), (0, 1, 2), 1000
QUESTIONS = WorldVQA('test', N, 48)
OWN = {(k, o): digest(deciding(k, 'mini', o)[0])
       # settings of the preset
       for k, objectives in dict(pretrain=OBJECTIVES[:-1], probe=[''], analysis=[''], vlm=[''], vmcbench=['']).items() for o in objectives}

def encoder(o, s): return f'random:clip-mini-s{s}' if o == 'untrained' else f'{o}-mini-s{s}'

def letters(share, seed):
    "Answers of which a share is right, by data set"
    g = np.random.default_rng(seed)
    return ''.join(r['answer'] if g.random() < share(r['category']) else LETTERS[LETTERS.index(r['answer']) - 1] for r in QUESTIONS.rows)

def write(folder, values={}, answers={}, spread=.003, drop=(), more=(), seeds=SEEDS):
    "Tables of made-up runs: values by (objective or variant, what), shares of right answers by objective or variant; `more`: (objective, variant), of an encoder if it has samples, images or captions, else of a VLM"
    g, runs, curves, probe, analysis, told = np.random.default_rng(0), [], [], [], [], []
    def ran(run, kind, s, objective='', variant='', **more):
        runs.append(dict(version=RESULTS, run=run, kind=kind, preset='mini', objective=objective, seed=s, variant=variant,
                         settings=variant or OWN[kind, objective], data='d', commit='c', device='cpu', **more))
    for k, (o, variant) in enumerate([(o, '') for o in OBJECTIVES] + list(more)):
        for s in seeds:
            own, noise, key = variant.startswith(('samples', 'images', 'captions')), lambda: spread*g.normal(), variant or o
            e, w = encoder(o, s) + f'-{variant.replace(" ", "-")}'*own, f'w{o}{s}' + variant*own
            if o != 'untrained' and (own or not variant): ran(e, 'pretrain', s, o, variant, of='', weights=w)
            ran(f'vlm-{o}-{s}-{variant}', 'vlm', s, variant='' if own else variant, of=e, weights=w)
            for kind in ('probe', 'analysis')*(own or not variant) + ('vmcbench',):
                ran(f'{kind}-{o}-{s}-{variant}', kind, s, of=e, weights='')
            if {(o, s), (variant, s)} & {*drop}: continue
            if own or not variant:
                if o != 'untrained':
                    curves += [dict(run=e, objective=o, preset='mini', seed=s, settings='', data='d', commit='c', device='cpu', samples=n, split='val', task='object', readout='linear', accuracy=f*values.get((key, 'object'), .8)) for n, f in ((98304, .9), (196608, 1))]
                for task, usual in ('object', .8), ('within families', .6), ('word', .5), ('colour', .5), ('style', .5):
                    v = values.get((key, task), usual if o != 'untrained' else .2) + noise()
                    probe += [dict(run=f'probe-{o}-{s}-{variant}', encoder=e, weights=w, commit='c', task=task, how=how, value=v, low=v - .002, high=v + .002, chance=.01, pictures=4096) for how in ('linear', 'knn')]
                for what, row, usual in ('sensitivity', 'object', 1.), ('sensitivity', 'word', .5), ('sensitivity', 'colour', .5), ('sensitivity', 'style', .5), ('similarity', 'symbol', .8):
                    v = values.get((key, row), usual) + noise()
                    analysis.append(dict(run=f'analysis-{o}-{s}-{variant}', encoder=e, weights=w, what=what, row=row,
                                         readout='class token', value=v, low=v - .01, high=v + .01, commit='c'))
            share = answers.get((o, variant), answers.get(key, answers.get(o, lambda c: .3 if o == 'untrained' else .6)))
            told.append(dict(run=f'vmcbench-{o}-{s}-{variant}', vlm=f'vlm-{o}-{s}-{variant}', encoder=e, encoder_weights=w, saved=w,
                             llm='world', llm_weights='w', preset='mini', seed=s, blind=False, weights='', questions=QUESTIONS.name,
                             fingerprint=QUESTIONS.fingerprint,
                             **dict.fromkeys(('letter', 'likely', 'calibrated'), letters(share, (s, k)))))
    for k, rows in dict(runs=runs, pretrain=curves, probe=probe, analysis=analysis, vmcbench=told).items():
        pd.DataFrame(rows).to_csv(folder/f'{k}_mini.csv', index=False)
    pd.DataFrame([dict(questions=QUESTIONS.name, fingerprint=QUESTIONS.fingerprint, i=i, category=r['category'], answer=r['answer']) for i, r in enumerate(QUESTIONS.rows)]).to_csv(folder/'questions_mini.csv', index=False)
    return folder

def judged(folder, **given): return judge(Results('mini', write(folder, **given))).set_index('claim')

AS_THE_PAPER = dict(values={('clip', 'within families'): .7, ('clip', 'word'): .9, ('dino', 'colour'): 1.1, ('dino', 'style'): 1.,
                            ('clip', 'symbol'): .6},
                    answers=dict(clip=lambda c: .85 if c in GROUPS['OCR'] else .55 if c in VISION else .6,
                                 dino=lambda c: .55 if c in GROUPS['OCR'] else .8 if c in VISION else .6))

def test_what_the_paper_says_is_replicated(tmp_path):
    t = judged(tmp_path, **AS_THE_PAPER)
    assert dict(t.verdict[['1', '2', '3o', '3c', '4', '5', '6v']]) == dict.fromkeys(('1', '2', '3o', '3c', '4', '5', '6v'), 'replicated')
    assert t.effect['2'] == pytest.approx(10, abs=.6) and (t.effect['3o'], t.effect['3c']) == (pytest.approx(.2, abs=.02), pytest.approx(-.55, abs=.02)) and t.effect['4'] == pytest.approx(-.2, abs=.01)
    assert t.verdict['8'] == 'incomplete' and 'there are none: the study llm has them' in t.why['8']
    assert (t.low[t.effect.notna()] < t.effect.dropna()).all() and set(t.seeds.dropna()) == {3}

def test_the_opposite_is_reversed(tmp_path):
    swapped = dict(values={(dict(clip='dino', dino='clip')[o], k): v for (o, k), v in AS_THE_PAPER['values'].items()} | {('dino', 'object'): .7}, answers=dict(clip=lambda c: .9 if c in VISION else AS_THE_PAPER['answers']['dino'](c), dino=lambda c: .5 if c in VISION else AS_THE_PAPER['answers']['clip'](c)))
    t = judged(tmp_path, **swapped)
    assert dict(t.verdict[['1', '2', '3o', '3c', '4', '5', '6v']]) == dict.fromkeys(('1', '2', '3o', '3c', '4', '5', '6v'), 'reversed')

def test_seeds_that_disagree_leave_it_open(tmp_path):
    t = judged(tmp_path, values=AS_THE_PAPER['values'], spread=.3)
    assert set(t.verdict[['1', '2', '4']]) <= {'inconclusive', 'not shown better'} and t.verdict['5'] == 'inconclusive', 'and no VLM is better than another'

def test_encoders_that_learned_nothing_are_not_compared(tmp_path):
    t = judged(tmp_path, values={('dino', 'object'): .2, ('clip', 'object'): .2},
               answers=dict(clip=lambda c: .3, dino=lambda c: .3, siglip=lambda c: .3))
    assert t.verdict['1'] == 'not shown better' and t.floor['1'] == 'CLIP and DINO not shown better than untrained'
    assert t.verdict['7s'] == 'not shown better' and t.floor['7t'] == 'CLIP not shown better than untrained'
    v = verdicts(dict(one=t.reset_index(), other=t.iloc[:1].reset_index())).set_index('')
    assert v.one['7t'].endswith('], CLIP not shown better than untrained, 3 seeds') and v.other['1'].endswith('CLIP and DINO not shown better than untrained, 3 seeds') and v.other['2'] == ''

def test_choices_that_are_not_a_claims_are_empty(tmp_path, monkeypatch):
    some = {k: OTHERWISE[k] for k in ('equal accuracy', 'class token alone', '20 nearest neighbours', 'generated answers')}
    monkeypatch.setattr(study, 'OTHERWISE', some)
    t = sensitivity(Results('mini', write(tmp_path, **AS_THE_PAPER)))
    assert list(t.columns) == list(CLAIMS) and t.loc['20 nearest neighbours', '5'] == '' and 'replicated' in t.loc['20 nearest neighbours', '2'] and t.loc['class token alone', '2'] == t.loc['equal accuracy', '2'] == 'incomplete'
    assert 'replicated' in t.loc['generated answers', '5'] and t.loc['generated answers', '3o'] == ''
    assert list(t.index) == list(some), 'VLMs of one copy of a language model have no rows of their own'

def test_copies_of_a_language_model_are_judged_apart(tmp_path, monkeypatch):
    "Of four seeds, the VLMs of two were made with a copy with which CLIP's read, and the others' with one with which none does"
    t = pd.read_csv(write(tmp_path, **AS_THE_PAPER, seeds=range(4))/'vmcbench_mini.csv')
    right = dict(zip(t.run, t.calibrated))
    poor = t.seed.isin((1, 3))
    t['llm_weights'] = np.where(poor, 'poor', 'good')
    t.loc[poor & t.vlm.str.startswith('vlm-clip-'), 'calibrated'] = [right[f'vmcbench-dino-{s}-'] for s in t.seed[poor & t.vlm.str.startswith('vlm-clip-')]]
    t.to_csv(tmp_path/'vmcbench_mini.csv', index=False)
    r = Results('mini', tmp_path)
    monkeypatch.setattr(study, 'OTHERWISE', {'equal samples': {}})
    s = sensitivity(r)
    gaps = [float(s.loc[k, '5'].split(',')[0]) for k in ('VLMs of seeds 0, 2', 'VLMs of seeds 1, 3')]
    assert r.copies() == [[0, 2], [1, 3]] and gaps == [pytest.approx(30, abs=8), 0] and s.loc['VLMs of seeds 1, 3', '1'] == ''
    assert judge(r.of_seeds([1, 3])).set_index('claim').seeds[['1', '5']].tolist() == [4, 2], 'encoders are the same with any language model'

def test_matched_by_accuracy(tmp_path):
    "CLIP is far ahead at the end; stopped where it classifies like DINO it is no better within families, and the run that was stopped later is not taken"
    early, late = 'samples=24576 warmup=0.8', 'samples=98304 warmup=0.2'
    values = {('dino', 'object'): .5, ('dino', 'within families'): .3, (early, 'object'): .5, (early, 'within families'): .3,
              (late, 'object'): .7, (late, 'within families'): .5}
    r = Results('mini', write(tmp_path, values, {early: lambda c: .6}, more=[('clip', early), ('clip', late)], spread=.001))
    samples, accuracy = (judge(r, matching=m).set_index('claim') for m in ('samples', 'accuracy'))
    assert like(r, 'clip', 'dino') == early and list(accuracy.index) == ['1', '2', '3o', '3c', '4', '5', '6', '6v']
    assert dict(samples.verdict[['1', '2']]) == {'1': 'reversed', '2': 'replicated'} and samples.effect['1'] == pytest.approx(30, abs=1)
    assert accuracy.verdict['1'] == 'replicated' and accuracy.effect['2'] == pytest.approx(0, abs=1) and accuracy.verdict['2'] == 'inconclusive' and 'incomplete' not in set(accuracy.verdict)
    tables = judgements(r)
    t = verdicts(tables).set_index('')
    assert re.fullmatch(r'[+-]0\.\d points \[.+\], inconclusive \(p\s=\s\d\.\d+\), 3 seeds', t['equal accuracy']['2']) and t['equal accuracy']['7s'] == '' and '; Equal accuracy: ' in told(tables, '1').data
    with pytest.raises(SettingsError, match='matching.*samples'): matched(r, 'time', 'clip', 'dino')
    with pytest.raises(SettingsError, match='only CLIP and DINO are matched, not clip and siglip'): matched(r, 'accuracy', 'clip', 'siglip')
    assert matched(r, 'accuracy', 'dino', 'untrained') == {}
    r = Results('mini', write(tmp_path, values | {('clip', 'object'): .4}, more=[('clip', early)]))
    with pytest.raises(SettingsError, match='DINO classifies better than CLIP here'): matched(r, 'accuracy', 'clip', 'dino')
    r = Results('mini', write(tmp_path, values, more=[('clip', late)]))
    with pytest.raises(SettingsError, match=f'no short run of clip is within 5 points of dino: the nearest, with {late}, is 20.0 away'): like(r, 'clip', 'dino')
    with pytest.raises(SettingsError, match=r"judge is about the objectives that the claims name; for others call a claim's function"):
        judge(r, a='siglip')

def test_at_equal_compute_the_dearer_objective_stops_early(tmp_path):
    flops = {o: pretrain.cost(pretrain.settings('mini', o))['gflop'] for o in ('clip', 'dino')}
    n = pretrain.samples_at_cost_of(run := pretrain.settings('mini', 'dino'))
    assert flops['clip']*run.samples - flops['dino']*run.batch < flops['dino']*n <= flops['clip']*run.samples and n % run.batch == 0
    assert pretrain.samples_at_cost_of(pretrain.settings('mini', 'siglip')) == run.samples
    r = Results('mini', write(tmp_path, {('dino', 'object'): .8, (v := f'samples={n}', 'object'): .7, (v, 'symbol'): .9},
                              more=[('dino', v)], drop=[(v, 2)]))
    t = judge(r, matching='compute').set_index('claim')
    assert matched(r, 'compute', 'siglip', 'dino') == {'dino': v} and t.effect['1'] == pytest.approx(10, abs=.6) and t.effect['4'] == pytest.approx(-.1, abs=.01)
    assert set(t.seeds[['1', '2', '3o', '3c', '4']]) == {2}, 'of the seeds that were made for it'
    t = judge(Results('mini', write(tmp_path)), matching='compute').set_index('claim')
    assert set(t.verdict) == {'incomplete'} and t.why['1'] == f'there is no run of dino with {v}'

def test_other_readouts_are_judged_where_they_were_taken(tmp_path):
    r = Results('mini', write(tmp_path, {('dino', 'symbol'): .9}))
    assert set(judge(r, readout='mean patch').verdict) == {'incomplete'} and judge(r, readout='class token').set_index('claim').verdict['4'] == 'replicated'
    path = tmp_path/'analysis_mini.csv'
    t = pd.read_csv(path)
    pd.concat([t, t.assign(readout='mean patch', value=1 - t.value)]).to_csv(path, index=False)
    r = Results('mini', tmp_path)
    assert {k: judge(r, readout=k).set_index('claim').effect['4'] for k in ('class token', 'mean patch')} == {'class token': pytest.approx(-.1, abs=.01), 'mean patch': pytest.approx(.1, abs=.01)}
    with pytest.raises(SettingsError, match="readout='cls' is not one of class token, mean patch, standardised"):
        CLAIMS['4'].f(r, readout='cls')

def test_the_gap_along_a_setting(tmp_path):
    "With few images CLIP's lead is gone; captions are nothing to DINO, whose main runs are compared"
    few, silent = 'images=3072', 'captions=no-text'
    better = lambda c: .8
    r = Results('mini', write(tmp_path, answers={'clip': better, silent: lambda c: .3 if c in GROUPS['OCR'] else .8},
                              more=[('clip', few), ('dino', few), ('clip', silent), ('clip', 'connector=linear'),
                                    ('dino', 'connector=linear')]))
    t, c = (along(r, k).set_index(['value', 'line']) for k in ('images', 'captions'))
    assert list(dict.fromkeys(t.index.get_level_values(0))) == ['49152', '3072'] and set(t.seeds) == {3}
    assert t.effect['49152', 'all'] == pytest.approx(20, abs=4) and c.effect['web', 'OCR'] == pytest.approx(20, abs=8) and c.effect['no-text', 'OCR'] == pytest.approx(-30, abs=8)
    silent = along(Results('mini', write(tmp_path, {('captions=no-text', 'word'): .2}, more=[('clip', silent)])), 'captions', 'linear probe').set_index(['value', 'line'])
    assert silent.effect['web', 'words'] == pytest.approx(0, abs=1) and silent.effect['no-text', 'words'] == pytest.approx(-30, abs=1) and silent.effect['no-text', 'objects'] == pytest.approx(0, abs=1)
    assert [len({*along(r, k).value}) for k in ('images', 'captions', 'connector', 'llm')] == [2, 2, 2, 1]
    one = [along(Results('mini', write(tmp_path, more=[('clip', 'captions=no-text')], drop=[(o, s) for o in OBJECTIVES for s in (1, 2)])), 'captions', how) for how in ('VLM', 'linear probe')]
    for t in one:
        assert set(t.seeds) == {1} and (t.low < t.effect).all() and (t.effect < t.high).all(), 'of one seed, over pictures or questions alone'

def less(folder, without):
    (t := read_table(folder/'vmcbench_mini.csv'))[~t.run.isin(without)].to_csv(folder/'vmcbench_mini.csv', index=False)

def test_a_setting_is_followed_in_the_seeds_that_all_its_values_have(tmp_path):
    "And where an objective lacks a value, its main runs do not stand in for it"
    few, fewer = 'images=12288', 'images=3072'
    write(tmp_path, **AS_THE_PAPER, more=[(o, v) for o in ('clip', 'dino') for v in (few, fewer)])
    less(tmp_path, [f'vmcbench-dino-{s}-{few}' for s in (1, 2)])
    assert (t := along(Results('mini', tmp_path), 'images')).value.nunique() == 3 and set(t.seeds) == {1}
    less(tmp_path, [f'vmcbench-dino-0-{few}'])
    assert set((t := along(Results('mini', tmp_path), 'images')).value) == {'49152', '3072'} and set(t.seeds) == {3}

def test_scorings_of_fewer_questions_or_in_one_way_stand_beside_the_others(tmp_path):
    write(tmp_path, **AS_THE_PAPER)
    before = judge(Results('mini', tmp_path))
    runs, told = (read_table(tmp_path/f'{k}_mini.csv') for k in ('runs', 'vmcbench'))
    pilot = told[told.run == 'vmcbench-clip-0-']
    for more, variant in (dict(fingerprint='f', **{k: pilot[k].str[:100] for k in ('letter', 'likely', 'calibrated')}), 'limit=100'), (dict(likely='', calibrated=''), 'how=generate'):
        pd.concat([told, pilot.assign(run='pilot', **more)]).to_csv(tmp_path/'vmcbench_mini.csv', index=False)
        row = runs[runs.run == 'vmcbench-clip-0-'].assign(run='pilot',
                                                          **dict(variant=variant, settings=variant) if variant == 'limit=100' else {})
        pd.concat([runs, row]).to_csv(tmp_path/'runs_mini.csv', index=False)
        assert judge(Results('mini', tmp_path)).equals(before), variant
    told.loc[told.run == 'vmcbench-clip-0-', ['likely', 'calibrated']] = ''
    told.to_csv(tmp_path/'vmcbench_mini.csv', index=False)
    runs.to_csv(tmp_path/'runs_mini.csv', index=False)
    t = judge(Results('mini', tmp_path), protocol='generate').set_index('claim')
    assert t.verdict['5'] == 'replicated' and 'clip has the seeds [1, 2]' in judge(Results('mini', tmp_path)).set_index('claim').why['5']

def test_kinds_of_tasks_beside_each_other(tmp_path):
    "Those without runs are left out: here there are probes of five tasks only, and no encoders that were trained briefly"
    r = Results('mini', write(tmp_path, **AS_THE_PAPER))
    t = kinds_of_tasks(r).set_index('what')
    assert list(t.index) == ['object', 'within families', 'word', 'colour', 'style', *(f'{g} questions' for g in ('General', 'Reasoning', 'OCR', 'Doc & Chart', 'Vision'))] and len(kinds_of_tasks(r, matching='accuracy')) == 0
    assert t.effect['within families'] == pytest.approx(10, abs=.6) and t.effect['OCR questions'] == pytest.approx(30, abs=8) and t.high['Vision questions'] < 0

def test_what_claims_say_in_words(tmp_path):
    r = Results('mini', write(tmp_path, **AS_THE_PAPER))
    tables = judgements(r)
    assert re.fullmatch(r'- \*\*CLIP classifies better within families of classes\*\* \(claim 2; the paper: .+\)\. Equal samples: \+(9|10)\.\d points \[\+\d+\.\d,\s\+\d+\.\d\], \*replicated\* \(p\s=\s0\.0\d\d\); Equal accuracy: \*incomplete\* \(there are no short runs of clip .+\)\.', told(tables, '2').data)
    v = verdicts(tables)
    assert list(v['']) == list(CLAIMS) and set(v['equal accuracy']) == {'incomplete', ''} and v['equal samples'][4].startswith('-0.20 [')
    t = show_moves(r)
    assert list(t.columns) == ['factor', 'clip', 'dino', 'untrained', 'CLIP minus DINO', 'DINO minus untrained'] and list(t.factor) == ['object', 'word', 'colour', 'style']
    for a, b, column in ('clip', 'dino', 'CLIP minus DINO'), ('dino', 'untrained', 'DINO minus untrained'):
        assert [float(v.split()[0]) for v in t[column]] == pytest.approx([d.mean() for d, _ in moves(r, a, b).values()], abs=.006)

@pytest.mark.parametrize('length, most, between, wrong',
                         [('shorter stage 1', 'stage1_samples=16384', 'stage1_samples=32768', 'stage1_samples=262144'),
                          ('longer stage 2', 'stage2_samples=524288', 'stage2_samples=262144', 'stage2_samples=16384')])
def test_vlms_trained_in_another_length(tmp_path, monkeypatch, length, most, between, wrong):
    "In the preset's time CLIP's VLM reads; in the other none does, and there is nothing to compare"
    blind = lambda c: .3
    more = [(o, v) for v in (most, between) for o in ('clip', 'dino', 'untrained')]
    r = Results('mini', write(tmp_path,
                              answers=dict(clip=lambda c: .8 if c in GROUPS['OCR'] else .3, dino=blind) | {(o, most): blind for o in ('clip', 'dino', 'untrained')}, more=more))
    monkeypatch.setattr(study, 'OTHERWISE', {k: OTHERWISE[k] for k in ('equal samples', length)})
    assert judge(r).set_index('claim').verdict['5'] == 'replicated' and (t := judge(r, length=length)).claim.tolist() == ['5', '6', '6v'] and t.verdict[0] == 'not shown better'
    assert sensitivity(r).loc[length, '5'].endswith('not shown better') and set(along(r, most.split('=')[0]).value) == {'131072', *(v.split('=')[1] for v in (most, between))}
    if length in WAYS:
        tables = judgements(r)
        assert verdicts(tables).set_index('')[length]['5'].endswith('CLIP not shown better than untrained, 3 seeds') and f'{length.capitalize()}: ' in told(tables, '5').data
    with pytest.raises(SettingsError, match=f'no VLMs with a {length}, {most}: the study {length[-7:].replace(" ", "")} has them'):
        of_length(Results('mini', write(tmp_path, more=[('clip', wrong)])), length)
    early = 'samples=24576 warmup=0.8'
    r = Results('mini', write(tmp_path, answers={'clip': blind, 'dino': blind, ('clip', f'{early} {most}'): lambda c: .8},
                              more=[('clip', early), ('clip', f'{early} {most}'), *((o, most) for o in ('clip', 'dino', 'untrained'))]))
    both = judge(r, matching='accuracy', length=length).set_index('claim')
    assert both.effect['5'] == pytest.approx(50, abs=8) and both.verdict['5'] == 'replicated' and judge(r, length=length).effect.abs().max() < 8
    with pytest.raises(SettingsError, match="length='long' is not one of shorter stage 1, longer stage 2"): of_length(r, 'long')
    beyond = {'shorter stage 1': 'stage1_samples=8192', 'longer stage 2': 'stage2_samples=1048576'}[length]
    assert of_length(Results('mini', write(tmp_path, more=[('siglip', beyond), ('clip', most)])), length) == most, 'an odd run of another objective changes nothing'

def test_results_on_real_sets_come_first(tmp_path):
    "ImageNet for classes, cars and birds for families, a labelled set's curve for the matching, and questions of any set"
    early, folder = 'samples=24576 warmup=0.8', write(tmp_path,
                                                      values={('clip', 'object'): .9, ('samples=24576 warmup=0.8', 'object'): .8},
                                                      more=[('clip', 'samples=24576 warmup=0.8')],
                                                      **{k: AS_THE_PAPER[k] for k in ('answers',)})
    t = read_table(folder/'probe_mini.csv')
    own = t.encoder.str.startswith('clip-mini')
    def made(task, gap):
        return t[t.task == 'object'].assign(task=task, value=lambda r: .5 + gap*own, low=lambda r: .49 + gap*own,
                                            high=lambda r: .51 + gap*own)
    pd.concat([t, made('imagenet', 0.), made('cars', .2), made('cub', .1), made('flowers', -.1)]).to_csv(folder/'probe_mini.csv', index=False)
    curves = read_table(folder/'pretrain_mini.csv')
    curves.assign(task=curves.task.replace('object', 'classes')).to_csv(folder/'pretrain_mini.csv', index=False)
    for k in 'questions', 'vmcbench':
        read_table(folder/f'{k}_mini.csv').assign(questions='VMCBench test').to_csv(folder/f'{k}_mini.csv', index=False)
    r = Results('mini', folder)
    v = judge(r).set_index('claim')
    assert v.effect['1'] == pytest.approx(0) and v.effect['2'] == pytest.approx(15) and v.verdict['5'] == 'replicated' and r.questions.name == 'VMCBench test'
    assert like(r, 'clip', 'dino') == early and {'imagenet', 'flowers', 'object'} <= set(kinds_of_tasks(r).what)

def test_questions_of_several_sets_are_not_mixed(tmp_path):
    folder = write(tmp_path)
    t, q = (read_table(folder/f'{k}_mini.csv') for k in ('vmcbench', 'questions'))
    pd.concat([t, t.assign(questions='dev', fingerprint='d', **{k: t[k].str[:100] for k in ('letter', 'likely', 'calibrated')})]).to_csv(folder/'vmcbench_mini.csv', index=False)
    pd.concat([q, q[:100].assign(questions='dev', fingerprint='d')]).to_csv(folder/'questions_mini.csv', index=False)
    with pytest.raises(SettingsError, match=f"answered the questions dev and {QUESTIONS.name}; asked='' must be one of these"):
        Results('mini', folder).answers
    assert [len(Results('mini', folder, asked).questions) for asked in ('dev', QUESTIONS.name)] == [100, N]
    q[:900].to_csv(folder/'questions_mini.csv', index=False)
    with pytest.raises(SettingsError, match='questions_mini.csv must have the questions'): Results('mini', folder, QUESTIONS.name).questions

def test_numbers_as_they_are_printed():
    c = pd.DataFrame([dict(effect=-.04, low=-4.13, high=4.05, unit='points'),
                      dict(effect=-.004, low=math.nan, high=math.nan, unit='cosine'),
                      dict(effect=math.nan, low=math.nan, high=math.nan, unit='points')])
    assert [measured(r) for r in c.itertuples()] == ['+0.0 points [-4.1,\xa0+4.0]', '+0.00', '']

def test_an_effect_between_few_seeds_and_many_pictures():
    "Without a shared error it is Student's; with nothing else it is the normal"
    d = [1., 2., 4.]
    e = effect(d)
    assert e.interval() == pytest.approx(ttest_1samp(d, 0).confidence_interval()) and 2*e.above(0) == pytest.approx(ttest_1samp(d, 0).pvalue)
    assert effect([1., 1., 1.], .5).interval() == pytest.approx((1 - .5*1.959964, 1 + .5*1.959964))
    assert effect(d, 2.).interval()[1] == pytest.approx(7/3 + math.hypot(student.ppf(.975, 2)*math.sqrt(7/9), 1.959964*2))

@pytest.mark.parametrize('d, within', [((1., 2., 4.), 2.), ((1., 2., 4.), 0.), ((1., 1.), .5), ((1.5,), .7)])
@pytest.mark.parametrize('alpha', [.5, .05, 1e-6, 1e-12])
def test_tests_are_the_intervals(d, within, alpha):
    e = effect(d, within)
    low, high = e.interval(alpha)
    assert e.above(low) == pytest.approx(alpha/2, rel=1e-6) and e.below(high) == pytest.approx(alpha/2, rel=1e-6) and e.above(high) == pytest.approx(1 - alpha/2)
    assert two_sided(replace(e, value=0.)) == 1. and replace(e, value=1e9).above(0) < 1e-8

def test_seeds_that_agree_and_share_nothing():
    e = effect((1., 1.))
    assert (e.above(0), e.below(0), e.interval()) == (0., 1., (1., 1.))

@pytest.mark.parametrize('value, se, sign, verdict, p', [(3., 1., 1, 'replicated', .0027), (-3., 1., 1, 'reversed', .0027),
                                                         (0., .5, 0, 'replicated', 3.17e-5), (1.9, 1., 0, 'replicated', .46),
                                                         (5., 1., 0, 'reversed', .0027)])
def test_tests_by_hand(value, se, sign, verdict, p):
    got, shows = outcome(Effect(value, (value,), se), sign)
    assert shows == verdict and got == pytest.approx(p, rel=.01)

def test_verdicts_take_holms_correction(monkeypatch):
    "Not Benjamini and Hochberg's, and not none: at 5% each alone would be shown"
    monkeypatch.setattr(study, 'CLAIMS', {str(z): Claim(str(z), '', '', 1, lambda r, z=z: Effect(z, (z, z), 1.)) for z in (3., 2.2, 2.1)})
    t = judge(None)
    assert t.alone.tolist() == pytest.approx([.0027, .0278, .0357], rel=.01)
    assert t.p.tolist() == pytest.approx([.0081, .0556, .0556], rel=.01)
    assert t.verdict.tolist() == ['replicated', 'inconclusive', 'inconclusive']

def test_intervals_cover():
    "Three seeds of pictures that all share: about 95% of 400 intervals hold the truth, and not all"
    g, hits = np.random.default_rng(0), 0
    for _ in range(400):
        e = effect(.5*g.normal(size=3) + .7*g.normal(), .7)
        hits += e.interval()[0] <= 0 <= e.interval()[1]
    assert 370 <= hits <= 396

def changed(folder, table, where='', **values):
    "The table with a run's rows changed, or its first row"
    t = pd.read_csv(folder/f'{table}_mini.csv', keep_default_na=False)
    at = t.run == where if where else t.index[:1]
    for k, v in values.items(): t[k] = t[k].astype(object); t.loc[at, k] = v
    t.to_csv(folder/f'{table}_mini.csv', index=False)
    return Results('mini', folder)

def test_results_that_are_refused(tmp_path):
    with pytest.raises(SettingsError, match='preset smoke are for tests'): Results('smoke', tmp_path)
    with pytest.raises(SettingsError, match='not gathered into the tables'): collect('smoke', tmp_path)
    with pytest.raises(SettingsError, match='runs_mini.csv is not there'): Results('mini', tmp_path)
    with pytest.raises(SettingsError, match=f'version 9, and this code knows up to {RESULTS}'): changed(write(tmp_path), 'runs', version=9)
    with pytest.raises(SettingsError, match='has rows of small'): changed(write(tmp_path), 'runs', preset='small')
    with pytest.raises(SettingsError, match='two rows about clip-mini-s1, with settings other and '):
        changed(write(tmp_path), 'runs', run='clip-mini-s1', settings='other')
    with pytest.raises(SettingsError, match='speak of the encoder stranger, of which'):
        changed(write(tmp_path), 'probe', encoder='stranger').probe
    with pytest.raises(SettingsError, match='clip-mini-s0 has weights wclip0 in one table and zzz in another'):
        changed(write(tmp_path), 'probe', weights='zzz').probe
    with pytest.raises(SettingsError, match='clip-mini-s0 has weights wclip0 in one table and zzz in another'):
        changed(write(tmp_path), 'vmcbench', encoder_weights='zzz').answers
    with pytest.raises(SettingsError, match='speak of the VLM stranger, of which'):
        changed(write(tmp_path), 'vmcbench', vlm='stranger').answers
    with pytest.raises(SettingsError, match='vlm-dino-1- was trained again since its answers were scored: score it again'):
        changed(write(tmp_path), 'runs', weights='zzz', where='vlm-dino-1-').answers
    assert len(changed(tmp_path, 'vmcbench', where='vmcbench-dino-1-', saved='').answers) == len(OBJECTIVES)*len(SEEDS), 'scored before it was noted'
    with pytest.raises(SettingsError, match='vlm-clip-1- and vlm-dino-1-, VLMs of seed 1, were made with two copies of the language model world, not noted and other,'):
        r = write(tmp_path) and changed(tmp_path, 'vmcbench', where='vmcbench-clip-1-', llm_weights='')
        changed(tmp_path, 'vmcbench', where='vmcbench-dino-1-', llm_weights='other').answers

def test_results_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(SettingsError, match='probe-clip-0-: made with other settings than the preset mini stands for now'):
        changed(write(tmp_path), 'runs', settings='of an older preset', where='probe-clip-0-')
    r = read_table(write(tmp_path, more=[('clip', 'connector=linear')])/'runs_mini.csv')
    assert (r.variant == 'connector=linear').sum() == 3
    with pytest.raises(SettingsError, match='made with other settings than connector=linear'):
        changed(tmp_path, 'runs', settings='other', where='vlm-clip-1-connector=linear')
    with pytest.raises(SettingsError, match='clip-mini-s0 and dino-mini-s1 were trained on different data'):
        changed(write(tmp_path), 'runs', data='other', where='dino-mini-s1')
    with pytest.raises(SettingsError, match='speak of the run analysis-dino-1-, of which'):
        changed(write(tmp_path), 'runs', run='analysis-renamed', where='analysis-dino-1-').analysis
    with pytest.raises(SettingsError, match='clip-mini-s0 has weights wclip0 in one table and zzz in another'):
        changed(write(tmp_path), 'analysis', weights='zzz').analysis

def test_a_run_that_read_another_layer_is_none_of_the_main_ones(tmp_path):
    r = changed(write(tmp_path), 'runs', variant='layer=-2', settings='other', where='probe-clip-2-')
    assert judge(r).set_index('claim').why['1'] == 'linear probe of object: clip has the seeds [0, 1] and dino has [0, 1, 2]' and 'layer=-2' in set(r.probe.variant)

def test_which_code_made_what(tmp_path):
    t = Results('mini', write(tmp_path, more=[('clip', 'images=3072'), ('clip', 'connector=linear')])).versions().set_index(['kind', 'objective', 'variants']).versions
    assert [t['pretrain', 'clip', v] for v in ('', 'others')] == ['c (3)']*2 and [t['vlm', 'clip', v] for v in ('', 'others')] == ['c (3)', 'c (6)'] and t['vlm', 'untrained', ''] == t['probe', 'dino', ''] == 'c (3)'

def test_answers_entered_twice_are_no_more_seeds(tmp_path):
    folder = write(tmp_path)
    t = read_table(folder/'vmcbench_mini.csv')
    pd.concat([t, t]).to_csv(folder/'vmcbench_mini.csv', index=False)
    assert judge(Results('mini', folder)).set_index('claim').why['5'].startswith('answers: clip has several for seed [0]; keep the scoring of one VLM for each seed: ')

def test_untrained_encoders_of_two_objectives_are_one(tmp_path):
    folder = write(tmp_path)
    before = judge(Results('mini', folder))
    for k in 'probe', 'vmcbench', 'analysis':
        t = read_table(folder/f'{k}_mini.csv')
        pd.concat([t, t[t.encoder.str.startswith('random:')].assign(encoder=lambda t: t.encoder.str.replace('clip', 'siglip'))]).to_csv(folder/f'{k}_mini.csv', index=False)
    assert judge(Results('mini', folder)).equals(before)

def test_a_missing_seed_is_said(tmp_path):
    t = judged(tmp_path, drop=[('dino', 2)])
    assert t.verdict['1'] == t.verdict['5'] == 'incomplete' and 'clip has the seeds [0, 1, 2] and dino has [0, 1]' in t.why['1'] and 'dino has [0, 1]' in t.why['5']
    assert t.verdict['7s'] != 'incomplete'

def test_what_is_averaged_has_the_same_seeds():
    a, b, c = (pd.Series([1., 2., 3.], s) for s in ((0, 1, 2), (0, 1, 2), (3, 4, 5)))
    assert mean_of([(a, 0.), (b, 0.)]).seeds == (1, 2, 3)
    for odd in c, a[:2]:
        with pytest.raises(SettingsError, match=r'must have the same seeds, and has \[0, 1, 2\] and \['): mean_of([(a, 0.), (odd, 0.)])

def test_differences_on_the_same_pictures_share_their_error():
    a = pd.Series([1., 2., 3.])
    assert mean_of([(a, .3), (a, .1)]).within == pytest.approx(.2)

def test_the_error_of_a_difference_is_of_both_encoders():
    "Found from the intervals of 95%"
    t = pd.DataFrame([dict(objective=o, seed=s, value=.5, low=.5 - 1.95996*se, high=.5 + 1.95996*se)
                      for o, se in (('clip', .03), ('dino', .04)) for s in range(3)])
    assert by_seed(t, 'clip', 'dino', 'probe')[1] == pytest.approx(.05, rel=1e-4)

def test_the_error_of_a_probe_is_in_points(tmp_path):
    assert probed(Results('mini', write(tmp_path)), 'object', 'clip', 'dino').within == pytest.approx(100*.002*2**.5/1.95996, rel=1e-3)

def test_the_error_of_questions_is_that_of_their_mean():
    "Of 400 questions, of which all seeds answer the same quarter"
    r = SimpleNamespace(questions=Questions('q', 'f', [dict(category='GQA', answer='A')]*400))
    e = on_average(r, ['GQA'], np.tile(np.arange(400) % 4 == 0, (3, 1)).astype(float), 'questions')
    assert e.seeds == (25, 25, 25) and e.within == pytest.approx(100*(.25*.75/400)**.5, rel=.04)

@pytest.mark.parametrize('k, ours, theirs', [('test', 'a', 'b'), ('pictures', 4096, 64), ('chance', .01, .5)])
def test_other_pictures_are_not_compared(k, ours, theirs):
    t = pd.DataFrame([dict(objective=o, seed=s, value=.5, low=.4, high=.6, **{k: v}) for o, v in (('clip', ours), ('dino', theirs)) for s in range(3)])
    with pytest.raises(SettingsError, match=f'probe: clip and dino were not tested on the same pictures: {k} is {ours} and {theirs}'): by_seed(t, 'clip', 'dino', 'probe')
    t[k] = [ours]*3 + [ours, ours, '']
    assert by_seed(t, 'clip', 'dino', 'probe')[0].tolist() == [0.]*3, 'tables without a digest are trusted'

def test_the_seed_of_an_analysis_decides_its_scenes():
    own, other = (deciding('analysis', 'mini', then=dict(seed=s))[1] for s in (0, 7))
    assert own != other and deciding('vlm', 'mini', then=dict(seed=0))[1] == deciding('vlm', 'mini', then=dict(seed=7))[1]

def test_a_correction_over_all_columns():
    t = pd.DataFrame(dict(claim=['1', '2', '3'], alone=[1e-6, .02, math.nan], p=[3e-6, .04, math.nan]))
    assert 'over all 6 of this table together, claim 2 (one way) would be inconclusive (p\xa0=\xa00.080); claim 2 (another)' in corrected_together({'one way': t, 'another': t})
    assert corrected_together({'one way': t}).endswith('the verdicts are the same.')

def test_answers_that_were_all_asked_in_one_way(tmp_path):
    t = read_table(write(tmp_path, **AS_THE_PAPER)/'vmcbench_mini.csv')
    t.drop(columns=['likely', 'calibrated']).to_csv(tmp_path/'vmcbench_mini.csv', index=False)
    assert judge(Results('mini', tmp_path), protocol='generate').set_index('claim').verdict['5'] == 'replicated'
    assert judge(Results('mini', tmp_path)).set_index('claim').verdict['5'] == 'incomplete'

def test_digests_that_look_like_numbers(tmp_path):
    pd.DataFrame(dict(fingerprint=['012345678901', '1234567e8901'], value=['1.5', ''])).to_csv(tmp_path/'t.csv', index=False)
    assert read_table(tmp_path/'t.csv').fingerprint.tolist() == ['012345678901', '1234567e8901'] and read_table(tmp_path/'t.csv').value.isna().tolist() == [False, True]

def test_variants_are_compared_in_the_seeds_that_both_have(tmp_path):
    "As others were made with the preset's seeds, one that a variant lacks is not missing; one that only the variant has is"
    early, longer = 'samples=24576 warmup=0.8', 'stage2_samples=524288'
    write(tmp_path, **AS_THE_PAPER, more=[('clip', early), *((o, longer) for o in ('clip', 'dino', 'untrained')),
                                          ('clip', f'{early} {longer}')])
    def seeds(**how): return judge(Results('mini', tmp_path), **how).set_index('claim').seeds['5']
    both = dict(matching='accuracy', length='longer stage 2')
    less(tmp_path, [f'vmcbench-clip-0-{early} {longer}', f'vmcbench-dino-1-{longer}'])
    assert seeds(length='longer stage 2') == 2 and judge(Results('mini', tmp_path), **both).set_index('claim').why['5'].startswith('one seed has no interval')
    less(tmp_path, [f'vmcbench-clip-2-{early}'])
    assert seeds(matching='accuracy') == 2
    less(tmp_path, ['vmcbench-dino-0-'])
    assert 'clip has the seeds [0, 1] and dino has [1, 2]' in judge(Results('mini', tmp_path), matching='accuracy').set_index('claim').why['5']

def test_without_untrained_encoders_there_is_an_effect_and_no_verdict(tmp_path):
    t = judged(tmp_path, **AS_THE_PAPER, drop=[('untrained', s) for s in SEEDS])
    assert set(t.verdict[['1', '2', '5', '6', '6v']]) == {'incomplete'} and t.effect['5'] == pytest.approx(30, abs=8) and t.low['5'] > 20 and 'untrained has []' in t.why['5']
    assert set(t.index[t.p.notna()]) == {'3o', '3c', '4'} and measured(t.loc['5']).startswith('+')

def test_one_seed_has_an_effect_and_no_verdict(tmp_path):
    t = judged(tmp_path, **AS_THE_PAPER, drop=[(o, s) for o in OBJECTIVES for s in (1, 2)])
    assert set(t.verdict) == {'incomplete'} and t.p.isna().all() and t.effect['2'] == pytest.approx(10, abs=1) and t.why['5'].startswith('one seed has no interval') and t.effect['5'] > 10

def test_variants_are_not_mixed_with_the_main_runs(tmp_path):
    "A run with other captions, or another language model, changes no claim but 8"
    before = judged(tmp_path, **AS_THE_PAPER)
    after = judged(tmp_path, **AS_THE_PAPER, more=[('clip', 'captions=no text'), *BOTH_LLMS])
    assert after.effect[:-1].tolist() == before.effect[:-1].tolist() and before.effect.isna()['8'] and after.effect.notna()['8']

BOTH_LLMS = [(o, 'llm=other') for o in ('clip', 'dino')]

@pytest.mark.parametrize('clip, dino, own, verdict', [(.6, .5, (.9, .6), 'replicated'), (1., .65, (.45, .5), 'replicated'),
                                                      (.8, .5, (.9, .8), 'reversed'), (.9, .8, (.8, .5), 'reversed'),
                                                      (.9, .5, (.8, .6), 'dino not shown to answer more with one of them'),
                                                     (.9, .45, (.6, .6), 'dino not shown to answer more with one of them'),
                                                     (.25, .25, (.9, .5), 'clip not shown above chance with both'),
                                                     (.9, .5, (.4, .25), 'dino not shown above chance with both')])
def test_gaps_with_two_language_models(tmp_path, clip, dino, own, verdict):
    "Whichever is the better one; and the claim means nothing if one of them is not better for both encoders, or the other good for nothing"
    shares = {('clip', 'llm=other'): clip, ('dino', 'llm=other'): dino, ('clip', ''): own[0], ('dino', ''): own[1]}
    t = judged(tmp_path, answers={k: lambda c, v=v: v for k, v in shares.items()}, more=BOTH_LLMS)
    assert (t.floor['8'] or t.verdict['8']) == verdict and (t.verdict['8'] == 'not shown better') == (t.floor['8'] != '')
    gain = 100*(clip - dino - own[0] + own[1])
    if not t.floor['8']: assert t.effect['8'] == pytest.approx(gain if clip + dino > sum(own) else -gain, abs=8)

def test_a_language_model_with_a_template_of_its_own(tmp_path):
    name = 'llm=other template='
    r = Results('mini', write(tmp_path, **AS_THE_PAPER, more=[(o, name) for o in ('clip', 'dino')]))
    assert judge(r).set_index('claim').seeds['8'] == 3 and list(dict.fromkeys(along(r, 'llm').value)) == ['world', 'other']

def test_seeds_that_both_language_models_have(tmp_path):
    write(tmp_path, **AS_THE_PAPER, more=BOTH_LLMS)
    told = read_table(tmp_path/'vmcbench_mini.csv')
    own = told[~told.vlm.str.contains('llm=')]
    same = own[own.encoder.str.match('(clip|dino)-mini-s[01]')].assign(vlm=lambda t: t.vlm + 'llm=other', run=lambda t: t.run + 'llm=other')
    pd.concat([own, same]).to_csv(tmp_path/'vmcbench_mini.csv', index=False)
    e = CLAIMS['8'].f(Results('mini', tmp_path))
    assert (e.value, e.within, e.seeds) == (0, 0, (0, 0)), 'the same answers, of two of three seeds'
    pd.concat([own, same[same.encoder.str.startswith(('clip-mini-s0', 'dino-mini-s1'))]]).to_csv(tmp_path/'vmcbench_mini.csv', index=False)
    with pytest.raises(SettingsError, match='llm=other and that of the preset, have no seed in common'):
        CLAIMS['8'].f(Results('mini', tmp_path))
    write(tmp_path, **AS_THE_PAPER, more=[*BOTH_LLMS, ('clip', 'llm=third')])
    assert CLAIMS['8'].f(Results('mini', tmp_path)).seeds, 'what one objective has alone is no second language model'
    write(tmp_path, **AS_THE_PAPER, more=[*BOTH_LLMS, ('clip', 'llm=third'), ('dino', 'llm=third')])
    with pytest.raises(SettingsError, match='one language model besides that of the preset, and there are llm=other, llm=third'):
        CLAIMS['8'].f(Results('mini', tmp_path))

def test_claims_without_runs_make_others_no_surer(tmp_path):
    every, some = judged(tmp_path, **AS_THE_PAPER), judged(tmp_path, **AS_THE_PAPER, drop=[('clip-lm', s) for s in SEEDS])
    assert some.verdict['7t'] == 'incomplete' and every.verdict['7t'] != 'incomplete' and some.p.min() == every.p.min()

def test_an_encoder_that_was_probed_again(tmp_path):
    "The same numbers count once; others are not chosen from"
    write(tmp_path, **AS_THE_PAPER)
    before, runs, t = judge(Results('mini', tmp_path)), read_table(tmp_path/'runs_mini.csv'), read_table(tmp_path/'probe_mini.csv')
    again = t[t.encoder == 'dino-mini-s0']
    pd.concat([runs, runs[runs.run == again.run.iloc[0]].assign(run='again')]).to_csv(tmp_path/'runs_mini.csv', index=False)
    pd.concat([t, again.assign(run='again')]).to_csv(tmp_path/'probe_mini.csv', index=False)
    assert judge(Results('mini', tmp_path)).equals(before)
    pd.concat([t, again.assign(run='again', value=again.value + .01)]).to_csv(tmp_path/'probe_mini.csv', index=False)
    assert f'keep the rows of one of {again.run.iloc[0]}, again' in judge(Results('mini', tmp_path)).set_index('claim').why['1']

def test_real_runs_become_tables(tmp_path, monkeypatch, capsys):
    "A chain of tiny runs, by the modules as programs, gathered twice and in two pieces"
    (tmp_path/'settings.ini').touch()
    monkeypatch.setenv('CLIPDINO_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.delenv('IN_TEST', raising=False)
    monkeypatch.chdir(tmp_path)
    def program(module, options): module.main(['--preset', 'smoke', *options.split()])
    for s in 0, 1:
        program(pretrain, f'--seed {s}')
        program(vlm, f'--encoder {"runs/"*s}clip-smoke-s{s} --name vlm-clip-smoke-s{s} --seed {s} --questions 0 --connector {"linear" if s else "mlp"}')
        program(vmcbench, f'--vlm vlm-clip-smoke-s{s} --how likelihood')
    program(probe, '--encoder runs/clip-smoke-s0 --name probe-clip-smoke-s0')
    program(analysis, '--encoders clip-smoke-s0,clip-smoke-s1')
    shown = {r['name']: r for r in map(json.loads, re.findall(r'^{"name".*', capsys.readouterr().out, re.M))}
    assert shown.keys() == {d.parent.name for d in (tmp_path/'runs').glob('*/result.json')}
    score, probes = (json.loads((tmp_path/'runs'/name/'result.json').read_text())
                     for name in ('score-vlm-clip-smoke-s1', 'probe-clip-smoke-s0'))
    assert shown[score['name']]['twenty'] == {p: {k: t['twenty']['overall'][k] for k in ('value', 'interval')}
                                              for p, t in score['score']['protocols'].items()}
    assert shown[probes['name']]['linear']['object'] == pytest.approx(probes['tasks']['object']['linear']['top1'], abs=1e-4)
    (tmp_path/'runs/cut').mkdir()
    for f in 'settings.json', 'result.json': (tmp_path/'runs/cut'/f).write_text('{')
    (tmp_path/'runs/foreign').mkdir()
    for f in 'settings.json', 'result.json': write_json(tmp_path/'runs/foreign'/f, dict(preset='smoke', objective='clip'))
    (tmp_path/'runs/score-vlm-clip-smoke-s1').rename(tmp_path/'runs/renamed-s1')
    shutil.copytree(tmp_path/'runs/probe-clip-smoke-s0', tmp_path/'runs/probe-of-none')
    write_json(f := tmp_path/'runs/probe-of-none/settings.json', read_json(f) | dict(encoder='random:clipdino_vit_smoke'))  # which is no run
    to = tmp_path/'tables'
    to.mkdir()
    collect('smoke', to=to)
    assert re.search(r'cut is left out: .*settings.json is damaged.*\nforeign is left out: it is no run of the study\nprobe-of-none is left out: random:clipdino_vit_smoke is not among the runs of the preset smoke that were gathered', capsys.readouterr().out)
    t = {f.name.removesuffix('_smoke.csv'): read_table(f) for f in to.iterdir()}
    assert set(t) == {'runs', 'pretrain', 'probe', 'analysis', 'pairs', 'vmcbench', 'questions', 'patches'} and sorted(t['runs'].kind) == ['analysis', 'pretrain', 'pretrain', 'probe', 'vlm', 'vlm', 'vmcbench', 'vmcbench']
    runs = t['runs'].set_index('run')
    assert set(t['vmcbench'].run) == {'score-vlm-clip-smoke-s0', 'renamed-s1'} <= set(runs.index)
    assert runs.variant['clip-smoke-s0'] == runs.variant['vlm-clip-smoke-s0'] == '' and runs.variant['vlm-clip-smoke-s1'] == 'connector=linear' and runs.settings['clip-smoke-s0'] == runs.settings['clip-smoke-s1']
    answers = t['vmcbench'].set_index('encoder').loc['clip-smoke-s1']
    assert answers.llm_weights == read_json(tmp_path/'runs/vlm-clip-smoke-s1/result.json')['llm_weights'] != ''
    assert runs.weights['clip-smoke-s1'] == answers.encoder_weights != runs.weights['clip-smoke-s0'] and runs.weights['vlm-clip-smoke-s1'] == answers.saved != runs.weights['vlm-clip-smoke-s0']
    patches, e = t['patches'].set_index(['encoder', 'i']), load_encoder('clip-smoke-s0')
    images = np.stack([render(scene(0, 'test', i, 'mixed'), 96) for i in range(6)])
    assert list(dict.fromkeys(t['patches'].encoder)) == ['clip-smoke-s0', 'random:clip-smoke-s0'] and patches.colours['clip-smoke-s0', 5] == np.uint8(255*patch_colours(e, images, -2)[5] + .5).tobytes().hex() != patches.colours['random:clip-smoke-s0', 5]
    asked = WorldVQA('test', vmcbench.settings('smoke').n, vmcbench.settings('smoke').canvas)
    assert set(t['questions'].fingerprint) == {asked.fingerprint} and t['questions'][['category', 'answer']].to_dict('records') == [{k: r[k] for k in ('category', 'answer')} for r in asked.rows]
    before = {f.name: f.read_bytes() for f in to.iterdir()}
    (tmp_path/'away').mkdir()
    for d in list((tmp_path/'runs').glob('*s1')): d.rename(tmp_path/'away'/d.name)
    collect('smoke', to=to)
    assert {f: sorted(b.splitlines()) for f, b in before.items()} == {f.name: sorted(f.read_bytes().splitlines()) for f in to.iterdir()}
    with pytest.raises(SettingsError, match='has no finished run of the preset mini'): collect('mini', to=to)

def test_seeds_that_one_objective_has_more():
    assert vmcbench.ENOUGH == Grid().seeds
    compared = vmcbench.compared
    assert compared([0, 1, 2], [0, 1, 2, 5]) == compared([0, 1, 2, 5], [0, 1, 2]) == [0, 1, 2] and compared([1], [1]) == [1]
    for ours, theirs in ([0, 1], [0, 1, 2]), ([0, 1, 3], [0, 1, 2]), ([], []), ([0, 1, 2, 3], [0, 1, 2, 4]): assert not compared(ours, theirs)

def test_the_readme_gets_its_table_and_keeps_the_rest(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch(); (tables := tmp_path/'nbs/results/study').mkdir(parents=True)
    write(tables, **AS_THE_PAPER); monkeypatch.chdir(tmp_path); monkeypatch.setattr(study, 'collect', lambda preset: None)
    Path('README.md').write_text('before\n<!-- claims -->\nold\n<!-- end of claims -->\nafter\n')
    study.refresh()
    assert stamp() == stamp(tables) != stamp(Path(study.__file__).parents[1]/'nbs/results/study'), 'what is stamped is what was read'
    said = Path('README.md').read_text()
    assert said.startswith(f'before\n<!-- claims -->\nPreset `mini`, from result files {stamp(tables)}') and said.endswith(f'|\n\n{corrected_together(judgements(Results("mini", tables)))}\n<!-- end of claims -->\nafter\n')
    assert 'old' not in said and said.count('| 5 |') == 1 and re.search(r'\| 5 \|.*replicated \(p.*\), 3 seeds', said)
