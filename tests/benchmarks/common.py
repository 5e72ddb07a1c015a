"""What the speed benchmarks share: JPEG shards, one ViT that every library can build, runs in fresh processes with their peak memory, trials, rounds and the table.

Imported by the peers' interpreters too, so what only ours has (clipdino, pandas, psutil) is imported where it is used.
"""
import io, itertools, json, os, re, resource, statistics, subprocess, sys, tarfile, tempfile, time
from pathlib import Path

import timm, torch
from PIL import Image
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

IMAGE, LOCAL, BATCH = 48, 24, 64  # px of a (global) view and of a local one; images a step
default_cfgs = generate_default_cfgs({'speed_vit.untrained': dict(input_size=(3, IMAGE, IMAGE), num_classes=0, mean=(.5,)*3, std=(.5,)*3,
                                                                  first_conv='patch_embed.proj', classifier='head')})

@register_model
def speed_vit(pretrained=False, **kw):
    "Four blocks of width 128, two heads, plain patches of 8 px"
    return timm.models.build_model_with_cfg(VisionTransformer, 'speed_vit', pretrained,
                                            **{**dict(img_size=IMAGE, patch_size=8, embed_dim=128, depth=4, num_heads=2), **kw})

def shards(n:int, size:int, per:int=512)->str:
    "Folder of shards of the world's first `n` training pictures as JPEG with captions; made once, in the cache"
    from clipdino.core import cache_dir
    from clipdino.world import caption, draw, from_draws, render
    import numpy as np
    folder = cache_dir()/f'speed-{n}-{size}px'
    if folder.exists(): return str(folder)
    print(f'rendering {n} pictures of {size} px, once', flush=True)
    part = folder.with_name(f'{folder.name}.{os.getpid()}.tmp')
    part.mkdir()
    for first in range(0, n, per):
        ids = np.arange(first, min(first + per, n))
        with tarfile.open(part/f'{first//per:05}.tar', 'w') as tar:
            for i, scene in zip(ids, (from_draws(u, 'mixed') for u in draw(0, 'train', ids))):
                Image.fromarray(render(scene, size)).save(jpg := io.BytesIO(), 'JPEG', quality=90)
                for ext, data in ('jpg', jpg.getvalue()), ('txt', caption(scene).encode()):
                    member = tarfile.TarInfo(f'{i:08}.{ext}')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    part.rename(folder)
    return str(folder)

class Pictures(torch.utils.data.Dataset):
    "The pictures in shards as a map-style dataset: (what `transform` makes of the decoded picture, 0)"
    def __init__(self, paths, transform):
        self.transform, self.where = transform, []
        for p in paths:
            with tarfile.open(p) as tar: self.where += [(p, m.offset_data, m.size) for m in tar if m.name.endswith('.jpg')]
    def __len__(self): return len(self.where)
    def __getitem__(self, i):
        path, at, size = self.where[i]
        with open(path, 'rb') as f:
            f.seek(at)
            return self.transform(Image.open(io.BytesIO(f.read(size))).convert('RGB')), 0

def ours(objective:str, data:str, **given)->list:
    "A run of ours in a folder of its own; seconds of its steps"
    from clipdino.pretrain import pretrain, settings
    with tempfile.TemporaryDirectory() as d:
        Path(d, 'settings.ini').touch()
        os.chdir(d)
        run = settings('mini', objective, name='speed', data=data, arch='speed_vit', image_size=IMAGE, batch=BATCH, precision='fp32',
                       probes=0, save_every=1 << 40, **given)
        pretrain(run)
        rows = [json.loads(l) for l in Path('runs/speed/metrics.jsonl').read_text().splitlines()]
        os.chdir('/')
    return [BATCH/b['images_per_s'] for a, b in zip([dict(step=0)] + rows, rows) for _ in range(b['step'] - a['step'])]

