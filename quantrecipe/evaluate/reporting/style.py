"""The style of the page: wide and narrow, light and dark, on screens and on paper."""

from __future__ import annotations

from collections.abc import Mapping

from quantrecipe.evaluate.reporting.palette import DARK, LIGHT

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header,footer{max-width:1440px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:19px;line-height:1.3;margin:0 0 6px}
h3{font-size:15px;margin:22px 0 6px;overflow-wrap:anywhere}
p{margin:6px 0 12px;max-width:76ch}
.lead,figcaption,caption,footer,.tile small{color:var(--muted)}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:14px 0 0;padding:0}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);
 outline-offset:2px}
section{background:var(--paper);border:1px solid var(--grid);border-radius:10px;
 margin:20px 0;padding:18px 20px;scroll-margin-top:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;
 margin:18px 0 0;padding:0}
.tile{background:var(--paper);border:1px solid var(--grid);border-radius:10px;padding:12px 14px;
 min-width:0}
.tile dt{color:var(--muted);font-size:13px}
.tile dd{margin:0;font-size:21px;font-weight:650;line-height:1.3;overflow-wrap:anywhere}
.tile small{display:block;font-size:13px;font-weight:400}
figure{margin:12px 0 16px}
figcaption{font-size:13.5px;max-width:92ch;margin-top:8px}
figure>.panel{margin-bottom:18px}
.panels{display:flex;flex-wrap:wrap;gap:20px 30px;align-items:flex-start}
.panel{max-width:100%;overflow-x:auto}
.panel svg{display:block;height:auto;max-width:100%}
.panel svg+svg{margin-top:24px}
svg{font-family:inherit;font-variant-numeric:tabular-nums}
svg path{fill:none}
svg .b{font-weight:650}
svg.swatch{vertical-align:-2px}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:4px 0}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--grid);
 vertical-align:top}
th{font-weight:600}
tbody th{font-weight:500;white-space:nowrap}
tbody th.long{white-space:normal;overflow-wrap:anywhere;min-width:min(25ch,60vw)}
td.w{min-width:min(20ch,70vw);max-width:72ch}
.n{text-align:right;white-space:nowrap}
code,.hash{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:12.5px}
.hash{overflow-wrap:anywhere;word-break:break-all}
pre{overflow-x:auto;background:var(--page);border:1px solid var(--grid);border-radius:6px;
 padding:10px 12px;margin:6px 0 12px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent);font-size:14px}
.notes{border-left:4px solid var(--worse);padding:4px 0 4px 14px;margin:12px 0}
.notes ul{margin:4px 0;padding-left:18px}
.better{color:var(--better)}.worse{color:var(--worse)}.equivalent{color:var(--equivalent)}
.unknown{color:var(--unknown)}
.verdict{font-weight:650;white-space:nowrap}
.beside{display:flex;flex-wrap:wrap;gap:20px 40px;align-items:flex-start}
.beside>*{min-width:0;max-width:100%}
.gallery td,.gallery th{border:0;padding:4px 10px 4px 0;vertical-align:bottom}
.gallery img{display:block;height:auto;min-width:96px;border-radius:4px;
 background:var(--plain)}
.gallery img.tiny{image-rendering:pixelated;width:112px}
footer{padding:6px 20px 32px;font-size:13px}
@media (max-width:600px){
 main,header,footer{padding-left:10px;padding-right:10px}
 section{padding:14px 12px;margin:14px 0}
 h1{font-size:22px}
 .tiles{grid-template-columns:repeat(auto-fit,minmax(140px,1fr))}
 .tile dd{font-size:18px}
 .gallery img{max-width:38vw}
}
"""

_PAPER = """
@page{margin:14mm}
@media print{
 html{color-scheme:light}
 body{background:none;font-size:9.5pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
 main,header,footer{max-width:none;padding:0}
 nav,details:not([open]){display:none}
 section{border:0;padding:0;margin:0 0 8mm;border-radius:0}
 h2,h3,section>p,figure>.panel{break-after:avoid}
 p,.panel,.tile,tr,.notes,.gallery tr{break-inside:avoid}
 .panel{overflow:visible}
 h1{font-size:18pt}
 h2{font-size:13pt}
 .tile dd{font-size:10pt}
 .tile dt,.tile small{font-size:8.5pt}
 .tiles{grid-template-columns:repeat(5,1fr)}
 .scroll{overflow:visible}
 .panels{display:block}
 .panels .panel{display:inline-block;vertical-align:top;margin:0 5mm 5mm 0}
 table{font-size:7pt}
 figure{zoom:.72}
 figcaption{font-size:12pt}
 th,td{padding-right:2mm}
 td.w{min-width:0}
 tbody th.long{min-width:13.5em}
 .gallery img{max-width:44mm}
 caption{break-after:avoid}
 thead{display:table-header-group}
 figcaption{break-before:avoid}
}
"""


def stylesheet() -> str:
    """All of it. Neither ``<`` nor ``&`` is in it, so that it is text in HTML and in XML."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    rules = [f":root{{{_variables(LIGHT)}}}", dark, _RULES.strip()]
    for tone in LIGHT:
        rules.append(
            f"svg .f-{tone}{{fill:var(--{tone})}}"
            f"svg .t-{tone}{{fill:var(--{tone})}}"
            f"svg .s-{tone}{{stroke:var(--{tone})}}"
        )
    # Shapes that are lines only, or only outlined.
    rules.append("svg rect:not([class*=f-]),svg circle:not([class*=f-]){fill:none}")
    return "\n".join([*rules, _PAPER.strip()])


def _variables(tones: Mapping[str, str]) -> str:
    return ";".join(f"--{tone}:{colour}" for tone, colour in tones.items())
