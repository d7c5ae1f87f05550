"""The style sheet of the report. No fonts, scripts or pictures are fetched; light or dark as the reader's system."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #17191c; --soft: #626a75; --rule: #e3e6ea; --band: #f1f3f6;
  --accent: #2563eb; --good: #15803d; --bad: #c2272d; --good-bg: #e7f6ec; --bad-bg: #fdecec;
  --c1: #2563eb; --c2: #d97706; --c3: #0d9488; --c4: #9333ea; --c5: #db2777; --c6: #64748b;
  --heat: #2563eb; --heat-ink: #ffffff; --bubble: #e8effd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1114; --card: #181b20; --ink: #e8eaed; --soft: #9aa3af; --rule: #2a2f37; --band: #1e2228;
    --accent: #7aa7ff; --good: #5fd38a; --bad: #ff8a8a; --good-bg: #16301f; --bad-bg: #3a1b1d;
    --c1: #6ea0ff; --c2: #f5a94a; --c3: #3fc9bb; --c4: #c08bff; --c5: #f47fb7; --c6: #94a3b8;
    --heat: #3f74e0; --heat-ink: #ffffff; --bubble: #22304d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "PingFang SC",
    "Hiragino Sans GB", "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 19px; margin: 44px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0 0 10px; }
p.lead { color: var(--soft); margin: 0 0 14px; max-width: 74ch; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 18px 20px; }
.card { margin: 12px 0; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 16px; }
.tile b { display: block; font-size: 26px; white-space: nowrap; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: 13px; }
.tile span.name { color: var(--ink); font-weight: 600; }
svg { display: block; width: 100%; min-width: 640px; height: auto; }
svg text { font-size: 12px; fill: var(--soft); }
svg text.band-name, svg text.legend, svg text.value { fill: var(--ink); }
svg text.band-name { font-weight: 600; font-size: 11.5px; }
svg text.value { font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .band0 { fill: var(--band); } svg .band1 { fill: transparent; }
svg .raw { fill: none; stroke-width: 1; opacity: 0.3; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
svg .chance { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 6 5; }
svg text.chance-name { fill: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 3px; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); padding: 4px 8px; font-size: 13px;
  vertical-align: bottom; }
td { padding: 6px 10px; white-space: nowrap; border-radius: 6px; }
td.number, th.number { text-align: right; } td.heat { text-align: center; min-width: 64px; }
th.number { white-space: nowrap; } th.heat { text-align: center; width: 14%; }
tr.group th { padding-top: 14px; color: var(--ink); }
table.plain { border-collapse: collapse; }
table.plain td, table.plain th { border-bottom: 1px solid var(--rule); border-radius: 0; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 12px; margin: 12px 0; }
.samples .card { margin: 0; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)); gap: 6px; margin: 0 0 12px; }
.frames figure { margin: 0; }
.frames img { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px; background: #000; object-fit: contain; }
.frames figcaption { text-align: center; font-size: 11px; color: var(--soft); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.tags { display: flex; gap: 6px; flex-wrap: wrap; margin: 0 0 8px; font-size: 12px; }
.tag { border: 1px solid var(--rule); border-radius: 99px; padding: 1px 9px; color: var(--soft); }
.tag.good { color: var(--good); background: var(--good-bg); border-color: transparent; font-weight: 600; }
.tag.bad { color: var(--bad); background: var(--bad-bg); border-color: transparent; font-weight: 600; }
.question { font-weight: 600; margin: 0 0 6px; white-space: pre-line; }
ul.options { list-style: none; margin: 0 0 8px; padding: 0; display: grid; grid-template-columns: 1fr 1fr;
  gap: 4px; font-size: 14px; }
ul.options li { padding: 3px 8px; border-radius: 6px; border: 1px solid var(--rule); }
ul.options li.good { background: var(--good-bg); border-color: transparent; color: var(--good); font-weight: 600; }
ul.options li.bad { background: var(--bad-bg); border-color: transparent; color: var(--bad); font-weight: 600; }
.verdict { font-size: 13px; color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.verdict b { color: var(--ink); }
.chat { display: flex; flex-direction: column; gap: 6px; }
.turn { max-width: 80%; padding: 7px 12px; border-radius: 14px; white-space: pre-line; overflow-wrap: anywhere; }
.turn.user { align-self: flex-end; background: var(--bubble); border-bottom-right-radius: 4px; }
.turn.model { align-self: flex-start; background: var(--band); border-bottom-left-radius: 4px; }
pre { background: var(--band); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 13px;
  margin: 10px 0 0;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { color: var(--soft); font-size: 13px; margin-top: 40px; }
@media print { main { max-width: none; padding: 0; } .card, .tile { break-inside: avoid; } }
"""
