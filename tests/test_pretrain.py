"The training loop keeps its promises: exact continuation, identical reload, nothing non-finite in the weights."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Noise
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, functional as TF

from clipdino.core import SettingsError, read_json, write_json
from clipdino.data import loader
from clipdino.pretrain import OBJECTIVES, NonFinite, Trainer, accelerator, ahead, check_settings, clip_gradients, complete, cost, final_scores, finish, fit, make_probe, make_source, only_one, open_encoder, retrieval, retrieval_ranks, schedule, settings, state_tensors, tensors_digest, train
from clipdino.views import centre
from clipdino.world import POLICIES, World

def smoke(objective, name, **given): return settings('smoke', objective, **{'name': name, 'probes': 0, 'save_every': 32, **given})

def trained(run, folder):
    folder.mkdir(exist_ok=True)
    t = Trainer(run, folder)
    fit(t)
    return t

class Cut(Exception): "Stands for a power cut"

def cut(run, folder, at):
    "Stop before step `at`"
    folder.mkdir(exist_ok=True)
    t = Trainer(run, folder)
    update = t.update
    def failing(batch):
        if t.step == at: raise Cut
        return update(batch)
    t.update = failing
    with pytest.raises(Cut): fit(t)

@pytest.mark.parametrize('objective, workers', [*((o, 0) for o in OBJECTIVES), ('dino', 2)])
def test_a_run_that_was_cut_ends_with_the_same_bytes(tmp_path, objective, workers):
    run = smoke(objective, 'x', samples=256)  # two epochs
    straight = trained(run, tmp_path/'straight')
    for at in 3, 9, 13: cut(replace(run, workers=workers), tmp_path/'cut', at)
    resumed = trained(replace(run, workers=workers), tmp_path/'cut')
    assert tensors_digest(state_tensors(resumed.objective, resumed.opt)) == tensors_digest(state_tensors(straight.objective, straight.opt))
    assert [(r['step'], r['loss']) for r in resumed.metrics.rows()] == [(r['step'], r['loss']) for r in straight.metrics.rows()]
    assert [r['step'] for r in resumed.metrics.rows()] == list(range(1, run.steps + 1))

def test_a_run_that_was_cut_before_its_first_state_begins_again(tmp_path):
    run = smoke('clip', 'x', probes=1)
    cut(run, tmp_path, 1)
    assert [r['step'] for r in trained(run, tmp_path).metrics.rows() if 'seconds' in r] == [0, run.steps]

@pytest.mark.parametrize('objective', ['clip', 'dino'])
def test_views_made_by_workers_are_the_same(tmp_path, objective):
    a, b = (trained(smoke(objective, 'x', **given), tmp_path/f'{i}')
            for i, given in enumerate((dict(), dict(augment='workers', workers=2))))
    assert [r['loss'] for r in a.metrics.rows()] == [r['loss'] for r in b.metrics.rows()]

def test_seeds_differ_and_repeat(tmp_path):
    "In the weights, the order of pictures, their views and the keys of drop path, each alone"
    raw, seen = next(iter(loader(make_source(smoke('dino', 'x')), 16, 0))), []
    for i, s in enumerate((0, 0, 1)):
        (tmp_path/f'{i}').mkdir()
        t, keys = Trainer(smoke('dino', 'x', seed=s), tmp_path/f'{i}'), []
        seen.append([tensors_digest(state_tensors(t.objective, t.opt)), next(iter(t.batches()))['ids'].tolist(),
                     (b := t.add_views(raw))['views'][0].tolist(), keys])
        t.model = lambda views, tokens, k: keys.append(k.tolist()) or {}
        with pytest.raises(Exception, match='must return `loss`'): t.gradients(b)
    for a, b, c in zip(*seen): assert a == b != c

