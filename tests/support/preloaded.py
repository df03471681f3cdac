"""What ranks on a CPU begin with: the server that they are forked from imports this, once.

Each rank would take six seconds to import the same, some of it in its first step, and more to compile ChildTuning-F's masks.
"""

from __future__ import annotations

import functools

import cpuinfo
import deepspeed.module_inject
import deepspeed.utils.nvtx
import torch
import torch._inductor.compile_fx
import tqdm
import transformers.models.bert.modeling_bert
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.t5.modeling_t5  # noqa: F401

import tests.support.lives  # noqa: F401
from ds_childtune.child.mask_kernels import mask_kernel

# DeepSpeed asks twice for every op that it loads, and each answer takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
deepspeed.utils.nvtx.enable_nvtx = False  # ranges for a profiler, around every function: a tenth of a step
tqdm.tqdm.monitor_interval = 0  # a thread would not outlive the fork
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    mask_kernel("cpu", dtype)
