"""How the page looks: on a phone as on a desk, light or dark as the reader prefers."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #5c5c5c; --rule: #d8d8d8; --box: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --soft: #a8adb5; --rule: #3a3f47; --box: #21252b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
.verdict { background: var(--box); border-left: .3rem solid #0072B2; padding: .75rem 1rem; }
.verdict p { margin: .5rem 0; }
.verdict .headline { font-weight: 600; margin-bottom: 0; }
.verdict .headline:first-of-type { font-size: 1.15rem; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .35rem 0 1.25rem; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; white-space: normal; max-width: 14rem; overflow-wrap: break-word; }
tr > th:first-child { position: sticky; left: 0; background: var(--paper); }
thead th { vertical-align: bottom; white-space: normal; text-align: center; }
.maps { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.maps figure { max-width: 100%; }
.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.heat td { text-align: center; border: 1px solid var(--paper); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
figure > svg { width: 100%; max-width: 30rem; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; stroke: none; }
svg path { stroke-width: 1; }
svg .grid { stroke: var(--rule); }
svg .tick { stroke: currentColor; }
svg .clean { stroke-dasharray: 5 4; fill: none; }
svg .band { stroke: none; fill-opacity: .18; }
svg .line { fill: none; stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; margin: .25rem 0; }
.legend li { font-size: .85rem; display: flex; align-items: center; gap: .35rem; min-width: 0; }
.legend svg { flex: none; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 30rem) {
  th, td { padding: .25rem .35rem; }
  th:first-child { max-width: 7.5rem; }
}
@media print { details > * { display: block; } .verdict { border: 1px solid; } }
"""
