"""Finds the language-model loss and the head in front of it.

Walking back from the cross-entropy that the loss output depends on, every node up to the head's linear is one of
three kinds, or the head is not expressible and the match fails with the node that is to blame: it moves rows and
leaves the vocabulary alone (views, slices), it is part of `linear * scale / divisor, soft-capped`, or it only changes
the dtype. Row moves commute with the head, which acts on each row alone; that is what lets later passes move them in
front of it.

Which label a row predicts is not matched but *executed*: labels that spell out their own position go through the
label nodes, rows that spell out theirs through the row moves, and the difference is the shift.

Before::

    %logits = aten.linear(%hidden, lm_head.weight)
    %rows = aten.view(%logits, [-1, V])
    %loss = aten.cross_entropy_loss(%rows, %target)

After::

    head: %logits of %hidden by lm_head.weight; labels shifted by 1; mean over labels other than -100
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from cggr_compile.config import RoutingConfig
from cggr_compile.errors import CannotOptimize, Refusal
from cggr_compile.ir.dataflow import ancestors, descendants
from cggr_compile.ir.program import Analysed, Head, Program, hint, is_tensor, value
from cggr_compile.ir.roles import changes_of

aten = torch.ops.aten

_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
}
_ARITHMETIC = {aten.mul.Tensor, aten.div.Tensor, aten.tanh.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_ROW_MOVES = {*_VIEWS, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.flatten.using_ints}
_REDUCTIONS = {1: "mean", 2: "sum"}


def find_loss(program: Program, config: RoutingConfig) -> Analysed:
    """Sets `head` and `loss_output`.

    Raises:
        CannotOptimize: no loss, several losses, or a head that the operators cannot express.
    """
    losses = program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default, sort=True)
    if not losses:
        raise CannotOptimize(
            "no cross-entropy loss in the captured graph",
            hint="pass labels, and use a model class that computes its own loss (…ForCausalLM, …ForMaskedLM)",
        )
    matches = [_match(program, loss) for loss in losses]
    heads = [match for match in matches if isinstance(match, Head)]
    if len(heads) > 1:
        raise CannotOptimize(
            f"{len(heads)} language-model losses in the graph",
            node=heads[1].loss,
            hint="models with auxiliary prediction heads are not routed; disable the extra heads",
        )
    if not heads:
        raise next(match for match in matches if isinstance(match, Refusal)).error()
    fields = {**vars(program), "loss_output": _loss_output(program, heads[0].loss)}
    return Analysed(**fields, head=heads[0])


def _loss_output(program: Program, loss: fx.Node) -> int:
    downstream = descendants([loss])
    for index, output in enumerate(program.outputs):
        if output in downstream and is_tensor(output) and _is_one_number(value(output)):
            return index
    raise CannotOptimize("the cross-entropy does not reach an output of the model", node=loss, hint="return the loss")


def _is_one_number(x: torch.Tensor) -> bool:
    """Of no dimensions, or of some of size 1: what a loss is that was divided by a tensor of shape [1]."""
    return all(isinstance(size, int) and size == 1 for size in x.shape)


def _match(program: Program, loss: fx.Node) -> Head | Refusal:
    arguments = dict(
        zip(
            ("input", "target", "weight", "reduction", "ignore_index", "label_smoothing"),
            (*loss.args, *(None, None, None, 1, -100, 0.0)[len(loss.args) :]),
            strict=True,
        )
    )
    arguments.update(loss.kwargs)
    if arguments["weight"] is not None or arguments["label_smoothing"]:
        return Refusal("unsupported loss: class weights or label smoothing", loss, "train with the plain cross-entropy")
    if arguments["reduction"] not in _REDUCTIONS:
        return Refusal("unsupported loss: unreduced cross-entropy", loss, "let the model reduce its loss")
    if value(loss).dtype is torch.float64:
        return Refusal("the loss is computed in float64", loss, "compute it in float32, in which it is routed")
    labels = value(arguments["target"]).dtype
    if labels is not torch.int64:
        return Refusal(f"the loss reads labels of {labels}", loss, "give labels of torch.int64, as eager needs them")
    found = _walk_back(arguments["input"])
    if isinstance(found, Refusal):
        return found
    linear, row_ops, arithmetic = found
    bias = linear.args[2] if len(linear.args) > 2 else None
    parameters = ancestors([node for node in (linear.args[1], bias) if node is not None])
    changed = next((node for node in changes_of(program) if node in parameters), None)
    if changed is not None:
        return Refusal(
            f"the forward changes {program.path(changed.args[0])}, a parameter of the head, in place",
            changed,
            "change it after optimizer.step()",
        )
    scale, divisor, softcap = arithmetic
    head = Head(
        linear=linear,
        hidden=linear.args[0],
        weight=linear.args[1],
        bias=bias,
        scale=scale,
        divisor=divisor,
        softcap=softcap,
        row_ops=tuple(row_ops),
        loss=loss,
        target=arguments["target"],
        reduction=_REDUCTIONS[arguments["reduction"]],
        ignore_index=arguments["ignore_index"],
        shift=0,
    )
    shift = _executed_shift(program, head)
    return shift if isinstance(shift, Refusal) else dataclasses.replace(head, shift=shift)


def _walk_back(logits: fx.Node) -> tuple[fx.Node, list[fx.Node], tuple[float, float, float]] | Refusal:
    """From the loss to the head's linear: the linear, the row moves and the arithmetic, in execution order."""
    vocabulary = value(logits).shape[-1]
    node, moves, arithmetic = logits, [], []
    while True:
        if is_tensor(node) and value(node).dim() > 3:
            return _several_predictions(node)
        if node.target == aten.linear.default:
            break
        if node.op != "call_function" or not node.args or not is_tensor(node.args[0]):
            return _unsupported(node)
        if node.target in _ROW_MOVES and value(node).shape[-1] == value(node.args[0]).shape[-1] == vocabulary:
            moves.append(node)
        elif node.target in _ARITHMETIC:
            arithmetic.append(node)
        elif node.target not in _CASTS:
            return _unsupported(node)
        node = node.args[0]
    recognised = _recognise(arithmetic[::-1])
    return recognised if isinstance(recognised, Refusal) else (node, moves[::-1], recognised)


