"Fresh processes that have the package imported already, to be killed or to form a group."
import multiprocessing, os, socket

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['clipdino.pretrain'])

def start(f, *args):
    "`f(*args)` in a process of its own"
    p = context.Process(target=f, args=args)
    p.start()
    return p

def _rank(f, rank, n, port, out, args):
    import torch
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
