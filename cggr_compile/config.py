"""`RoutingConfig`: every option of the compiler, checked where it is given.

An unknown or ill-typed option raises `ConfigError` naming the option, what was given, what is valid and, for a
misspelt name, the nearest one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from cggr_compile.kernels.providers import PROVIDERS
from cggr_compile.kernels.reference import rows as reference
from cggr_compile.kernels.reference.selection import RULES, RuleFunction, is_number, rule_name, rule_of
from cggr_compile.schedule import Schedule
from cggr_compile.values import ConfigError, check_options, choice, is_int, signature_of, what_is_valid

ROUTES = ("sequence", "segment", "token", "loss", "depth")
COMPOSITIONS = (
    *(("sequence", "loss"), ("token", "loss")),
    *(("depth", "sequence"), ("depth", "segment"), ("depth", "token"), ("depth", "loss")),
    *(("depth", "sequence", "loss"), ("depth", "token", "loss")),
)
HOW_TO_SCORE = {"scoring": "loss", "router_layers": "auto", "router_body": "exact", "router_head": "exact"}
"""Options of the router, and what they are where nobody asks."""
READ_WITH = {
    "router_head_frequent": ("router_head", "sampled"),
    "router_head_sampled": ("router_head", "sampled"),
    "threshold_sensitivity": ("dynamic_threshold", True),
}
"""Options that are read where another one has that value."""
SELECTING = ("selection", "selection_options", "dynamic_threshold", "warmup_steps", "dense_after_steps")
TOKEN_OPTIONS = ("first_layers", "last_layers", "resample", "skip", "allow_compressed_recurrence")
"""Options of the token route alone."""
PADDINGS = ("any", "right")
CHOICES = {
    "scoring": tuple(reference.SCORINGS),
    "router_body": ("exact", "fp8"),
    "router_head": ("exact", "sampled", "fp8"),
    "matmul": ("exact", "fp8"),
    "resample": ("block", "layer"),
    "skip": ("layers", "experts"),
    "fallback": ("raise", "eager"),
}
"""What options that are names may be."""
USUAL_INNER = ("auto", "inductor", "eager", "aot_eager")
"""Inner backends that torch's registry need not be asked for, which takes it a second."""
OPTIONAL_PASSES = ("join_loss", "join_head", "elide_causal_masks", "fuse_experts")


class _Default(str):
    """The name of a rule that nobody asked for."""

    __slots__ = ()


