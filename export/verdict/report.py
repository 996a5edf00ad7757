"""A verdict for other readers: one HTML file for a person, JUnit XML for a build server, node data for Model Explorer.

The HTML file needs nothing but itself: no network, no fonts, no libraries; all names in it are escaped. It holds a
number for each tensor and a letter for each of its tokens and heads, and stays below a megabyte for 32 layers.

**Source** of the node data: `node_data_builder.py` of Google's Model Explorer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape as escape_markup
from typing import Any
from xml.etree import ElementTree

from export.measure.figures import BINS, Birth, Comparison
from export.phone.provenance import Made
from export.verdict import story
from export.verdict.verdict import Verdict
from refimpl.errors import visible

LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"  # an excess x is LEVELS[2 * log2(x) + 18]: 1 is "i", 2 is "k"
COLOURS = ("#1a7f4b", "#58a65c", "#a9cf7a", "#e8dd7d", "#f0a04b", "#e0603c", "#c22f2f", "#7d1128")
DARK = (COLOURS[0], *COLOURS[5:])
LIMITS = (1 / 16, 1 / 4, 1 / 2, 1, 2, 8, 64)  # of the colours: above 1 is wrong
WORST = 60  # rows of the table


def junit(verdict: Verdict) -> str:
    """JUnit XML: a suite for each graph and way, a case for each tensor."""
    root = ElementTree.Element("testsuites", name="refimpl verify")
    for graph, way in _views(verdict.tensors):
        tensors = [t for t in verdict.tensors if (t.graph, t.way) == (graph, way)]
        failing = [t for t in tensors if not verdict.excess(t) <= 1]
        suite = ElementTree.SubElement(
            root, "testsuite", name=_plain(f"{graph}/{way}"), tests=str(len(tensors)), failures=str(len(failing))
        )
        for tensor in tensors:
            case = ElementTree.SubElement(
                suite, "testcase", classname=_plain(f"{graph}.{way}"), name=_plain(tensor.tap)
            )
            if tensor in failing:
                cause = verdict.causes.get(tensor.name)
                said = tensor.problem or f"{verdict.excess(tensor):.3g} of what is allowed, {tensor.device.sqnr:.1f} dB"
                message = (
                    said + (f"; {cause}" if cause else "") + (f"; {tensor.born.value}" if tensor.born.value else "")
                )
                ElementTree.SubElement(case, "failure", message=_plain(message)).text = _plain(
                    verdict.story if tensor is verdict.guilty else message
                )
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def model_explorer(verdict: Verdict) -> str:
    """Custom node data of Model Explorer, graph by graph: each output's excess, coloured as in the HTML file.

    Load it beside a graph's `model.onnx`. Where a graph was run isolated and chained, isolated is shown.
    """
    thresholds = [{"value": limit, "bgColor": colour} for limit, colour in zip((*LIMITS, 1e300), COLOURS, strict=True)]
    content: dict[str, Any] = {}
    for tensor in sorted(verdict.tensors, key=lambda tensor: tensor.way != "isolated"):
        results = content.setdefault(tensor.graph, {"results": {}, "thresholds": thresholds})["results"]
        results.setdefault(tensor.output or tensor.tap, {"value": min(verdict.excess(tensor), 1e9)})
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def escape(text: str, quote: bool = True) -> str:
    """Text for the page: nothing in it is markup, and nothing turns the reading direction of what follows."""
    return escape_markup(visible(text), quote)


def html(verdict: Verdict, made: Sequence[Made] = ()) -> str:
    """One self-contained HTML file. `made`: what a compiler made of the suspects, if that is known."""
    guilty = verdict.guilty
    head = "agrees" if verdict else "differs"
    pieces = [
        f'<header class="{head}"><h1>{"The device agrees" if verdict else "The device differs"}</h1>'
        f"<p>{escape(verdict.summary)}</p></header>",
        _story(verdict),
        "<h2>Where it begins</h2>",
        f'<p class="key">{_key()} A cell is a tensor: what it needs over what is allowed. A frame is the first guilty '
        "one. Click for tokens, heads and the distribution.</p>",
        _tabs(verdict, guilty),
        '<section id="detail" hidden></section>',
        _made(made),
        "<h2>The price of quantization, and what the device added</h2>",
        _curves(verdict),
        "<h2>All rows</h2>",
        _histogram([sum(t.needs.histogram[i] for t in verdict.tensors if t.needs.histogram) for i in range(BINS)]),
        f"<h2>Worst tensors</h2>{_worst(verdict)}",
        f"<h2>Where all of it is from</h2>{_provenance(verdict)}",
        f'<script type="application/json" id="data">{_data(verdict)}</script><script>{_SCRIPT}</script>',
    ]
    page = _PAGE.replace("{style}", _STYLE).replace("{title}", f"refimpl verify: {head}")
    return page.replace("{body}", "\n".join(pieces))


def _made(made: Sequence[Made]) -> str:
    """A table of the suspects, with the compiler's operations and their ONNX nodes."""
    if not made:
        return ""
    rows = "".join(
        f"<tr><td>{escape(one.tap)}<td>{escape(line)}"
        for one in made
        for line in (list(one.lines()) or ["inside of another operation"])
    )
    return (
        "<h2>What the compiler made of the suspects</h2><table><tr><th>tensor<th>Qualcomm's operation (its name) of "
        f"ONNX nodes</tr>{rows}</table>"
    )


