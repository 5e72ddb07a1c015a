"Readouts of frozen features: settings are chosen on pictures that were not fitted, and what is said is what was measured."
import numpy as np
import pandas as pd
import torch

from clipdino.readouts import adamw, choose, few_shot, grid, try_settings

def test_settings_are_tried_on_pictures_that_were_not_fitted():
    "Classes that are tossed can be fitted from 200 numbers of noise, and not foretold"
    noise, coin = np.random.default_rng(0).normal(size=(400, 1, 200)).astype(np.float32), np.random.default_rng(1).integers(0, 2, 400)
    assert try_settings(noise, coin, 2, grid((1e-6,), ('cls',))).accuracy.max() < .75

def test_of_equal_settings_the_strongest_is_chosen():
    assert choose(pd.DataFrame(dict(l2=[1e-3, 1e-1, 1e-2], readout='cls', norm='unit', accuracy=[.5, .5, .4]))).l2 == .1

def test_a_probe_by_the_authors_protocol_is_that_of_its_best_epoch():
    "What it says after one epoch is called right: no later one is better"
    g = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(64, 5, generator=g), torch.randint(3, (64,), generator=g)
    def probe(y, epochs): return adamw(xs, ys, xs, y, 3, [(.5, .1)], epochs, batch=32, warmup=1)[0]
    first = probe(ys, 1)[2]
    right, epoch, w = probe((xs @ first[:-1] + first[-1]).argmax(1), 6)
    assert (right, epoch) == (1., 0) and (w == first).all()

def test_draws_of_few_shots_differ():
    g = np.random.default_rng(0)
    x, y = g.normal(size=(80, 6)).astype(np.float32), np.arange(80) % 8
    assert len(set(few_shot(x, y, x, y, 8, 1, 10))) > 1
