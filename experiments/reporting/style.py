# ruff: noqa: E501
"""How a run's page looks, light and dark, from a telephone to a wide screen."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5a6570; --line: #dde2e7; --card: #f6f7f9; --page: #fff;
  --raw: #1f5fbf; --ema: #c2570c; --train: #76818c; --good: #1a7a45; --bad: #b02a2a; --wait: #8a6100 }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8eb; --soft: #9ba5af; --line: #363d44; --card: #20252a; --page: #16191c;
  --raw: #6ea8ff; --ema: #ff9d5c; --train: #98a3ae; --good: #5cc98d; --bad: #ff8a80; --wait: #e0b341 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.35rem; margin: 0 0 12px } h2 { font-size: 1.15rem; margin: 0 0 8px } h3 { font-size: 1rem; margin: 12px 0 4px }
section { margin-top: 22px; padding-top: 16px; border-top: 1px solid var(--line) }
p { margin: 0 0 10px; max-width: 75ch } summary { cursor: pointer; color: var(--soft); margin: 6px 0 }
.state { font-size: .8rem; font-weight: 600; padding: 2px 9px; border-radius: 10px; border: 1px solid; vertical-align: middle; color: var(--soft) }
.state.finished { color: var(--good) } .state.failed { color: var(--bad) } .state.preempted { color: var(--wait) }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px 16px; margin: 0 0 10px }
dt { color: var(--soft); font-size: .82rem } dd { margin: 0 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 14px; align-items: start }
figure { margin: 0 } .chart { background: var(--card); border-radius: 8px; padding: 10px; max-width: 560px }
.chart figcaption { font-weight: 600 } .legend { color: var(--soft); font-size: .82rem; margin: 0; min-height: 1.4em }
.legend > span { display: inline-block; margin-right: 10px } .key { display: inline-block; width: 12px; height: 3px; margin: 0 4px 3px 0;
  vertical-align: middle }
.key.raw { background: var(--raw) } .key.ema { background: var(--ema) } .key.train, .key.range { background: var(--train) }
.key.mark { background: var(--good) } .key.bar, .key.band { background: var(--raw); opacity: .5; height: 9px }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink) } svg text.soft { fill: var(--soft) }
.grid { stroke: var(--line); fill: none } .axis { stroke: var(--soft); stroke-dasharray: 4 3; fill: none } .mark { stroke: var(--good); fill: none }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round } .line.raw { stroke: var(--raw) } .line.ema { stroke: var(--ema) }
.line.train { stroke: var(--train) } .dot.raw { fill: var(--raw) } .dot.ema { fill: var(--ema) } .dot.train { fill: var(--train) }
.range { stroke: var(--train); stroke-width: 3; fill: none } .bar { fill: var(--raw) } .band { fill: var(--raw); opacity: .15 }
.cloud { stroke: var(--raw); stroke-width: 3; stroke-linecap: round; opacity: .45; fill: none }
.few { stroke-width: 5; opacity: .8 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .86rem; margin: 4px 0 12px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 9px 3px 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { color: var(--soft); font-weight: 500 }
th:first-child, .pairs :nth-child(2), .config :is(th, td), .unseen td { text-align: left } th { overflow-wrap: normal } tbody th { font-weight: 500 }
.matrix th, .matrix td { padding: 0 1px; border: 0; text-align: center }
.matrix th:first-child { text-align: left; padding-right: 8px; white-space: nowrap }
.cell { display: block; min-width: 34px; padding: 4px 2px; border-radius: 3px; background: rgb(31 95 191 / var(--s)); font-size: .78rem }
.cell.deep { color: #fff } small { color: var(--soft) }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 12px 10px }
.pictures img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--card); border-radius: 6px; image-rendering: auto }
.pictures img.tiny { image-rendering: pixelated } .pictures figcaption { font-size: .78rem; line-height: 1.3 }
.none { display: grid; place-items: center; aspect-ratio: 1; background: var(--card); color: var(--soft);
  border-radius: 6px; font-size: .78rem; margin: 0 }
.split { display: flex; max-width: 560px; border-radius: 6px; overflow: hidden; font-size: .78rem; margin: 0 0 10px; color: #fff }
.split span { padding: 3px 0; text-align: center; overflow: hidden } .wait { background: #c2570c } .work { background: #1f5fbf; flex: 1 }
code { font-size: .84rem } data { white-space: nowrap }
"""