def level(excess: float) -> str:
    """A letter for an excess: half a power of two a step."""
    if not excess > 0:
        return LEVELS[0] if excess == 0 else LEVELS[-1]
    at = round(2 * math.log2(excess)) + 18 if math.isfinite(excess) else len(LEVELS) - 1
    at = max(at, 19) if excess > 1 else min(at, 18)
    return LEVELS[min(max(at, 0), len(LEVELS) - 1)]


def colour(excess: float) -> str:
    """A cell's colour: green below 1, red above."""
    return COLOURS[sum(not excess <= limit for limit in LIMITS)]


def paint(background: str) -> str:
    """The style of a cell of that colour, with letters that can be read on it."""
    return f"background:{background}" + (";color:#fff" if background in DARK else "")


def _plain(text: str) -> str:
    """The text with "?" for each character that XML forbids."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def _views(tensors: Iterable[Comparison]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((t.graph, t.way) for t in tensors))


def _run_of(graph: str) -> str:
    """A graph's name without the part's: the tab it is in."""
    return re.sub(r"_\d+_of_\d+$", "", graph)


def _story(verdict: Verdict) -> str:
    lines = [*verdict.story.split("\n"), *story.unmeasured(verdict), *verdict.remarks]
    cells = [(t, t.logits) for t in verdict.tensors if t.logits is not None]
    rows = "".join(
        f"<tr><td>{escape(f'{t.graph}, {t.way}')}<td>{found.kl:.3g}<td>{found.cost_kl:.3g}<td>{found.top1:.1%}"
        f"<td>{found.cost_top1:.1%}"
        for t, found in cells
    )
    table = (
        "<table><tr><th>logits<th>KL to the oracle, nats<th>by quantization alone<th>same top-1"
        f"<th>by quantization alone</tr>{rows}</table>"
        if rows
        else ""
    )
    return "".join(f"<p>{escape(line)}</p>" for line in lines if line) + table


def _tabs(verdict: Verdict, guilty: Comparison | None) -> str:
    """A heat map for each size and way: layers down, operations across."""
    views = list(dict.fromkeys((_run_of(t.graph), t.way) for t in verdict.tensors))
    chosen = (_run_of(guilty.graph), guilty.way) if guilty else views[0] if views else None
    numbers = {id(tensor): i for i, tensor in enumerate(verdict.tensors)}
    buttons, maps = [], []
    for i, (run, way) in enumerate(views):
        tensors = [t for t in verdict.tensors if (_run_of(t.graph), t.way) == (run, way)]
        bad = sum(not verdict.excess(t) <= 1 for t in tensors)
        on = (run, way) == chosen
        count = f" · {bad} wrong" if bad else ""
        buttons.append(
            f'<button data-tab="{i}" class="{"on" if on else ""}">{escape(run)}, {escape(way)}{count}</button>'
        )
        maps.append(
            f'<div class="map" id="tab{i}"{"" if on else " hidden"}>{_map(verdict, tensors, numbers, guilty)}</div>'
        )
    return f"<nav>{''.join(buttons)}</nav>{''.join(maps)}"


def _map(verdict: Verdict, tensors: list[Comparison], numbers: dict[int, int], guilty: Comparison | None) -> str:
    operations = list(dict.fromkeys(t.operation for t in tensors if t.layer is not None))
    cells = {(t.layer, t.operation): t for t in tensors}

    def cell(tensor: Comparison | None, label: str = "") -> str:
        if tensor is None:
            return "<td>"
        excess = verdict.excess(tensor)
        frame = " first" if tensor is guilty else ""
        born = " inherited" if tensor.born == Birth.INHERITED else ""
        text = tensor.problem or f"{excess:.2g}"
        shown = text if len(text) < 10 else text.split()[0].rstrip(",")[:9]
        title = f"{tensor.name}: {text}" + (f", {tensor.device.sqnr:.1f} dB" if not tensor.problem else "")
        return (
            f'<td class="c{frame}{born}" style="{paint(colour(excess))}" data-i="{numbers[id(tensor)]}" '
            f'title="{escape(title, quote=True)}">{label}{escape(shown)}'
        )

    rows = []
    before = [t for t in tensors if t.layer is None and t.tap == "model.embed_tokens"]
    after = [t for t in tensors if t.layer is None and t not in before]
    rows += [f"<tr><th>{escape(t.tap)}{cell(t)}" for t in before]
    heads = (f'<th title="{escape(name, quote=True)}">{escape(name.rpartition(".")[2]).replace("_", "_<wbr>")}'
             for name in operations)  # fmt: skip
    rows.append(f"<tr class=ops><th>layer{''.join(heads)}")
    for layer in sorted({t.layer for t in tensors if t.layer is not None}):
        rows.append(f"<tr><th>{layer}" + "".join(cell(cells.get((layer, operation))) for operation in operations))
    rows += [f"<tr><th>{escape(t.tap)}{cell(t)}" for t in after]
    return f"<table class=heat>{''.join(rows)}</table>"


def _key() -> str:
    words = ["≤1/16", "1/4", "1/2", "1", "2", "8", "64", "more"]
    return "".join(f'<span style="{paint(c)}">{w}</span>' for c, w in zip(COLOURS, words, strict=True))


def _curves(verdict: Verdict) -> str:
    """SQNR along the computation: of the reference to the float oracle, and of the device to the reference."""
    charts = []
    for run, way in dict.fromkeys((_run_of(t.graph), t.way) for t in verdict.tensors):
        tensors = [t for t in verdict.tensors if (_run_of(t.graph), t.way) == (run, way)]
        lines = []
        for name in ("cost", "device"):
            points = [(i, getattr(t, name).sqnr) for i, t in enumerate(tensors)]
            width = 900 / max(len(tensors) - 1, 1)
            drawn = " ".join(f"{40 + i * width:.0f},{_height(y):.0f}" for i, y in points if not math.isnan(y))
            lines.append(f'<polyline class="{name}" points="{drawn}"/>')
        grid = "".join(
            f'<path d="M40 {_height(y)}H940"/><text x="2" y="{_height(y) + 4}">{y} dB</text>' for y in range(0, 121, 30)
        )
        charts.append(
            f"<figure><figcaption>{escape(run)}, {escape(way)}: <b class=cost>reference to float oracle</b>, "
            "<b class=device>device to reference</b></figcaption>"
            f'<svg viewBox="0 0 950 150">{grid}{"".join(lines)}</svg></figure>'
        )
    return "".join(charts)


def _height(decibel: float) -> int:
    return round(140 - min(max(decibel, 0.0), 120.0))


def _histogram(counts: Iterable[int]) -> str:
    """How many rows need which share of what is allowed, in powers of two; heights are logarithmic."""
    counts = list(counts)
    most = math.log(max([*counts, 1]) + 1)
    bars = []
    for i, count in enumerate(counts):
        tall = 100 * math.log(count + 1) / most if most else 0
        power = i - len(counts) // 2
        colour_ = COLOURS[2] if power < 0 else COLOURS[5]
        bars.append(
            f'<rect x="{i * 40 + 4}" y="{110 - tall:.0f}" width="34" height="{tall:.0f}" fill="{colour_}">'
            f"<title>2^{power} to 2^{power + 1}: {count} rows</title></rect>"
            f'<text x="{i * 40 + 6}" y="126">2^{power}</text>'
        )
    return f'<svg class="bars" viewBox="0 0 {len(counts) * 40 + 8} 130">{"".join(bars)}</svg>'


def _worst(verdict: Verdict) -> str:
    rows = []
    for t in verdict.worst[:WORST]:
        excess = verdict.excess(t)
        measured = "–<td>–<td>–<td>–" if t.problem else (
            f"{t.device.sqnr:.1f}<td>{t.cost.sqnr:.1f}<td>{t.total.sqnr:.1f}<td>{t.device.cosine:.6f}")  # fmt: skip
        lsb = t.codes
        codes = "–<td>–" if lsb.largest is None else f"{lsb.largest:.0f}<td>{lsb.over:.1%}"
        rows.append(
            f'<tr><td style="{paint(colour(excess))}">{escape(t.problem) or f"{excess:.3g}"}<td>{escape(t.name)}'
            f"<td>{measured}<td>{codes}<td>{escape(t.born.value)}<td>{escape(str(verdict.causes.get(t.name, '')))}"
        )
    head = "excess|tensor|device, dB|cost, dB|to oracle, dB|cosine|LSB max|over 1|born|likely cause".replace(
        "|", "<th>"
    )
    more = len(verdict.tensors) - WORST
    return f"<table><tr><th>{head}</tr>{''.join(rows)}</table>" + (f"<p>and {more} more</p>" if more > 0 else "")


def _provenance(verdict: Verdict) -> str:
    limits = verdict.thresholds
    given = {"min_sqnr": limits.min_sqnr, "max_lsb": limits.max_lsb, "max_over": limits.max_over}
    rule = ", ".join(f"{key} {value}" for key, value in given.items() if value is not None)
    reasons = list(dict.fromkeys(t.needs.reason for t in verdict.tensors if t.needs.reason))
    rows = {**verdict.about, "held against": verdict.kind.text, "allowed": rule or "; ".join(reasons[:3])}
    cells = "".join(f"<tr><th>{escape(str(k))}<td>{escape(str(v))}" for k, v in rows.items() if v is not None)
    return f"<table class=about>{cells}</table>"


def _data(verdict: Verdict) -> str:
    """The data that a click shows, kept short; nothing in it can end the script."""
    rows = [
        [t.name, t.operation, t.problem, "".join(map(level, t.needs.tokens)), "".join(map(level, t.needs.heads)),
         t.position, list(t.needs.histogram), _figures(t), str(verdict.causes.get(t.name, ""))]
        for t in verdict.tensors
    ]  # fmt: skip
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _figures(t: Comparison) -> str:
    return ", ".join(_said(t))


def _said(t: Comparison) -> Iterator[str]:
    if t.problem:
        return
    yield f"device {t.device.sqnr:.1f} dB"
    yield f"cost {t.cost.sqnr:.1f} dB"
    yield f"to the oracle {t.total.sqnr:.1f} dB"
    if t.codes.largest is not None:
        yield f"up to {t.codes.largest:.0f} codes of {t.codes.bits} bits, {t.codes.over:.1%} over one"
    yield f"worst at {t.device.index}: {t.device.value:.5g}, expected {t.device.reference:.5g}"
    if t.born != Birth.UNKNOWN:
        yield {Birth.HERE: "born here"}.get(t.born, t.born.value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""  # noqa: E501

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1200px;padding:0 16px 40px;color:#1c2733}
header{margin:0 -16px;padding:10px 16px;color:#fff}header.agrees{background:#1a7f4b}header.differs{background:#a32626}
h1{margin:0;font-size:22px}h2{font-size:17px;margin:26px 0 6px}table{border-collapse:collapse}
td,th{padding:2px 7px;text-align:left;font-weight:400;border-bottom:1px solid #e4e8ec;vertical-align:top}
th{color:#52606d}.heat td.c{cursor:pointer;text-align:right;border:2px solid #fff;min-width:36px;font-size:12px}
.heat .ops th{font-size:11px;line-height:1.2;max-width:64px;vertical-align:bottom;text-align:right}
.heat th:first-child,.heat .ops th:first-child{position:sticky;left:0;background:#fff;font-size:14px;text-align:left}
.heat .ops th:first-child{max-width:none}
.heat td.first{border-color:#111;outline:2px solid #111}.heat td.inherited{opacity:.55}.map{overflow-x:auto}
nav button{border:1px solid #c5ccd3;background:#f5f7f9;padding:4px 10px;margin:0 4px 8px 0;cursor:pointer}
nav button.on{background:#1c2733;color:#fff}.key span{padding:1px 8px;margin-right:2px}
#detail{border:1px solid #c5ccd3;padding:8px 14px;margin-top:10px;background:#fbfcfd}
#detail i{display:inline-block;width:9px;height:22px;margin:1px}svg{width:100%;max-width:950px}svg.bars{max-width:660px}
svg text{font-size:10px;fill:#52606d}svg path{stroke:#e4e8ec}polyline{fill:none;stroke-width:1.6}
polyline.cost{stroke:#3465a4}polyline.device{stroke:#c22f2f}b.cost{color:#3465a4}b.device{color:#c22f2f}
figure{margin:8px 0}
"""