@pytest.mark.parametrize('objective', OBJECTIVES)
def test_the_exported_encoder_is_the_trained_one(tmp_path, objective):
    "Bit by bit DINO's teacher, as in its paper, else what CLIP trains; features up to rounding, as it makes the last block for all tokens"
    t = trained(smoke(objective, 'x'), tmp_path)
    finish(t, {}, 0.)
    x, o, out = torch.rand(3, 3, 32, 32), t.objective, open_encoder(tmp_path)
    kept, other = (o.teacher, o.encoder) if objective == 'dino' else (o.encoder, getattr(o, 'teacher', None))
    def same(net):
        a, b = out.state_dict(), net.state_dict()
        return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert same(kept) and (other is None or not same(other))
    with torch.no_grad(): torch.testing.assert_close(out(x), kept.eval()(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['bad.jsonl', 'config.json', 'metrics.jsonl', 'model.safetensors',
                                                          'objective.safetensors', 'result.json', 'settings.json']

@pytest.mark.parametrize('harm', ['flip', 'truncate'])
def test_a_damaged_state_is_passed_over(tmp_path, harm, capsys):
    run = smoke('clip', 'x')
    trained(run, tmp_path)
    last = sorted(tmp_path.glob('state-*'))[-1]
    raw = bytearray(last.read_bytes())
    raw[-100] ^= 1
    last.write_bytes(raw if harm == 'flip' else raw[:-200])
    assert Trainer(run, tmp_path).step == run.steps - 2 and 'is damaged' in capsys.readouterr().out

@pytest.mark.parametrize('objective', ['clip', 'hybrid'])
def test_nothing_non_finite_reaches_the_weights(tmp_path, objective):
    t = trained(smoke(objective, 'x'), tmp_path)
    with torch.no_grad(): t.objective.log_scale.fill_(float('nan'))
    before = tensors_digest(state_tensors(t.objective, t.opt))
    t.step = 0
    t.update(next(t.batches()))
    with pytest.raises(NonFinite, match='step 0: loss nan.*Its batch'): t.save()
    assert tensors_digest(state_tensors(t.objective, t.opt)) == before

def test_other_settings_are_refused(tmp_path):
    run = smoke('clip', 'x')
    t = trained(run, tmp_path)
    check_settings(tmp_path, replace(run, workers=3), t.source.fingerprint)  # changes nothing in what a run ends with
    with pytest.raises(SettingsError, match='was begun with other settings: lr was 0.001 and is now 0.1'):
        check_settings(tmp_path, replace(run, lr=.1), t.source.fingerprint)

def test_another_precision_is_refused(tmp_path, monkeypatch):
    "As of a run that began on a GPU with bf16; a run that is older than the note goes on"
    run, note = smoke('clip', 'x'), tmp_path/'settings.json'
    cut(run, tmp_path, 3)
    new, acc = read_json(note), accelerator(run, tmp_path)
    assert new['environment'].pop('precision') == 'fp32'
    with monkeypatch.context() as m:
        m.setattr('clipdino.pretrain.precision_of', lambda run: 'bf16')
        with pytest.raises(SettingsError, match='was begun in fp32 and would go on in bf16 here; continue it on one like the first'):
            Trainer(run, tmp_path, acc)
        write_json(note, new)
        assert Trainer(run, tmp_path, acc).step == 2
    result = finish(trained(run, tmp_path), {}, 0.)
    assert result['environment']['precision'] == 'fp32' and complete(tmp_path, run) == result

@pytest.mark.parametrize('precision', ['fp32', 'fp64'])
def test_the_untrained_encoder_is_the_one_that_a_run_began_as(tmp_path, monkeypatch, precision):
    class Sees(list):
        sets = {}
        def __call__(self, encoder, size): return self.append(encoder) or {}
    t, probed = Trainer(smoke('dino', 'x', precision=precision), tmp_path), Sees()
    monkeypatch.setattr('clipdino.pretrain.make_probe', lambda *a: probed)
    final_scores(t)
    trained, untrained = probed
    assert trained is t.encoder and all(torch.equal(v, t.encoder.state_dict()[k]) for k, v in untrained.state_dict().items())

@pytest.mark.parametrize('policy', POLICIES)
def test_a_run_sees_pictures_of_the_split_train_described_as_it_says(policy):
    assert make_source(settings('smoke', captions=policy)).fingerprint == World('train', 128, 32, captions=policy).fingerprint

def test_pictures_that_probes_are_fitted_and_tested_on(tmp_path, monkeypatch):
    "Fitted on the split `probe`; tested on `val` during a run, and on `test` at its end"
    run, asked = smoke('clip', 'x', probes=1), []
    for split in 'val', 'test':
        for kind, parts in make_probe(run, split).sets.items():
            for (images, _, y), own in zip(parts, ('probe', split)):
                w = World(own, len(y), run.canvas, kinds=kind)
                assert (images[:] == w.images[:]).all() and (y.numpy() == w.labels[kind]).all()
    monkeypatch.setattr('clipdino.pretrain.make_probe', lambda run, split='val': asked.append(split))
    final_scores(Trainer(run, tmp_path))
    assert asked == ['val', 'test']

def test_the_centre_of_a_picture_that_is_no_square():
    "As torchvision crops and resizes it, wherever the canvas around it ends"
    g = np.random.default_rng(0)
    for h, w in (40, 64), (64, 40):
        canvas = np.zeros((1, 64, 64, 3), np.uint8)
        canvas[0, :h, :w] = g.integers(0, 256, (h, w, 3))
        theirs = TF.to_tensor(TF.resized_crop(Image.fromarray(canvas[0]), (h - 40)//2, (w - 40)//2, 40, 40, (32, 32),
                                                InterpolationMode.BICUBIC))
        assert (centre(torch.from_numpy(canvas), torch.tensor([[h, w]]), 32, (0,)*3, (1,)*3)[0] - theirs).abs().max() < 1.01/255

def test_samples_and_the_last_loss_are_noted(tmp_path):
    t = trained(smoke('clip', 'x'), tmp_path)
    rows, result = t.metrics.rows(), finish(t, {}, 0.)
    assert [r['samples'] for r in rows] == [16*r['step'] for r in rows] and result['loss'] == rows[-1]['loss'] != rows[0]['loss']

@pytest.mark.parametrize('objective', ['clip', 'hybrid'])
def test_costs_do_not_depend_on_the_parts_of_a_batch(objective):
    assert cost(smoke(objective, 'x', micro=3)) == cost(smoke(objective, 'x')) and cost(smoke(objective, 'x'))['activations_mb'] > 0

def test_learning_beats_the_start(tmp_path):
    "A few epochs of a few pictures: the contrastive losses fall (DINO's target moves, so its loss says nothing)"
    for o, loss in ('clip', 'loss'), ('siglip', 'loss'), ('clip-lm', 'loss'), ('hybrid', 'loss_clip'):
        rows = trained(smoke(o, 'x', samples=1024, lr=3e-3, save_every=2048), tmp_path/o).metrics.rows()
        assert sum(r[loss] for r in rows[-8:]) < .97*sum(r[loss] for r in rows[:8]), o

@pytest.mark.parametrize('objective', ['clip', 'siglip', 'hybrid'])
def test_the_scale_stays_between_1_and_100(tmp_path, objective):
    t = Trainer(smoke(objective, 'x'), tmp_path)
    for start, end in (9., 100.), (-3., 1.):
        with torch.no_grad(): t.objective.log_scale.fill_(start)
        t.update(next(iter(t.batches())))
        assert t.objective.log_scale.exp().item() == pytest.approx(end)

def test_dino_teacher_centre_and_schedules(tmp_path):
    "Two steps against the formulas, by hand"
    run = smoke('dino', 'x', momentum=.9, centre_momentum=.8, freeze_last=.2, warmup_teacher=.5, warmup_teacher_temp=.02)
    t = Trainer(run, tmp_path)
    o = t.objective
    o.before_step()  # in whatever loop, before which no progress was set
    from clipdino.objectives import cosine
    for k, batch in zip(range(2), t.batches()):
        teacher, centre, last = [p.clone() for p in o.teacher.parameters()], o.centre.clone(), o.head.last.clone()
        with torch.no_grad(): mean = o.teacher_head(o.teacher(batch['views'][0])).mean(0)
        t.update(batch)
        m = cosine(.9, 1., (k + 1)/run.steps)
        for p, old, s in zip(o.teacher.parameters(), teacher, o.encoder.parameters()):
            torch.testing.assert_close(p.data, m*old + (1 - m)*s.data)
        torch.testing.assert_close(o.centre, .8*centre + .2*mean)
        assert torch.equal(o.head.last, last)  # frozen
        assert o.temp.item() == pytest.approx(.02 + .02*min(2*k/run.steps, 1))

def one_step(folder, objective, batch=None, **given):
    "What a step in double precision logs, its gradients, and the objective after it"
    folder.mkdir()
    t = Trainer(settings('smoke', objective, name='x', probes=0, precision='fp64', freeze_last=0., **given), folder)
    batch, grads, step = batch or next(t.batches()), {}, t.opt.step
    def record(): grads.update({k: p.grad.clone() for k, p in t.objective.named_parameters() if p.grad is not None}), step()
    t.opt.step = record
    return batch, {k: v.item() for k, v in t.update(batch).items()}, grads, t.objective.state_dict()

def test_hybrid_without_clip_is_dino(tmp_path):
    "Loss and gradients; weights, teacher and centre after the step"
    batch, hybrid, grads, state = one_step(tmp_path/'hybrid', 'hybrid', clip_weight=0., dino_weight=1.)
    _, dino, dino_grads, dino_state = one_step(tmp_path/'dino', 'dino', batch)
    assert hybrid['loss'] == hybrid['loss_dino'] == dino['loss'] and all(hybrid[k] == pytest.approx(v, rel=1e-12) for k, v in dino.items())
    for k, g in dino_grads.items(): torch.testing.assert_close(grads.pop(k), g, rtol=0, atol=0)
    assert set(grads) >= {'log_scale', 'proj.weight', 'text.net.text_projection'} and all((g == 0).all() for g in grads.values())
    assert dino_state.keys() >= {'centre', 'teacher.cls_token', 'teacher_head.last'}
    for k, v in dino_state.items(): torch.testing.assert_close(state[k], v, rtol=1e-10, atol=1e-12)

def test_hybrid_without_dino_is_clip(tmp_path):
    "On the mean of both global views; the loss and each gradient"
    batch, hybrid, grads, _ = one_step(tmp_path/'hybrid', 'hybrid', clip_weight=1., dino_weight=0., clip_grad=1e9)
    globals_, _ = batch['views']
    views = [one_step(tmp_path/f'{i}', 'clip', dict(batch, views=[v]), clip_grad=1e9) for i, v in enumerate(globals_.chunk(2))]
    assert hybrid['loss'] == pytest.approx(sum(v[1]['loss'] for v in views)/2, rel=1e-12) and hybrid['loss'] == hybrid['loss_clip']
    assert views[0][1]['loss'] != views[1][1]['loss'] and hybrid['scale'] == views[0][1]['scale']
    for k in views[0][2]: torch.testing.assert_close(grads.pop(k), (views[0][2][k] + views[1][2][k])/2, rtol=1e-9, atol=1e-14)
    assert 'head.last' in grads and all(k.startswith('head.') and (g == 0).all() for k, g in grads.items())

def test_hybrid_logs_both_losses_and_their_weighted_sum(tmp_path):
    for row in trained(smoke('hybrid', 'x', clip_weight=.3, dino_weight=2.), tmp_path).metrics.rows():
        assert row['loss'] == pytest.approx(.3*row['loss_clip'] + 2*row['loss_dino'], rel=1e-5) and row['loss_dino'] == pytest.approx(row['entropy'] + row['kl'], rel=1e-5)

@pytest.mark.parametrize('given,message', [(dict(clip_weight=-.1), 'clip_weight=-0.1 must be at least 0'),
                                           (dict(dino_weight=-1.), 'dino_weight=-1.0 must be at least 0'),
                                           (dict(dino_weight=float('nan')), 'dino_weight=nan must be a finite'),
                                           (dict(clip_weight=0., dino_weight=0.), 'clip_weight and dino_weight are both 0'),
                                           (dict(local_size=12), 'local_size=12 must be a multiple of the patch size')])
def test_settings_that_hybrid_refuses(given, message):
    with pytest.raises(SettingsError, match=message): settings('smoke', 'hybrid', **given)

def test_tracker(tmp_path):
    pytest.importorskip('tensorboard')
    train(smoke('clip', 'x', tracker='tensorboard'), tmp_path)
    assert list(tmp_path.rglob('events.out.tfevents*'))

def test_trackers_end_with_their_run(tmp_path):
    "However it ends, so that the next one in a notebook has its own"
    acc, ended = accelerator(smoke('clip', 'x'), tmp_path), []
    acc.trackers = [SimpleNamespace(finish=lambda: ended.append(True))]
    with pytest.raises(KeyboardInterrupt), only_one(tmp_path, acc): raise KeyboardInterrupt
    assert ended

@pytest.mark.parametrize('objective', ['clip', 'dino'])
def test_looking_ahead_changes_nothing(tmp_path, objective, capsys):
    "The batches that are timed before a long run leave no trace"
    run, ends = smoke(objective, 'x', samples=3200, save_every=3200, drop_path=.2), []
    for look in False, True:
        (tmp_path/f'{look}').mkdir()
        t = Trainer(run, tmp_path/f'{look}')
        if look: ahead(t)
        for _, batch in zip(range(5), t.batches()): t.update(batch)
        ends.append(tensors_digest(state_tensors(t.objective, t.opt)))
    assert ends[0] == ends[1] and '3,200 images of' in capsys.readouterr().out

@pytest.mark.parametrize('gpu', ['with bf16', 'that emulates it'])
def test_half_precision_only_on_gpus_that_have_it(tmp_path, monkeypatch, gpu):
    "An older one would take many times longer than in single precision"
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation=True: gpu == 'with bf16' or including_emulation)
    monkeypatch.setattr('clipdino.pretrain.Accelerator', lambda **given: SimpleNamespace(num_processes=1, device='cuda', **given))
    assert accelerator(smoke('clip', 'x', processes=1), tmp_path).mixed_precision == ('bf16' if gpu == 'with bf16' else 'no')

def test_ranks_of_own_keys():
    "Block by block as all at once; one that is first is first, whatever rounding does"
    q, k = (torch.nn.functional.normalize(torch.randn(23, 8, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    s = q @ k.T
    assert retrieval_ranks(q, k, batch=5).tolist() == [sum(float(x) > float(row[i]) for x in row) for i, row in enumerate(s)]
    assert retrieval_ranks(q, q, batch=7).tolist() == [0]*23 and retrieval_ranks(torch.ones(5, 4), torch.ones(5, 4), batch=2).tolist() == [2]*5, 'what is all the same is in the middle'

def test_recall_by_hand():
    "Of images that look for captions, and of captions that look for images"
    x, t = (F.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(k)), dim=1) for k in (0, 1))
    o = SimpleNamespace(eval=lambda: o, parameters=lambda: iter([x]), embed_image=lambda v: x, embed_text=lambda v: t,
                        text=SimpleNamespace(tokenize=lambda c: torch.zeros(1)))
    class Forty(Noise):
        def __len__(self): return 40
    got = retrieval(SimpleNamespace(objective=o, acc=SimpleNamespace(device='cpu'), run=SimpleNamespace(image_size=32)), Forty())
    for way, s in ('image_to_text', x @ t.T), ('text_to_image', t @ x.T):
        best = s.argsort(dim=1, descending=True)
        for k in 1, 5, 10: assert got[f'{way}_recall@{k}'] == pytest.approx(np.mean([i in best[i, :k] for i in range(40)])), (way, k)
    assert got['image_to_text_recall@10'] != got['text_to_image_recall@10']

def test_settings_reach_the_optimiser(tmp_path):
    t = Trainer(smoke('clip', 'x', beta2=.5, eps=1e-3, weight_decay=.3, weight_decay_end=.3), tmp_path)
    t.update(next(iter(t.batches())))
    assert [(g['betas'], g['eps'], g['weight_decay']) for g in t.opt.param_groups] == [((.9, .5), 1e-3, .3), ((.9, .5), 1e-3, 0.)]

def test_gradients_are_clipped_together_or_each_alone():
    for per, want in ('model', [.6, .8]), ('parameter', [1., 1.]):
        ps = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        for p, g in zip(ps, (3., 4.)): p.grad = torch.tensor([g])
        assert clip_gradients(ps, 1., per).item() == pytest.approx(5) and [p.grad.item() for p in ps] == pytest.approx(want, rel=1e-5)

def test_weight_decay_follows_a_cosine():
    run = settings('paper', 'dino', data='world')
    assert [schedule(run, d)['weight_decay'] for d in (0, .5, 1)] == pytest.approx([.04, .22, .4])
