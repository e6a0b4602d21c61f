"""Has attention of packed sequences run within their documents, instead of over the whole sequence under a mask.

transformers makes a mask [S, S] of `position_ids` that restart. Where an attention's mask is proved to ask for key and
query of one document, and for nothing but at most so far ahead and behind, flash attention of variable lengths gives
the same, and does nothing for what the mask hides. The host knows how many documents there are (`run/packing.py`).

Before::

    %mask = … nodes of %position_ids …
    %attention = aten.scaled_dot_product_attention(%q, %repeated_k, %repeated_v, %mask)

After::

    %attention = aten._flash_attention_forward(%q, %k, %v, %ends, %ends, S, S, …)
"""

from __future__ import annotations

import torch
from cggr_compile.passes.rewrite.shared import fresh_size
from cggr_compile.passes.rewrite.varlen import attend, reach_of, runs_varlen
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize
from cggr_compile.ir import documents
from cggr_compile.ir.builder import Builder
from cggr_compile.ir.program import Analysed, value
from cggr_compile.ir.roles import token_argument
from cggr_compile.ir.token_mixing import ATTENTION, argument, attention_of, is_attention

aten = torch.ops.aten
ENDS = "ends"


def attend_documents(program: Analysed, config: RoutingConfig) -> Analysed:
    """Adds the input `ends` int32 [N + 1]: where the documents of the flattened batch begin and the last ends, and that
    end again for every document that only fills up.

    Raises:
        CannotOptimize: no attention is proved to stay within documents, or none can be of variable lengths.
    """
    positions = token_argument(program, documents.POSITIONS)
    if positions is None:
        raise CannotOptimize("there are no position_ids [batch, sequence]")
    functions = documents.functions_of(program, positions)
    within = {}
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        operands = [value(argument(node, name)) for name in ("query", "key", "value")]
        if not is_attention(program, node) or not all(program.same_size(x.shape[0], program.batch) for x in operands):
            continue
        asked = documents.within_one(attention_of(node, functions).seen)
        reach = None if asked is None else reach_of(asked)
        if reach is not None and runs_varlen(node):
            within[node] = reach
    if not within:
        raise CannotOptimize("no attention in bfloat16 or float16 on CUDA is proved to stay within documents")
    builder = Builder(program)
    builder.copy_inputs()
    with program.fake_mode:
        size = fresh_size(program, "documents", program.batch * program.sequence)
        empty = torch.empty((size,), dtype=torch.int32, device=value(positions).device)
    ends = builder.placeholder(ENDS, empty)
    longest = builder.call(aten.sym_size.int, builder.env[positions], 1)
    for node in program.graph.nodes:
        if node in within:
            builder.env[node] = attend(builder, node, builder.env, within[node], ends, longest)
        elif node.op not in ("placeholder", "output"):
            builder.copy(node)
    builder.output(fx.map_arg(program.output.args[0], lambda old: builder.env[old]))
    return builder.finish("attend_documents")
