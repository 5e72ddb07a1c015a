"""Speed of DINO training with 2 global and 8 local crops, decoding and augmentation included: ours beside lightly and, if given, DINO's own repository, on the same pictures, in turn on the same machine.

    pip install lightly==1.6.0; git clone https://github.com/facebookresearch/dino
    python tests/benchmarks/speed_dino.py OUT.csv [--dino-repo dino] [--data SHARDS] [--rounds 3]
    python tests/benchmarks/speed_dino.py OUT.csv --memory

All train the same timm ViT (width 128, 4 blocks, patches of 8 px; 48 px global and 24 px local crops) and head (hidden 512, bottleneck 128, 1,024 prototypes) with AdamW and batches of 64 in fp32 on the CPU, on JPEGs of
the embedded world of 224 px, or on `--data`. lightly: its DINOTransform, DINOProjectionHead, DINOLoss and update_momentum, joined as in its ImageNet benchmark (crops of a size go through the encoder together), a
DataLoader over the pictures, fused AdamW. DINO's repository: its DataAugmentationDINO with crops of our sizes, MultiCropWrapper, DINOHead, DINOLoss and train_one_epoch, whose calls to CUDA are made to do nothing.
First each one's settings are tried shortly (workers, where views are made, `torch.compile`); then the best of each run in turn, every run in a fresh process. images_per_s is the median over 8 equal parts of a run
without its first fifth; seconds is the whole process; peak_mb the greatest proportional set size of the process and its workers, looked at every second. Each one's own design is part of what is measured: ours decodes
a JPEG to at most `--canvas` px (the `paper` preset's ratio to the view) and cuts all crops from that, the others cut them from the full picture.
"""
import argparse, os, sys, time

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

import common

HEAD = dict(prototypes=1024, hidden=512, bottleneck=128)

def vit():
    import timm
    return timm.create_model('speed_vit', dynamic_img_size=True)

def batches(paths, transform, samples, workers):
    data = common.Pictures(paths, transform)
    return DataLoader(data, common.BATCH, sampler=RandomSampler(data, num_samples=samples), num_workers=workers, drop_last=True)

class Timed:
    "Iterates a loader and notes the time of every step"
    def __init__(self, loader): self.loader, self.seconds = loader, []
    def __len__(self): return len(self.loader)
    def __iter__(self):
        t = time.time()
        for b in self.loader:
            yield b
            self.seconds.append(-t + (t := time.time()))

def lightly(paths, samples, workers, compile):
    "lightly's DINO; seconds of its steps"
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
    from lightly.transforms import DINOTransform
    from lightly.utils.scheduler import cosine_schedule
    student, teacher = (nn.Sequential(vit(), DINOProjectionHead(128, HEAD['hidden'], HEAD['bottleneck'], HEAD['prototypes']))
                        for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    if compile: student.compile(dynamic=False), teacher.compile(dynamic=False)
    loss_of = DINOLoss(HEAD['prototypes'])
    decay, rest = get_weight_decay_parameters([student])
    opt = torch.optim.AdamW([dict(params=decay, weight_decay=.04), dict(params=rest, weight_decay=0.)], lr=5e-4, fused=True)
    loader = Timed(batches(paths, DINOTransform(common.IMAGE, local_crop_size=common.LOCAL, n_local_views=8), samples, workers))
    for step, (views, _) in enumerate(loader):
        update_momentum(student, teacher, cosine_schedule(step, len(loader), .99, 1.))
        globals_, locals_ = torch.cat(views[:2]), torch.cat(views[2:])
        with torch.no_grad(): targets = teacher(globals_)
        out = torch.cat([student(globals_), student(locals_)])
        loss = loss_of(targets.chunk(2), out.chunk(len(views)))
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return loader.seconds

def repository(repo, paths, samples, workers):
    "DINO's repository; seconds of its steps"
    sys.path.insert(0, repo)
    import main_dino, utils
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.Tensor.cuda = lambda x, *a, **k: x
    torch.cuda.synchronize = lambda *a: None
    utils.MetricLogger.synchronize_between_processes = lambda m: None  # after the last step
    views = main_dino.DataAugmentationDINO((.4, 1.), (.05, .4), 8)
    for t, size in (views.global_transfo1, common.IMAGE), (views.global_transfo2, common.IMAGE), (views.local_transfo, common.LOCAL):
        t.transforms[0].size = size, size
    student, teacher = (utils.MultiCropWrapper(vit(), main_dino.DINOHead(128, HEAD['prototypes'], hidden_dim=HEAD['hidden'],
                                                                         bottleneck_dim=HEAD['bottleneck'])) for _ in range(2))
    student = nn.parallel.DistributedDataParallel(student)
    teacher.load_state_dict(student.module.state_dict())
    teacher.requires_grad_(False)
    loader = Timed(batches(paths, views, samples, workers))
    n = len(loader)
    lr, decay, momentum = utils.cosine_scheduler(5e-4, 1e-6, 1, n), utils.cosine_scheduler(.04, .4, 1, n), utils.cosine_scheduler(.996, 1, 1, n)
    opt = torch.optim.AdamW(utils.get_params_groups(student))
    loss = main_dino.DINOLoss(HEAD['prototypes'], 10, .04, .04, 0, 1)
    main_dino.train_one_epoch(student, teacher, teacher, loss, loader, opt, lr, decay, momentum, 0, None,
                              argparse.Namespace(epochs=1, clip_grad=3., freeze_last_layer=0))
    return loader.seconds

common.serve(dict(ours=common.ours, lightly=lightly, repository=repository))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--dino-repo', help='a clone of facebookresearch/dino')
    args, paths = common.arguments(p, samples=3200, trial=1280)
    def ours(data=args.data, **given):
        return common.child(__file__, 'ours', objective='dino', data=data, local_size=common.LOCAL, local_crops=8, hue=.1, head_norm=False,
                            prototypes=HEAD['prototypes'], head_hidden=HEAD['hidden'],
                            bottleneck=HEAD['bottleneck'], canvas=args.canvas, **given)
    if args.memory: common.memory(ours, 'dino', paths, args)
    else:
        commands = dict(ours=ours, lightly=lambda **given: common.child(__file__, 'lightly', paths=paths, **given))
        grids = dict(ours=common.grid(workers=[0, 1], augment=['device'], compile=['off', 'on']) + common.grid(workers=[1], augment=['workers'], compile=['off']),
                     lightly=common.grid(workers=[0, 1, 2], compile=[False, True]))
        if args.dino_repo:
            commands['dino repository'] = lambda **given: common.child(__file__, 'repository', repo=os.path.abspath(args.dino_repo),
                                                                       paths=paths, **given)
            grids['dino repository'] = common.grid(workers=[0, 1, 2])
        common.compare('dino', commands, grids, args)
