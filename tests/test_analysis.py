"What analyses measure, against the formulas; which pairs are found, and what the table of analyses holds."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import clipdino.analysis as analysis
from clipdino.core import write_json
from clipdino.encoders import load_encoder
from clipdino.views import View, make_views
from clipdino.world import NAMES, angle_of, background, object_mask, scene

ENCODER = 'random:clipdino_vit_smoke'

def smoke(**given): return analysis.settings('smoke', encoders='a,b', **given)

def test_sensitivity_is_distance_over_distance():
    "How far a changed factor moves an embedding, by how far apart unrelated scenes are"
    e, run = load_encoder(ENCODER), smoke()
    rows, read = analysis.sensitivity([e], run), analysis.embedder(e, run)
    for factor in 'colour', 'object':
        before, after = map(read, analysis.change(factor, run.scenes, run.canvas, run.seed))
        for k, a in before.items():
            want = (a - after[k]).square().sum()/(a - a.roll(1, 0)).square().sum()
            assert next(r['ratio'] for r in rows if (r['factor'], r['readout']) == (factor, k)) == pytest.approx(want.item(), rel=1e-4)

def test_the_similarity_of_one_symbol_over_its_looks():
    z = F.normalize(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)), dim=2)
    want = np.mean([float(i[a] @ i[b]) for i in z for a in range(3) for b in range(a)])
    assert analysis.within_similarity(z)[0] == pytest.approx(want, abs=1e-6)

def test_alignment_is_the_distance_of_two_crops_of_a_picture():
    e, run = load_encoder(ENCODER), smoke(batch=7)
    x = np.array(analysis.Pictures('mixed', 'test', 20, 32).world.images)
    ids, crop = torch.arange(20), View(e.size, (.4, 1.), flip=.5)
    v, = make_views([[crop, crop]], torch.from_numpy(x), torch.full((20, 2), 32), run.seed, ids*0, ids, e.mean, e.std)
    a, b = F.normalize(e.tokens(v)[0][0], dim=1).chunk(2)
    assert analysis.alignment(e, x, run) == pytest.approx((a - b).square().sum(1).mean().item(), rel=1e-4)

def test_a_conflict_has_the_silhouette_that_is_named():
    for i in range(6):
        im, shape, filling = analysis.conflict(i, 96)
        s = scene(0, 'test', i, 'object')
        ground, outside = np.asarray(background(s, 96)), np.asarray(object_mask(NAMES[shape], 96, .5, .5, .92, angle_of(s))) == 0
        assert shape != filling and (im[outside] == ground[outside]).all() and (im != ground).any()

def test_pairs_are_alike_for_the_encoder_that_is_named(tmp_path, monkeypatch):
    g = np.random.default_rng(0)
    x = {n: g.normal(size=(40, 2, 8)).astype(np.float32) for n in 'ab'}
    monkeypatch.setattr(analysis, 'features', lambda e, *a, **k: x[e.name])
    d = analysis.disagreement([SimpleNamespace(name=n) for n in 'ab'], None, {}, smoke(pairs=20), tmp_path)
    for side, other in ('first', 'second'), ('second', 'first'):
        t = pd.read_csv(tmp_path/f'pairs-{side}-ranks.csv').iloc[0]
        cos = {n: float(F.cosine_similarity(*torch.from_numpy(v[[int(t.i), int(t.j)], 0]), dim=0)) for n, v in x.items()}
        assert [t['first'], t['second']] == pytest.approx([cos['a'], cos['b']], abs=1e-5)
        assert cos[d[side]['alike_for']] > cos[d[other]['alike_for']]

def test_the_table_of_analyses_has_each_number_under_its_own_name(tmp_path):
    rows = [dict(encoder=e, readout=k, interval=[v - .1, v + .1], **{name: v, what: w})
            for name, what, w in (('ratio', 'factor', 'object'), ('similarity', 'differs', 'symbol'))
            for e in 'ab' for k, v in (('class token', .3 + (e == 'b')), ('mean patch', .4))]
    shared = {s: dict(alike_for=e, shared=[dict(factor='style', share=.7, low=.6, high=.8, of_all=.2)])
              for s, e in (('first', 'a'), ('second', 'b'))}
    write_json(tmp_path/'result.json', dict(encoders=[dict(name=e, fingerprint=f'f{e}') for e in 'ab'], environment=dict(commit='c'),
                                            sensitivity=rows[:4], symbols=rows[4:], conflicts=[], structure=dict(rows=[]),
                                            disagreement=shared))
    t = analysis.collect([tmp_path]).set_index(['what', 'encoder', 'readout'])
    for what in 'sensitivity', 'similarity':
        for e, k, v in ('a', 'class token', .3), ('b', 'class token', 1.3), ('b', 'mean patch', .4):
            assert tuple(t.loc[what, e, k][['value', 'low', 'high']]) == pytest.approx((v, v - .1, v + .1))
    assert t.value['shared', 'b', 'class token'] == .7 and t.value['shared by any two', 'b', 'class token'] == .2
