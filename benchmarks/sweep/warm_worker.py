"""Imported by the fork server of `sweep` before it forks workers: each then starts with what a first capture imports.

That is hundreds of modules and several seconds, which would otherwise be paid for every class. Nothing here may call
backward: autograd cannot be used on both sides of a fork.
"""

import torch
import transformers

import cggr_compile as cggr
from sweep.classes import Candidate, batches, build

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
_model = build(Candidate("causal", "llama", "LlamaForCausalLM"))
cggr.explain(_model, batches(_model)[0])
torch._dynamo.reset()
