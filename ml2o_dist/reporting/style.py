"""The style sheet of a page: light and dark, from a phone's width up."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f7; --ink: #23282d; --soft: #5c656d; --grid: #d9dde1;
  --strong-0: #c8102e; --strong-1: #d9660a; --strong-2: #8e1a9c; --alert: #8a5a00; --muted-0: #3f78ad;
  --muted-1: #ad8a22; --muted-2: #459070; --muted-3: #8470a3; --muted-4: #5aa3c4; --muted-5: #8c6a55 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --ink: #e3e6e9; --soft: #a0a9b1;
  --grid: #39414a; --strong-0: #ff6577; --strong-1: #ffa14d; --strong-2: #d98bea; --alert: #f0c060; --muted-0: #6ea8e0;
  --muted-1: #dcb95c; --muted-2: #7fc7a6; --muted-3: #b8a3d6; --muted-4: #a5d8ee; --muted-5: #c7a48e } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 82rem; padding: 1.5rem clamp(.9rem, 3vw, 2.5rem) 3rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 0 0 .8rem; font-size: 1.3rem }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; overflow-wrap: anywhere }
p, ul { margin: .3rem 0 .8rem; max-width: 72ch }
ul { padding-left: 1.2rem; font-size: .9rem }
.kind { margin: 0; color: var(--soft); font-size: .9rem }
.missing, footer { color: var(--soft) }
.alert { color: var(--alert); overflow-wrap: anywhere }
section { padding: 1.6rem 0 .6rem; border-top: 1px solid var(--grid); margin-top: 1.2rem }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: 1rem }
a { color: inherit; text-underline-offset: .2em }
footer { margin-top: 2rem; font-size: .85rem; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); gap: .7rem;
  margin: 1.1rem 0 0 }
.tiles div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem }
.tiles dt { color: var(--soft); font-size: .85rem }
.tiles dd { margin: 0; overflow-wrap: anywhere; font-weight: 600; font-variant-numeric: tabular-nums }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .7rem .7rem .3rem }
.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)) }
.two h3 { margin-top: .4rem }
.wide { max-width: 36rem }
.main { outline: 2px solid var(--strong-0) }
.main figcaption { font-weight: 650 }
figcaption { font-size: .85rem; line-height: 1.35; margin-bottom: .3rem }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; max-width: none }
.keys span { overflow-wrap: anywhere }
.key { display: inline-block; overflow-wrap: anywhere }
.key::before { content: ""; display: inline-block; width: 1.5em; margin-right: .45em; vertical-align: middle;
  border-top: 3px solid var(--key, var(--ink)) }
figcaption .key { margin-left: .6em; color: var(--soft) }
figcaption .key::before { border-top-width: 2px }
.line-1::before { border-top-style: dashed }
.line-2::before { border-top-style: dotted }
.swatch { display: inline-block; width: 2.1em; height: .87em; margin-right: .5em; vertical-align: -.08em }
.bar { display: inline-block; width: min(9rem, 15vw); height: .8em; margin-right: .7em; vertical-align: -.08em }
.fine, .terms { font-size: .82rem; color: var(--soft); max-width: none }
.terms { columns: 22rem; column-gap: 2rem; margin: .3rem 0 .8rem }
.terms div { break-inside: avoid; margin-bottom: .15rem }
.terms dt { display: inline; color: var(--ink) }
.terms dt::after { content: ": " }
.terms dd { display: inline; margin: 0 }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--grid); border-radius: .5rem }
.tall { max-height: 26rem; overflow-y: auto }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap; vertical-align: top }
th { color: var(--soft); font-weight: 500 }
th:first-child, td:first-child { text-align: left }
tbody tr + tr td, thead + tbody td { border-top: 1px solid var(--grid) }
.sortable { font-size: .8rem }
.sortable th { vertical-align: bottom; white-space: normal }
.sortable th, .sortable td { padding: .33rem .42rem }
.sortable :is(th, td):first-child { position: sticky; left: 0; background: var(--page) }
.sortable .long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem }
@media (max-width: 40rem) {
  .sortable td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9.2rem }
  .sortable td:has(.swatch) { padding-left: 2.6rem; min-width: 11.2rem }
  .sortable td .swatch { position: absolute; left: .42rem; top: .6rem } }
th button { all: unset; cursor: pointer; color: inherit }
th button:hover, th[aria-sort] { color: var(--ink) }
th button:focus-visible { outline: 2px solid var(--strong-0); outline-offset: 2px; border-radius: 2px }
th[aria-sort=ascending] button::after { content: " \\25b2" }
th[aria-sort=descending] button::after { content: " \\25bc" }
.best td { font-weight: 650 }
.learned td:first-child { color: var(--strong-0) }
.words th, .words td { text-align: left }
.words td:first-child { color: var(--soft) }
.words td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 12rem }
@media (max-width: 40rem) { .words td:first-child:nth-last-child(2) { white-space: normal; overflow-wrap: anywhere } }
details { margin: .9rem 0 }
summary { cursor: pointer; margin-bottom: .5rem }
@media print { nav { display: none } details { display: block } }
"""