def rate(seconds:list, blocks:int=8)->float: # of every step
    "Images a second: median over equal blocks of steps, without the first fifth of the run (start-up, compilation, batches that workers made meanwhile)"
    s = seconds[len(seconds)//5:]
    k = max(len(s)//blocks, 1)
    return statistics.median(BATCH*k/sum(s[i:i + k]) for i in range(0, len(s) - k + 1, k))

def tree_mb(p)->float:
    "Memory of a process and all that it started, MB: proportional set size, which counts shared pages once"
    import psutil
    total = 0
    for q in [p, *p.children(recursive=True)]:
        try: total += q.memory_full_info().pss
        except psutil.Error: pass
    return total/1e6

def busy()->float:
    "Seconds that the machine's cores have worked"
    import psutil
    return sum(v for k, v in psutil.cpu_times()._asdict().items() if k not in ('idle', 'iowait', 'guest', 'guest_nice'))

def wait_for_quiet(limit:float=600, share:float=.2):
    "Return when others keep less than `share` of a core busy, or after `limit` seconds"
    end = time.time() + limit
    while time.time() < end:
        before = busy()
        time.sleep(3)
        if busy() - before < 3*share: return

def measure(cmd:list, tries:int=4, **env)->dict:
    "Figures of a run, which waits for a quiet machine and is repeated if others kept more than a quarter of a core busy meanwhile"
    for _ in range(tries):
        wait_for_quiet()
        if (got := measure_once(cmd, **env))['others'] < .25: break
    return got

def measure_once(cmd:list, **env)->dict:
    "Run a command in a fresh process; its images a second, peak memory, seconds from start to end, seconds of its cores, and how many cores others kept busy meanwhile"
    import psutil
    def used(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    cpu, busy_before = used(), busy()
    with tempfile.TemporaryDirectory() as d, open(f'{d}/log', 'w+') as log:
        p, t, peak = psutil.Popen(cmd, cwd=d, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ, **env)), time.time(), 0.
        try:
            while p.poll() is None:
                try: peak = max(peak, tree_mb(p))
                except psutil.NoSuchProcess: pass
                time.sleep(1)
        finally:
            if p.poll() is None: p.kill()
        log.seek(0)
        out = log.read()
    if p.returncode: raise RuntimeError(f'{" ".join(cmd)[:400]}\nfailed:\n{out[-3000:]}')
    found = re.search('^STEPS (.*)$', out, re.M)
    # open_clip's log, a line for every step
    steps = json.loads(found[1]) if found else [BATCH/float(v) for v in re.findall(r'Batch \(t\): [\d.]+, ([\d.e+]+)/s,', out)]
    t, cpu = time.time() - t, used() - cpu
    return dict(images_per_s=round(rate(steps), 1), peak_mb=round(peak), seconds=round(t), cpu_s=round(cpu),
                others=round(max(busy() - busy_before - cpu, 0)/t, 2))

def child(script, name, **given): return [sys.executable, script, 'child', name, json.dumps(given)]

def serve(contestants:dict):
    "In a contestant's own process: run it and print the seconds of its steps"
    if sys.argv[1:2] == ['child']: print('\nSTEPS', json.dumps(contestants[sys.argv[2]](**json.loads(sys.argv[3]))), flush=True), sys.exit()

def machine()->dict:
    from clipdino.core import commit
    cpu = re.search('model name\\s*: (.*)', Path('/proc/cpuinfo').read_text())[1]
    return dict(machine=cpu, cores=os.cpu_count(), torch=torch.__version__, commit=commit())

def grid(**choices)->list: return [dict(zip(choices, v)) for v in itertools.product(*choices.values())]

def compare(objective:str, commands:dict, grids:dict, args):
    "Try the settings of each contestant, run the best of each in turn for some rounds, and write a row for every run; ours is first"
    import pandas as pd
    rows, best = [], {k: g[0] for k, g in grids.items()}
    def go(name, setting, round_, samples):
        row = dict(what=name, objective=objective, round=round_, **measure(commands[name](samples=samples, **setting)), samples=samples,
                   settings=' '.join(f'{k}={v}' for k, v in setting.items()), **machine())
        rows.append(row)
        pd.DataFrame(rows).to_csv(args.out, index=False)
        print(f'{round_ or "trial":>5}  {name:24} {row["images_per_s"]:8.1f} images/s {row["peak_mb"]:6} MB {row["seconds"]:5} s  {row["cpu_s"]:5} core-s  others {row["others"]:4.2f}  {row["settings"]}', flush=True)
        return row['images_per_s']
    if args.trial:
        for k, g in grids.items(): best[k] = max(g, key=lambda s: go(k, s, 0, args.trial))
    names = list(commands)
    for r in range(args.rounds):
        for k in names[r % len(names):] + names[:r % len(names)]: go(k, best[k], r + 1, args.samples)
    speed = pd.DataFrame([r for r in rows if r['round']]).pivot(index='round', columns='what', values='images_per_s')
    for k in names[1:]:
        ratio = speed[names[0]]/speed[k]
        print(f'{names[0]} / {k}: {", ".join(f"{v:.2f}" for v in ratio)}; median {ratio.median():.2f}, from {ratio.min():.2f} to {ratio.max():.2f}')

def memory(command, objective:str, paths:list, args, times=(1, 8, 64)):
    "Peak memory of ours for the same number of steps on more and more data: the shards are linked under further names"
    import pandas as pd
    rows = []
    for n in times:
        with tempfile.TemporaryDirectory(dir=Path(paths[0]).parent) as d:
            for k in range(n):
                for p in paths: os.link(p, f'{d}/{k:03}-{Path(p).name}')
            # speed is of no interest here
            got = measure_once(command(samples=args.samples, workers=2, data=d), CLIPDINO_CACHE=f'{d}/cache')
        rows.append(dict(what='ours', objective=objective, data=f'{n} x {len(paths)} shards', **got, samples=args.samples,
                         settings='workers=2', **machine()))
        print({k: rows[-1][k] for k in ('data', 'peak_mb', 'images_per_s')}, flush=True)
    pd.DataFrame(rows).to_csv(args.out, index=False)

def arguments(parser, samples:int, trial:int):
    "Arguments that both benchmarks take, and the shards"
    a = parser.add_argument
    a('out', help='table to write, .csv'), a('--data',
                                             help="shards of jpg and txt: a folder, glob or brace expansion; else the embedded world's pictures are rendered")
    a('--pictures', type=int, default=8192, help='how many of the world'), a('--size', type=int, default=224, help='px of the world\'s pictures')
    a('--samples', type=int, default=samples, help='images in a run'), a('--rounds', type=int, default=3), a('--trial', type=int, default=trial, help='images in a trial; 0: no trials')
    a('--canvas', type=int, default=64, help='px to which ours decodes'), a('--memory', action='store_true',
                                                                            help='only: peak memory of ours over the size of the data')
    args = parser.parse_args()
    from clipdino.data import expand
    args.data = os.path.abspath(args.data) if args.data and Path(args.data).exists() else args.data or shards(args.pictures, args.size)
    return args, [os.path.abspath(p) for p in expand(args.data)]
