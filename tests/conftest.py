"Tests run on the CPU, also where there are GPUs: several processes form groups, of which NCCL would want a GPU each"
import os

os.environ['CUDA_VISIBLE_DEVICES'] = ''
