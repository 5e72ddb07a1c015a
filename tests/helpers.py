"Fresh processes to be killed or to form a group, and data that depends on nothing but this file."
import multiprocessing, os, socket, tarfile
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from clipdino.core import mix

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['clipdino.pretrain'])  # so that a start takes a second

def start(f, *args):
    "`f(*args)` in a process of its own"
    p = context.Process(target=f, args=args)
    p.start()
    return p

def _rank(f, rank, n, port, out, args):
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    value = f(*args)
    if not rank: out.put(value)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

def group(n, f, *args):
    "What `f(*args)` returns on the first of `n` processes that form a group"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    out = context.Queue()
    ps = [start(_rank, f, r, n, port, out, args) for r in range(n)]
    value = out.get(timeout=120)
    for p in ps: p.join(60)
    assert [p.exitcode for p in ps] == [0]*n
    return value

def shard(path, start, n, broken=()):
    "A tar of `n` noisy JPEGs with captions; the pictures in `broken` are cut off"
    with tarfile.open(path, 'w') as t:
        def add(name, data):
            m = tarfile.TarInfo(name)
            m.size = len(data)
            t.addfile(m, BytesIO(data))
        for i in range(start, start + n):
            b = BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(b, 'jpeg')
            add(f'{i:06d}.jpg', b.getvalue()[:50] if i in broken else b.getvalue())
            add(f'{i:06d}.txt', f'noise number {i}'.encode())

class Noise:
    "A source of coloured squares whose pixels and captions are hashes: the same on every machine, whatever its fonts"
    fingerprint = 'noise'
    def __len__(self): return 96
    def batch(self, ids):
        ids, at = torch.as_tensor(ids), torch.arange(40)//8
        pixels = mix(ids[:, None, None, None], at[:, None, None], at[:, None], torch.arange(3)) & 255
        words = [[('red', 'sea', 'dog', 'two', 'old')[int(mix(i, k)) % 5] for k in range(4)] for i in ids.tolist()]
        return pixels.to(torch.uint8).numpy(), np.full((len(ids), 2), 40, np.int32), [' '.join(w) for w in words], []