def _recognise(chain: list[fx.Node]) -> tuple[float, float, float] | Refusal:
    """`(scale, divisor, softcap)` of `[* scale] [/ divisor] [/ cap, tanh, * cap]`."""
    scale, divisor, softcap = 1.0, 1.0, 0.0
    capped = next((index for index, node in enumerate(chain) if node.target == aten.tanh.default), None)
    linear_part = chain
    if capped is not None:
        before, after = chain[capped - 1 : capped], chain[capped + 1 :]
        if not before or len(after) != 1 or before[0].target != aten.div.Tensor:
            return _unsupported(chain[capped])
        inner, outer = _constant(before[0]), _constant(after[0])
        if inner is None or inner != outer or after[0].target != aten.mul.Tensor:
            return _unsupported(chain[capped])
        softcap = inner
        linear_part = chain[: capped - 1]
    for node in linear_part:
        factor = _constant(node)
        if factor is None or (node.target == aten.mul.Tensor and divisor != 1.0):
            return _unsupported(node)
        if node.target == aten.mul.Tensor:
            scale *= factor
        else:
            divisor *= factor
    return scale, divisor, softcap


def _constant(node: fx.Node) -> float | None:
    factor = node.args[1]
    return float(factor) if isinstance(factor, (int, float)) else None


def _unsupported(node: fx.Node) -> Refusal:
    return Refusal(
        "unsupported head: only linear, bias, a constant scale and a tanh soft-cap may precede the loss",
        node,
        "keep the head a plain nn.Linear (no adapter, mask or normalisation on the logits), and give the loss logits "
        "[tokens, words] and labels [tokens]",
    )


def _several_predictions(node: fx.Node) -> Refusal:
    return Refusal(
        f"the loss is over logits of {value(node).dim()} dimensions: several predictions for each token",
        node,
        "let the model predict one label for each token (no n-gram streams)",
    )


def _executed_shift(program: Program, head: Head) -> int | Refusal:
    """Runs the row moves and the label path on tensors that spell out their own position."""
    labels = [
        node
        for node in ancestors([head.target])
        if node.op == "placeholder" and program.kind(node) == "batch" and value(node).dim() == 2
    ]
    batch = program.batch if isinstance(program.batch, int) else 2
    length = program.sequence if isinstance(program.sequence, int) else 5
    if len(labels) != 1 or not is_tensor(head.hidden) or value(head.hidden).dim() not in (2, 3):
        return Refusal(
            "the loss's targets are not a function of one labels tensor [batch, sequence]",
            head.target,
            "pass labels of the shape of input_ids",
        )
    if value(head.hidden).dim() == 3 and not program.same_size(value(head.hidden).shape[1], program.sequence):
        return Refusal(
            f"the head sees {hint(value(head.hidden).shape[1])} positions where the call has {hint(program.sequence)} "
            "token ids",
            head.hidden,
            "let the head see every position: add none in front of it (prompt tuning does; prefix tuning and LoRA do "
            "not), and leave out logits_to_keep",
        )
    sizes = {"batch": batch, "sequence": length}
    positions = torch.arange(batch * length).view(batch, length)
    wide = value(head.linear).shape[-1]
    rows = positions.unsqueeze(-1).expand(batch, length, wide).contiguous()
    if value(head.linear).dim() == 2:
        rows = rows.reshape(-1, wide)
    moved = _execute(program, (head.linear, *head.row_ops)[-1], {head.linear: rows}, sizes)
    target, other = (
        _execute(program, head.target, {labels[0]: positions + add}, sizes) for add in (0, positions.numel())
    )
    if moved.dim() != 2 or target.shape != moved.shape[:1]:
        return Refusal("the loss does not see one row a token", head.loss, "use the model's own loss")
    counted = other - target == positions.numel()  # the others are filled in, with any number: `ignore_index`
    differences = (target - moved[:, 0])[counted].unique().tolist()
    same_row = (target // length == moved[:, 0] // length)[counted].all()
    if len(differences) != 1 or not same_row or differences[0] not in (0, 1):
        return Refusal(
            "labels and logits are not aligned at a fixed distance of 0 (masked) or 1 (causal)",
            head.loss,
            "use the model's own loss",
        )
    return int(differences[0])


def _execute(
    program: Program, root: fx.Node, known: dict[fx.Node, torch.Tensor], sizes: dict[str, int]
) -> torch.Tensor:
    """Runs the few nodes that `root` needs on concrete CPU tensors, sizes standing in for the symbols.

    Casts, and the head's arithmetic, move no value to another place and are passed over.
    """
    env: dict[fx.Node, Any] = dict(known)
    for node in sorted(ancestors([root], stop=known)):
        if node.op == "placeholder":
            env[node] = next(
                (size for name, size in sizes.items() if program.same_size(value(node), getattr(program, name))),
                None,
            )
        elif node.target in _CASTS | _ARITHMETIC:
            env[node] = env[node.args[0]].contiguous()
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda old: env[old])
            env[node] = node.target(*args, **kwargs)
    return env[root]
