"""The rewrite as a small SVG: the router above, the selection, and the main pass on the kept rows below.

Numbers come from a `Report`. Colours follow the reader's light or dark scheme; the file stands alone.
"""

from __future__ import annotations

from html import escape

from cggr_compile.inspection.report import Report
from cggr_compile.inspection.wording import SIZES, WHAT, layer_range, middle_text

STYLE = """
.cggr{--box:#f6f8fa;--line:#8c959f;--ink:#1f2328;--dim:#59636e;--quiet:#8250df;--train:#1a7f37;--pick:#bc4c00}
@media(prefers-color-scheme:dark){
.cggr{--box:#161b22;--line:#6e7681;--ink:#e6edf3;--dim:#9198a1;--quiet:#bc8cff;--train:#3fb950;--pick:#f0883e}}
.cggr text{font-family:ui-sans-serif,system-ui,sans-serif;font-size:13px;fill:var(--ink)}
.cggr .small{font-size:11px;fill:var(--dim)}.cggr .name{font-weight:600}
.cggr rect.box{fill:var(--box);stroke:var(--line)}.cggr rect.box.quiet{stroke:var(--quiet);stroke-dasharray:4 3}
.cggr rect.box.train{stroke:var(--train);stroke-width:1.5}.cggr rect.box.pick{stroke:var(--pick);stroke-width:1.5}
.cggr .bar{fill:var(--train)}.cggr .bar.quiet{fill:var(--quiet)}.cggr .bar.idle{fill:var(--line);opacity:.3}
.cggr path{fill:none;stroke:var(--line);stroke-width:1.5}.cggr marker path{fill:var(--line);stroke:none}
"""

WIDTH, HEIGHT = 760, 262
_TOP, _BOTTOM, _TALL = 24, 164, 74
_MOST_BARS = 40

# Of each route: the box in front of the main pass, what the selection gives, and the two lines of that box.
_ROUTES = {
    "sequence": ("gather", "row indices [k]", "B → k = {k}", "every input"),
    "segment": ("gather", "positions [B, k]", "S → k = {k}", "every input"),
    "token": ("gather", "positions [B, k]", "S → k = {k}", "middle layers"),
    "loss": ("", "token indices [k]", "", ""),
}
_SKIPPED = ("mask", "positions [B, k]", "S → k = {k}", "middle experts")


def figure(report: Report) -> str:
    """The figure of a report as an `<svg>` element."""
    sizes, config = report.sizes, report.config
    batch = _box(8, 94, 104, "batch", [f"B = {sizes.batch} rows", f"S = {sizes.sequence} tokens"])
    layers = report.stack.layers if report.stack else 0
    main = _box(300, _BOTTOM, 262, "main pass", [_main_text(report, layers)], "train") + _bars(314, layers, layers, 234)
    loss = _box(606, _BOTTOM, 146, "masked loss", ["over counted tokens", "no logits returned"], "train")
    if config["keep_logits"]:
        loss = _box(606, _BOTTOM, 146, "masked loss", ["over counted tokens", "logits returned"], "train")
    if not report.routed:
        drawn = [batch, main, loss, _arrow("M112 131 H206 V201 H298"), _arrow("M562 201 H604")]
        return _svg("One row: the step is not routed", drawn)
    route, amount = next(iter(report.amounts.items()))
    name, unit, changed, given = _SKIPPED if config["skip"] == "experts" else _ROUTES[route]
    gather = _box(150, _BOTTOM, 110, name, [changed.format(k=amount.kept), given], "pick")
    select = _box(606, _TOP, 146, f"select: {report.selection}", [_kept_text(report), f"sorted {unit}"], "pick")
    drawn = [batch, main, loss, _arrow("M562 201 H604"), select]
    if route == "loss":
        drawn += [_arrow("M60 168 V201 H298"), _arrow("M679 98 V162"), _text(640, 134, unit, "small")]
    else:
        drawn += [gather, _arrow("M60 168 V201 H148"), _arrow("M260 201 H298")]
        drawn += [_arrow("M679 98 V131 H205 V162"), _text(442, 125, unit, "small")]
    if report.router is None:
        return _svg(f"Rewrite: {report.selection} {WHAT[route]}", [*drawn, _arrow("M60 94 V61 H604")])
    router = report.router
    drawn += [
        _box(150, _TOP, 230, "router", [f"{layer_range(router.layers)} of {layers}, head; no gradient"], "quiet"),
        _bars(164, router.layers, layers, 202, "quiet"),
        _box(424, _TOP, 138, f"score: {config['scoring']}", ["one number a row", "fp32, no gradient"], "quiet"),
        _arrow("M60 94 V61 H148"),
        _arrow("M380 61 H422"),
        _arrow("M562 61 H604"),
    ]
    kept = f"{amount.kept} of {amount.total} {WHAT[route]}"
    return _svg(f"Rewrite: router of {router.layers} layers selects {kept}", drawn)


def _main_text(report: Report, layers: int) -> str:
    name = f"{layers} layers" if layers else "the whole model"
    if "sequence" in report.amounts:
        return f"{name} on k = {report.amounts['sequence'].kept} rows"
    if "segment" in report.amounts:
        return f"{name} on k = {report.amounts['segment'].kept} tokens"
    if "token" in report.amounts:
        short = middle_text(report.config, layers)
        return f"{short} on k = {report.amounts['token'].kept} tokens"
    return f"{name} on every row"


def _kept_text(report: Report) -> str:
    route, amount = next(iter(report.amounts.items()))
    return f"k = ⌈{report.config['ratio']:g} · {SIZES[route]}⌉ = {amount.kept}"


def _bars(x: float, count: int, of: int, width: float, kind: str = "") -> str:
    """Layers as bars, at most _MOST_BARS in all; the first `count` of `of` run."""
    shown = min(of, _MOST_BARS)
    if not shown:
        return ""
    y = (_TOP if kind else _BOTTOM) + 50
    filled = max(1, round(count * shown / of))
    step = width / shown
    return "".join(
        f'<rect class="bar {kind if index < filled else "idle"}" x="{x + index * step:.1f}" y="{y}" '
        f'width="{step * 0.7:.1f}" height="14" rx="1"/>'
        for index in range(shown)
    )


def _box(x: int, y: int, width: int, name: str, lines: list[str], kind: str = "") -> str:
    rect = f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{_TALL}" rx="6"/>'
    text = _text(x + width / 2, y + 22, name, "name")
    return rect + text + "".join(_text(x + width / 2, y + 41 + 16 * i, line, "small") for i, line in enumerate(lines))


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(text)}</text>'


def _arrow(path: str) -> str:
    return f'<path d="{path}" marker-end="url(#tip)"/>'


def _svg(title: str, drawn: list[str]) -> str:
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    )
    return (
        f'<svg class="cggr" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{tip}{''.join(drawn)}</svg>\n"
    )