_SCRIPT = """
"use strict";(function(){
var rows=JSON.parse(document.getElementById("data").textContent),box=document.getElementById("detail");
var levels="LEVELS",colours=COLOURS,limits=LIMITS;
function tag(name,text){var e=document.createElement(name);e.textContent=text||"";return e}
function shade(letter){var x=Math.pow(2,(levels.indexOf(letter)-18)/2),n=0;
 limits.forEach(function(l){if(!(x<=l*1.0001))n++});return colours[n]}
function strip(what,letters,first){if(!letters)return;box.append(tag("div",what));
 letters.split("").forEach(function(l,k){
  var i=tag("i");i.style.background=shade(l);i.title=what+" "+(k+first);box.append(i)})}
document.addEventListener("click",function(event){
 var t=event.target;
 if(t.dataset.tab!==undefined){
  document.querySelectorAll(".map").forEach(function(m){m.hidden=m.id!=="tab"+t.dataset.tab});
  document.querySelectorAll("nav button").forEach(function(b){b.className=b===t?"on":""})}
 if(t.dataset.i!==undefined){
  var r=rows[+t.dataset.i];box.hidden=false;box.textContent="";
  box.append(tag("b",r[0]),tag("p",r[2]||r[7]));if(r[8])box.append(tag("p","Likely cause: "+r[8]));
  strip("token",r[3],r[5]);strip("head",r[4],0);
  if(r[6].length){var most=Math.log(Math.max.apply(null,r[6])+1)||1;
   box.append(tag("div","rows by their excess, 2^"+(-r[6].length/2)+" to 2^"+(r[6].length/2)));
   r[6].forEach(function(n,k){var i=tag("i");i.style.width="30px";i.style.height=(4+60*Math.log(n+1)/most)+"px";
    i.style.background=colours[k<r[6].length/2?2:5];i.title=n+" rows";i.style.verticalAlign="bottom";box.append(i)})}
  box.scrollIntoView({block:"nearest"})}
})})();
""".replace("LEVELS", LEVELS).replace("COLOURS", json.dumps(COLOURS)).replace("LIMITS", json.dumps(LIMITS))  # fmt: skip
