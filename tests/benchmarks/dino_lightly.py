"""Our DINO beside lightly's (`pip install lightly`): the same ViT, first weights, views and optimiser; their head, loss, centre and teacher update.

    python tests/benchmarks/dino_lightly.py LABELLED_SHARDS OUT.csv [--images 65536]

One row per evaluation: mean loss since the last one, and accuracy of 20 nearest neighbours on the test split.
"""
import argparse, copy

import pandas as pd
import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import update_momentum
from torch import nn

from clipdino.data import Order
from clipdino.objectives import MEAN, STD, cosine
from clipdino.pretrain import features, make_objective, param_groups, schedule, settings, view_groups
from clipdino.readouts import accuracy, knn
from clipdino.sets import open_set
from clipdino.views import AddViews

class Theirs(nn.Module):
    "lightly's DINO, put together as its documentation says, on copies of our encoder and head weights"
    def __init__(self, ours, run):
        super().__init__()
        self.run, self.views = run, ours.views
        self.encoder, self.teacher = copy.deepcopy(ours.encoder), copy.deepcopy(ours.teacher)
        self.head, self.teacher_head = (DINOProjectionHead(ours.encoder.num_features, run.head_hidden, run.bottleneck, run.prototypes,
                                                           batch_norm=run.head_norm) for _ in range(2))
        mine = [m for m in ours.head.mlp if isinstance(m, nn.Linear)]
        with torch.no_grad():
            for a, b in zip((m for m in self.head.layers if isinstance(m, nn.Linear)), mine, strict=True):
                a.weight.copy_(b.weight)
                if a.bias is not None: a.bias.copy_(b.bias)
            self.head.last_layer.weight_v.copy_(ours.head.last)
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher.requires_grad_(False), self.teacher_head.requires_grad_(False)
        self.loss = DINOLoss(run.prototypes, run.teacher_temp, run.teacher_temp, 0, run.student_temp, run.centre_momentum)
    def set_progress(self, done): pass
    def before_step(self): pass
    def after_step(self, done, ok):
        m = cosine(self.run.momentum, 1., done)
        update_momentum(self.encoder, self.teacher, m), update_momentum(self.head, self.teacher_head, m)
    def forward(self, views):
        with torch.no_grad(): t = self.teacher_head(self.teacher(views[0])).chunk(2)
        s = self.head(torch.cat([self.encoder(v) for v in views])).chunk(self.views)
        return dict(loss=self.loss(list(t), list(s), epoch=0))

def main(spec, out, images):
    run = settings('mini', 'dino', samples=images, local_crops=4, local_min=.05, hue=.1, warmup_teacher=0., warmup_teacher_temp=.04,
                   teacher_temp=.04, freeze_last=0.)
    train, test = (open_set(spec, split) for split in ('train', 'test'))
    (x, y), (x_test, y_test) = ((s.batch(range(len(s)), 32), torch.from_numpy(s.labels)) for s in (train, test))
    hw, hw_test = (torch.full((len(i), 2), 32, dtype=torch.int32) for i in (x, x_test))
    order = Order(len(x), run.seed)
    ours = make_objective(run)
    models = dict(ours=ours, lightly=Theirs(ours, run))
    opts = {k: torch.optim.AdamW(param_groups(m), betas=(.9, run.beta2), fused=True) for k, m in models.items()}
    add_views, rows, losses = AddViews(view_groups(run), run.seed, MEAN, STD), [], {k: [] for k in models}
    def evaluate(seen):
        acc = {f'knn_{k}': accuracy(knn(features(m.teacher, x, hw, 32), y, features(m.teacher, x_test, hw_test, 32), len(train.classes)), y_test) for k, m in models.items()}
        rows.append(dict(images=seen, **{f'loss_{k}': sum(l)/max(len(l), 1) for k, l in losses.items()}, **acc))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).round(4).to_csv(out, index=False)
        for l in losses.values(): l.clear()
    evaluate(0)
    for step in range(run.steps):
        epochs, ids = order(torch.arange(run.batch) + step*run.batch)
        views = add_views(dict(images=torch.from_numpy(x[ids]), hw=hw[ids], ids=ids, epochs=epochs))['views']
        for k, m in models.items():
            for g in opts[k].param_groups:
                g.update({n: v if n == 'lr' or g['decays'] else 0. for n, v in schedule(run, step/run.steps).items()})
            m.train()
            m.set_progress(step/run.steps)
            loss = m(views)['loss']
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], run.clip_grad)
            m.before_step()
            opts[k].step()
            opts[k].zero_grad()
            m.after_step((step + 1)/run.steps, torch.tensor(1.))
            losses[k].append(loss.item())
        if (step + 1) % max(run.steps//8, 1) == 0: evaluate((step + 1)*run.batch)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('spec'), p.add_argument('out'), p.add_argument('--images', type=int, default=65536)
    main(**vars(p.parse_args()))