@dataclass(frozen=True)
class RoutingConfig(Schedule):
    """Options of the rewrite; immutable, compared by value (a function of yours by identity).

    Attributes:
        route: what is routed. `"sequence"`: whole rows of the batch; `"segment"`: whole documents of packed sequences,
            up to k tokens of each sequence (`position_ids` that restart say where they are); `"token"`: the middle
            layers run on k tokens of each sequence, the others pass on the residual; `"loss"`: head and softmax run on
            k tokens of the batch; `"depth"`: the first layers train alone, and later the whole model. Several of them
            as a tuple: `("sequence", "loss")` or `("token", "loss")`, and `"depth"` in front of any.
        ratio: fraction kept, in (0, 1]: k = max(1, ceil(ratio * N)), N the batch size (sequence), the sequence length
            (segment, token) or both multiplied (loss); 1 keeps everything, always. None is 1, and where another route,
            a selection, a threshold or a schedule is asked for 0.5.
        router_layers: layers of the router, a positive int, or `"auto"`: max(2, L // 8), but at most L - 1.
        scoring: `"loss"` (negative log-likelihood), `"entropy"`, `"margin"` (1 - (p1 - p2)) or `"combined"`
            (their sum); the score of a row or document is the mean over its counted tokens, in fp32.
        router_body: how the products of the router's layers with the model's weights are made: `"exact"`, as the model
            makes them, or `"fp8"`, of rows rounded to float8_e4m3fn (`quantize_linears.py`), which ranks rows a little
            differently. Where the router has no such product `"fp8"` raises `CannotOptimize`.
        router_head: how the router's logits are computed: `"exact"`, or estimated by `"sampled"` (a sample of the
            vocabulary; `"loss"` and `"entropy"` only) or `"fp8"`. The loss is always exact.
        router_head_frequent, router_head_sampled: sampled head: how many of the batch's most frequent tokens, and how
            many others drawn at random, stand for the vocabulary.
        selection: None is `"trimmed"` where rows or documents are selected, `"random"` where tokens are
            (docs/learning.md). `"topk"` (hardest rows), `"fixed_quota"` (the same, of a k that the dynamic threshold
            leaves alone), `"random"` (uniform rows; no router is run), or a rule that draws by the scores
            (`kernels/reference/selection.py`): `"trimmed"` (top-k without outliers, and a uniform share),
            `"stratified"` (uniform within strata by score; the loss is the stratified estimate of the batch's) or
            `"importance"` (rows with probability by score; the loss is an unbiased estimate of the batch's). `"auto"`
            keeps every row until their losses show that a share of the rows is noise, then it is `"trimmed"` with a
            `tau` of 0.125; it may switch back. Or a function `(scores, valid, k, noise, **options) -> (index, weight)`:
            float32 scores [N], bool valid [N] (rows with a counted label), an int k and float32 noise [N], uniform in
            [0, 1), to int64 rows [k] and float32 weights [k]. `"auto"` and a function are for the sequence route alone.
            A row of weight 0 only fills up; the loss is Σ w·l / Σ w over the kept rows' counted tokens, so weights of 1
            are a plain mean. The function runs at every step as one operator that compilers do not look into, and
            nothing is read back unless it does; what it returns is checked by type and shape.
        selection_scope: sequence route: among which rows a rank of a distributed run selects. `"local"`: its own;
            `"global"`: the R ranks select R · k of their R · B rows together, and each trains k of these, whose
            arguments travel to it (docs/distributed.md). In a step in which the sizes of their batches differ, each
            rank selects among its own.
        selection_options: options of that rule, e.g. `{"tau": 0.05}` (of trimmed, for `"auto"`); None for its defaults.
            Of a function: its keyword parameters beyond the four whose default is a number, None or missing; whole
            numbers arrive as int unless the default is a float.
        warmup_steps: optimiser steps over which the kept fraction falls from 1 to `ratio`.
        dynamic_threshold: sequence route alone: keep more rows while the router is unsure. The fraction is that of the
            step times 1 + (1 - mean confidence) · `threshold_sensitivity`, at most 1, raised to the next of the
            LADDER_RUNGS + 1 fractions that the warm-up uses. The mean confidence is that of the last routed call, the
            router's largest probability over its counted tokens (0 where none is); the first call uses the plain
            fraction. On CUDA it travels to the host by itself and the next call waits for it, so the host is at most
            one call ahead of the device.
        threshold_sensitivity: how far, in [0, 1].
        dense_after_steps: optimiser step from which everything is kept; the kept fraction rises to 1 from the end of
            the warm-up until then, on the warm-up's rungs. None keeps `ratio`.
        depth_layers: depth route: how many of the first layers train, with final norm and head, until the model grows;
            the others have no gradient, and an optimiser whose gradients are None leaves them as they are. A tuple,
            `(3, 6)`, for several stages before the last, in which all layers train.
        depth_until: depth route: when the model grows: an int, optimiser steps, which `attach` or a Trainer counts; a
            float in (0, 1), that share of all steps, which `attach(…, total_steps=…)` or the Trainer tells; a tuple of
            them, of several stages; None, when `model.cggr.grow()` is called.
        grow: depth route: what new layers start from, in place: `"copy"`, layer i from layer i mod n of the n that
            trained, or `"random"`, the values that they have.
        first_layers, last_layers: token route: layers at either end that run on every token, at least 1 and 0.
        resample: token route: `"block"` selects once for all middle layers, `"layer"` for each of them.
        skip: token route: what the other tokens skip. `"layers"`: the middle layers; `"experts"`: only the experts of a
            mixture in the middle layers (null routing), while attention, shared experts and dense MLPs run on every
            token. Where no middle layer has experts that `fuse_experts` recognises, it raises `CannotOptimize`.
        allow_compressed_recurrence: token route: let convolutions, scans and shifts of the middle layers run on the
            kept tokens as if these were neighbours; without it they raise `CannotOptimize`.
        matmul: how what trains multiplies by weights: `"exact"`, as the model does, or `"fp8"`, which changes what is
            learned: the linears in front of the head multiply rows rounded to float8_e4m3fn, and so do their
            input gradients; weight gradients stay exact (`fp8_linear.py`). It is for CUDA from compute capability 9.0
            in bfloat16, autocast's included; elsewhere float8 is cast back, which saves nothing. The report counts what
            stays exact; where float8 can make no product, `"fp8"` raises `CannotOptimize`.
        inner: torch.compile backend that runs the rewritten graph; `"auto"` is inductor on CUDA and eager elsewhere.
        outline_layers: compile the layers of the stack by themselves, one for all that are alike (`outline_layers.py`).
            Shortens compilation; a step then starts more compiled functions, which costs time on the host unless
            `cuda_graphs` records them: `"auto"` is the value of `cuda_graphs`. Where a step cannot be divided it is
            compiled whole and the report says why.
        recompute_elementwise: save fewer activations: what the forward computes element by element (norms, the inside
            of a gated MLP) is computed again where the backward needs it as the operand of a matrix product, which
            costs a little time. For inner backends with torch's partitioner (inductor, aot_eager).
        cuda_graphs: record the compiled step for each batch shape and replay it (`cuda_graphs.py`), which helps where
            the host launches kernels more slowly than the device runs them. A recording keeps the memory of its
            activations and gradients; gradients are copied out of it only where a loop holds one over a step, as
            accumulation does. Where a step cannot be recorded it runs as it is, with a warning, and the report says
            why.
        kernels: implementations of the operators: `"auto"` (the best that can run), the name of a provider for every
            operator that has it (`"triton"`, `"reference"`), or a mapping from operators to providers, e.g.
            `{"masked_loss": "triton_recompute"}`. One that cannot run raises `CannotOptimize`.
        disable_passes: passes to leave out, to find out what one does: of `"join_loss"`, `"join_head"` (a loss or head
            in other operators is then refused), `"elide_causal_masks"` and `"fuse_experts"`.
        padding: `"any"`; or `"right"`, a promise: padding (`attention_mask` 0) is behind the tokens of each row, and
            predicts no label. Causal attention then needs no mask to hide it (`elide_causal_masks.py`). A batch that
            breaks the promise raises; on CUDA an assertion fails on the device. None is `"any"`, and `"right"` where
            `cggr.route` finds TRL's own collator, which pads so.
        unpad: while every row is kept, skip what no token sees; loss and gradients are the same. A padded batch trains
            on its real tokens alone, one row behind the other (`unpad_rows.py`); in a packed one, whose `position_ids`
            restart, attention runs within documents (`attend_documents.py`). The host reads two numbers back first, or
            how many documents there are. `"auto"`: where attention of variable lengths can run (CUDA, bf16 or fp16),
            the model is proved to allow it and at most 0.9 of a padded batch are left; True: wherever there is padding,
            and a model that does not allow it raises `CannotOptimize`. A batch whose padding has or predicts labels, or
            is between tokens, trains as it is. None is False, and `"auto"` where `cggr.route` trains by a trainer.
        keep_logits: return the logits of the kept rows, which a step does not compute otherwise.
        prediction_metrics: measure, with the loss, the metrics `entropy` and `mean_token_accuracy` of the kept tokens.
        fallback: `"raise"`, or `"eager"` to train unrouted, with a warning for each reason, where routing is
            impossible. Between the first step of `route="depth"` and its growing by copies it raises too: eager steps
            would train layers that are overwritten.
        seed: seed of the model's own generator, for random selections and router heads; None takes torch's global
            seed when the model is optimised.
    """

    route: str | tuple[str, ...] = "sequence"
    ratio: float = None  # type: ignore[assignment]  # a number once it is made
    router_layers: int | str = "auto"
    scoring: str = "loss"
    router_body: str = "exact"
    router_head: str = "exact"
    router_head_frequent: int = 1024
    router_head_sampled: int = 1024
    selection: str | RuleFunction = field(default=None, hash=False)  # type: ignore[assignment]  # a rule, likewise
    selection_scope: str = "local"
    selection_options: Mapping[str, float] | None = field(default=None, hash=False)
    warmup_steps: int = 0
    dynamic_threshold: bool = False
    threshold_sensitivity: float = 0.5
    dense_after_steps: int | None = None
    depth_layers: int | tuple[int, ...] | None = None
    depth_until: float | tuple[float, ...] | None = None
    grow: str = "copy"
    first_layers: int = 1
    last_layers: int = 1
    resample: str = "block"
    skip: str = "layers"
    allow_compressed_recurrence: bool = False
    matmul: str = "exact"
    inner: str = "auto"
    outline_layers: bool | str = "auto"
    recompute_elementwise: bool = False
    cuda_graphs: bool = False
    # What a dict or a callable object may lack is a hash; equal configs have equal hashes without them.
    kernels: str | Mapping[str, str] = field(default="auto", hash=False)
    disable_passes: tuple[str, ...] = ()
    padding: str | None = None
    unpad: bool | str | None = None
    keep_logits: bool = False
    prediction_metrics: bool = False
    fallback: str = "raise"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in (option.name for option in dataclasses.fields(self) if option.type == "bool"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a bool")
        for option in dataclasses.fields(self):  # files of options have lists
            if "tuple" in str(option.type) and isinstance(given := getattr(self, option.name), list):
                object.__setattr__(self, option.name, tuple(given))
        self._check_route()
        for name, valid in CHOICES.items():
            choice(name, getattr(self, name), valid)
        self._resolve_selection()
        self._check_selection()
        if self.padding is not None:
            choice("padding", self.padding, PADDINGS)
        if not isinstance(self.disable_passes, tuple):
            raise ConfigError(f"disable_passes={self.disable_passes!r} is not a tuple of names, e.g. ('join_head',)")
        for name in self.disable_passes:
            choice("disable_passes", name, OPTIONAL_PASSES)
        if not is_number(self.ratio) or not 0 < self.ratio <= 1:
            raise ConfigError(f"ratio={self.ratio!r} is not in (0, 1]; give the fraction of rows to keep, e.g. 0.25")
        if self.router_layers != "auto" and not is_int(self.router_layers, 1):
            raise ConfigError(
                f"router_layers={self.router_layers!r} is neither 'auto' nor a positive integer; "
                "give the number of layers the router runs"
            )
        self._check_router_head()
        self._check_unpad()
        if not is_int(self.warmup_steps, 0):
            raise ConfigError(f"warmup_steps={self.warmup_steps!r} is not a non-negative integer")
        self._check_whole_rows()
        self._check_threshold()
        if self.dense_after_steps is not None and not is_int(self.dense_after_steps, self.warmup_steps + 1):
            raise ConfigError(
                f"dense_after_steps={self.dense_after_steps!r} is neither None nor an integer above "
                f"warmup_steps={self.warmup_steps}"
            )
        self.check_stages()
        self.check_scope()
        self._check_token_route()
        if not isinstance(self.inner, str):
            raise ConfigError(f"inner={self.inner!r} is not the name of a torch.compile backend")
        if self.inner not in USUAL_INNER:
            others = sorted({*torch.compiler.list_backends(exclude_tags=())} - {*USUAL_INNER, "cggr"})
            choice("inner", self.inner, (*USUAL_INNER, *others))
        self._check_kernels()
        if not isinstance(self.outline_layers, bool) and self.outline_layers != "auto":
            raise ConfigError(f"outline_layers={self.outline_layers!r} is neither a bool nor 'auto'")
        for name, (other, value) in READ_WITH.items():
            if getattr(self, name) != getattr(RoutingConfig, name) and getattr(self, other) != value:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is read where {other}={value!r} alone; leave it out, or give that "
                    "as well"
                )
        if self.seed is not None and not (is_int(self.seed, 0) and self.seed < 2**64):
            raise ConfigError(f"seed={self.seed!r} is neither None nor an integer from 0 to 2**64 - 1")

    @property
    def outlines(self) -> bool:
        """`outline_layers` with `"auto"` decided."""
        return self.cuda_graphs if isinstance(self.outline_layers, str) else self.outline_layers

    def _check_route(self) -> None:
        if not isinstance(self.route, tuple):
            choice("route", self.route, ROUTES)
        elif self.route not in COMPOSITIONS:
            raise ConfigError(
                f"route={self.route!r} is not a combination of routes; "
                f"valid combinations: {', '.join(map(str, COMPOSITIONS))}"
            )

    def _resolve_selection(self) -> None:
        """Gives `selection` and `ratio` their values where they are left out."""
        left_out = self.selection is None or isinstance(self.selection, _Default)
        asked = [name for name in SELECTING if getattr(self, name) and not (name == "selection" and left_out)]
        default = "trimmed" if {"sequence", "segment"}.issuperset(self.routes) else "random"
        of_scores = [name for name, plain in HOW_TO_SCORE.items() if getattr(self, name) != plain]
        scored = [name for name in of_scores if name != "router_layers"]  # which goes with any selection
        if not self.routes and (asked or scored or self.ratio not in (None, 1)):
            name = [*asked, *scored, "ratio"][0]
            raise ConfigError(f"{name} with route='depth', which selects nothing; use route=('depth', 'sequence')")
        selects = asked or self.route not in ("sequence", "depth")
        if scored and (self.selection == "random" or (self.ratio is None and not selects)):
            why = "with selection='random', which reads no scores" if selects else "while every row is kept"
            instead = "selection='topk' or 'trimmed'" if selects else "a ratio below 1 as well"
            raise ConfigError(f"{scored[0]}={getattr(self, scored[0])!r} {why}; leave it out, or give {instead}")
        if self.ratio is None:
            object.__setattr__(self, "ratio", 0.5 if selects else 1.0)
        if left_out:
            if of_scores and default == "random":
                raise ConfigError(
                    f"{of_scores[0]}={getattr(self, of_scores[0])!r} with route={self.route!r}, where the default, "
                    "selection='random', reads no scores; leave it out, or give selection='topk' or 'trimmed' as well"
                )
            object.__setattr__(self, "selection", _Default(default))

    def _check_token_route(self) -> None:
        for name, least in (("first_layers", 1), ("last_layers", 0)):
            if not is_int(getattr(self, name), least):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not an integer of at least {least}")
        self._check_skip()
        for option in dataclasses.fields(self):
            given = getattr(self, option.name)
            if option.name in TOKEN_OPTIONS and "token" not in self.routes and given != option.default:
                raise ConfigError(
                    f"{option.name}={given!r} is for the token route, not route={self.route!r}; use route='token'"
                )
        route = next((route for route in ("token", "segment") if route in self.routes), None)
        if route is None:
            return
        rule = rule_of(self.selection)
        if rule.weighting != "none":
            valid = [name for name in RULES if RULES[name].weighting == "none"]
            why = {
                "token": "a token that skips layers keeps its loss",
                "segment": "what fits into k says which documents are taken, so no weights make up for the others",
            }
            raise ConfigError(
                f"selection={self.selection!r} weighs the loss of what it selects, and {why[route]}; with "
                f"route={route!r} valid selections: {', '.join(valid)}"
            )
        if route == "token" and self.resample == "layer" and not rule.needs_noise:
            raise ConfigError(
                f"resample='layer' with selection={self.selection!r} would select the same tokens for every layer; "
                "use resample='block', or selection='random' or 'trimmed'"
            )

    def _check_skip(self) -> None:
        if self.skip == "experts" and "fuse_experts" in self.disable_passes:
            raise ConfigError(
                f"skip={self.skip!r} with disable_passes={self.disable_passes!r}: experts that are not fused take no "
                "selection; leave 'fuse_experts' in"
            )

    def _check_whole_rows(self) -> None:
        """Refuses what is defined for whole rows only where tokens are routed."""
        if self.routes in (("sequence",), ()):
            return
        named = "name a rule, e.g. 'topk' or 'random'"
        what = "documents" if "segment" in self.routes else "tokens"
        rows_only = {
            "dynamic_threshold=True": (self.dynamic_threshold, "leave it out"),
            "selection='auto'": (self.selection == "auto", named),
            f"selection={rule_name(self.selection)}": (callable(self.selection), named),
        }
        for option, (given, instead) in rows_only.items():
            if given:
                raise ConfigError(
                    f"{option} is for whole sequences and route={self.route!r} selects {what}; {instead}, "
                    "or use route='sequence'"
                )

    def _check_router_head(self) -> None:
        for name, least in (("frequent", 0), ("sampled", 1)):
            given = getattr(self, f"router_head_{name}")
            if not is_int(given, least):
                raise ConfigError(f"router_head_{name}={given!r} is not an integer of at least {least}")
        if self.router_head == "sampled" and self.scoring in ("margin", "combined"):
            raise ConfigError(
                f"router_head='sampled' cannot score by {self.scoring!r}: the two largest logits of a sample are not "
                "those of the vocabulary; use router_head='fp8' or 'exact', or scoring='loss' or 'entropy'"
            )

    def _check_threshold(self) -> None:
        sensitivity = self.threshold_sensitivity
        if not is_number(sensitivity) or not 0 <= sensitivity <= 1:
            raise ConfigError(f"threshold_sensitivity={sensitivity!r} is not in [0, 1]")
        if not self.follows_confidence:
            return
        if self.selection in ("random", "auto"):
            raise ConfigError(
                f"dynamic_threshold=True with selection={self.selection!r}: no router runs, so there is no confidence; "
                "leave it out, or use a selection by scores, e.g. 'topk'"
            )
        if self.router_head == "sampled":
            raise ConfigError(
                "dynamic_threshold=True with router_head='sampled': the largest probability of a sample is not that of "
                "the vocabulary; use router_head='fp8' or 'exact'"
            )

    def _check_selection(self) -> None:
        rule, options = self.selection, {} if self.selection_options is None else self.selection_options
        if not callable(rule):
            choice("selection", rule, (*RULES, "auto"), " or a function (scores, valid, k, noise)")
            check_options("trimmed" if rule == "auto" else rule, options)
            return
        signature = signature_of(rule)
        check_options(rule, options)
        try:
            signature.bind("scores", "valid", "k", "noise", **options)
        except TypeError as error:
            raise ConfigError(
                f"selection={rule_name(rule)} cannot be called as (scores, valid, k, noise, **options): {error}"
            ) from error

    def _check_unpad(self) -> None:
        if self.unpad is not None and not isinstance(self.unpad, bool) and self.unpad != "auto":
            raise ConfigError(f"unpad={self.unpad!r} is neither a bool nor 'auto'")
        if self.unpad is True and (self.ratio < 1 or self.selection == "auto" or "loss" in self.routes):
            raise ConfigError(
                "unpad=True is for steps on every row and every token; leave ratio, selection and route out, or unpad"
            )
        if self.unpad is True and self.keep_logits:
            raise ConfigError(
                "unpad=True with keep_logits=True, which keeps the logits of padding too; leave one of them out"
            )

    def _check_kernels(self) -> None:
        names = sorted({name for providers in PROVIDERS.values() for name in providers})
        if isinstance(self.kernels, str):
            choice("kernels", self.kernels, ("auto", *names))
            return
        if not isinstance(self.kernels, Mapping):
            raise ConfigError(f"kernels={self.kernels!r} is neither a string nor a mapping from operators to providers")
        for operator, provider in self.kernels.items():
            choice("kernels: operator", operator, tuple(PROVIDERS))
            choice(f"kernels[{operator!r}]", provider, tuple(PROVIDERS[operator]))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> RoutingConfig:
        """Builds a config from keyword options.

        Raises:
            ConfigError: an option is unknown (the message lists the valid ones and the nearest) or has a bad value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name == "total_steps":
                raise ConfigError("total_steps is no option; pass it to cggr.attach(model, optimizer, total_steps=…)")
            if name not in names:
                raise ConfigError(f"unknown option {name!r}{what_is_valid(name, names, 'options')}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data, for reports: `selection` is the name of the rule."""
        given = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        return {**plain, "selection": rule_name(self.selection)}
