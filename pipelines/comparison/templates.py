"""Templates of the page, in HTML and in Markdown, with its looks and its sorting; see `page.context`."""

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
{{ css }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="faint">{{ lead }}</p>

{% if failures %}
<section class="failures" role="alert">
<h2>Failed</h2>
<ul>
{% for failure in failures %}
<li><b>{{ failure.title }}</b>, {{ failure.stage }}: {{ failure.reason }}
{% if failure.log %}<span class="faint">(log: {{ failure.log }})</span>{% endif %}</li>
{% endfor %}
</ul>
</section>
{% endif %}

<section>
<h2>Numbers</h2>
{% if rows %}
<p>Click a heading to sort. ↓ lower is better, ↑ higher is better, the best is <b class="best">marked</b>;
± is one standard error.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Table of numbers; it scrolls sideways">
<table id="table">
<thead>
<tr>
<th scope="col" aria-sort="none"><button type="button" data-better="lower">model</button></th>
{% for column in columns %}
<th scope="col" aria-sort="none" title="{{ column.meaning }}">
<button type="button" data-better="{{ column.better or 'lower' }}">{{ column.heading }}
<span class="unit">{{ column.unit }}</span></button></th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in rows %}
<tr>
<th scope="row" data-sort="{{ loop.index0 }}">{{ swatch(row.colour) }}{{ row.title }}</th>
{% for cell in row.cells %}
{% if cell.value is none %}
<td class="faint">{{ missing }}</td>
{% else %}
<td data-sort="{{ cell.value }}">
{%- if cell.best %}<b class="best">{{ cell.text }}</b><span class="hidden"> (best)</span>
{%- else %}{{ cell.text }}{% endif %}
{%- if cell.error %}<span class="faint"> ± {{ cell.error }}</span>{% endif %}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<details>
<summary>What the columns mean</summary>
<dl>
{% for column in columns %}
<dt>{{ column.full_label }}</dt><dd>{{ column.meaning }}</dd>
{% endfor %}
</dl>
</details>
{% else %}
<p>No model was measured.</p>
{% endif %}
</section>

{% if charts %}
<section>
<h2>Charts</h2>
<p>Point at a model in a chart, or move to it with the tab key, to see it alone.</p>
<div class="charts">
{% for chart in charts %}
<figure>
<figcaption><h3>{{ chart.heading }}</h3>{{ chart.caption }}</figcaption>
{{ chart.svg | safe }}
</figure>
{% endfor %}
</div>
</section>
{% endif %}

{% if cards %}
<section>
<h2>Reconstructions and samples</h2>
<p>The same held-out images for all models, each above its reconstruction; samples at temperature 1. Both show means of
p(x | codes).</p>
<div class="cards">
{% for card in cards %}
<article>
<h3>{{ swatch(card.colour) }}{{ card.title }}</h3>
{% for picture in card.pictures %}
<figure>
<figcaption>{{ picture.kind }}</figcaption>
<img src="{{ picture.data }}" alt="{{ picture.alt }}" width="{{ picture.width }}" height="{{ picture.height }}">
</figure>
{% endfor %}
{% if card.recipe %}
<details>
<summary>recipe</summary>
<pre class="scroll" tabindex="0"><code>{{ card.recipe }}</code></pre>
</details>
{% endif %}
</article>
{% endfor %}
</div>
</section>
{% endif %}

<section>
<h2>How it was measured</h2>
<pre class="scroll" tabindex="0"><code>{{ command }}</code></pre>
<div class="groups">
{% for group in protocol %}
<div>
<h3>{{ group.name }}</h3>
<dl>
{% for name, value in group.fields %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
</div>
{% endfor %}
</div>
{% if not_measured %}
<h3>Not measured</h3>
<ul>
{% for item in not_measured %}
<li><b>{{ item.what }}</b>: {{ item.why }} <span class="faint">({{ item.models }})</span></li>
{% endfor %}
</ul>
{% endif %}
</section>
</main>
<script>
{{ script | safe }}</script>
</body>
</html>
"""

MARKDOWN = """\
# {{ title | md }}

{{ lead | md }}

{% if failures %}
## Failed

{% for failure in failures %}
- **{{ failure.title | md }}**, {{ failure.stage }}: {{ failure.reason | md }}
{%- if failure.log %} (log: {{ failure.log | md }}){% endif %}

{% endfor %}

{% endif %}
## Numbers

{% if rows %}
↓ lower is better, ↑ higher is better, the best is bold; ± is one standard error.

| model |{% for column in columns %} {{ (column.full_label ~ ' ' ~ column.arrow) | md }} |{% endfor %}

|---|{{ "---:|" * columns | length }}
{% for row in rows %}
| {{ row.title | md }} |{% for cell in row.cells %} {{ cell | md_cell }} |{% endfor %}

{% endfor %}
{% else %}
No model was measured.
{% endif %}

{% if charts %}
## Charts

{% for chart in charts %}
### {{ chart.heading | md }}

{{ chart.caption | md }}

![{{ chart.heading | md }}]({{ folder }}/{{ chart.name }}.svg)

{% endfor %}
{% endif %}
{% if cards %}
## Reconstructions and samples

The same held-out images for all models, each above its reconstruction; samples at temperature 1. Both show means of
p(x \\| codes).

| model | pictures |
|---|---|
{% for card in cards %}
| {{ card.title | md }} |{% for picture in card.pictures %} ![{{ picture.alt | md }}]({{ folder }}/{{ picture.file }})
{%- endfor %} |
{% endfor %}

{% endif %}
## How it was measured

```bash
{{ command }}
```

{% for group in protocol %}
**{{ group.name | md }}**

{% for name, value in group.fields %}
- {{ name | md }}: {{ value | md }}
{% endfor %}

{% endfor %}
{% if not_measured %}
**not measured**

{% for item in not_measured %}
- {{ item.what | md }}: {{ item.why | md }} ({{ item.models | md }})
{% endfor %}
{% endif %}
"""

CSS = """\
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p, dd, li { max-width: 75ch; overflow-wrap: anywhere; }
.faint { color: var(--faint); font-weight: 400; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.failures { border-left: 4px solid var(--s3); padding: .1rem 1rem; margin: 1.5rem 0; }
.failures h2 { margin-top: .5rem; }
.scroll { overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; position: relative; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
tbody th, thead th:first-child {
  text-align: left; position: sticky; left: 0; background: var(--paper); z-index: 1;
  border-right: 1px solid var(--line);
}
thead th { padding: 0; vertical-align: bottom; border-bottom: 2px solid var(--line); }
th button {
  all: unset; display: block; box-sizing: border-box; width: 100%; padding: .5rem .7rem;
  cursor: pointer; font-weight: 600; text-align: inherit; white-space: normal;
}
th button:hover { text-decoration: underline; }
:is(th button, .scroll, summary):focus-visible { outline: 2px solid var(--s0); outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: "▲"; font-size: .7em; }
th[aria-sort=descending] button::after { content: "▼"; font-size: .7em; }
.unit { display: block; font-weight: 400; color: var(--faint); font-size: .8rem; min-height: 1.5em; }
.best { font-weight: 700; color: var(--s2); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .5em; }
tbody th { font-weight: 600; padding-left: 1.7rem; }
tbody th .swatch { position: absolute; left: .7rem; top: .8em; margin: 0; }
details { margin-top: .75rem; }
summary { cursor: pointer; }
.groups { columns: 26rem; column-gap: 2.5rem; }
.groups > div { break-inside: avoid; padding-bottom: 1.25rem; }
dl {
  display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: .15rem 1rem; margin: .25rem 0 0;
  font-size: .875rem;
}
dt { color: var(--faint); overflow-wrap: anywhere; }
dd { margin: 0; }
pre { padding: .75rem 1rem; font-size: .8rem; margin: .5rem 0 1.5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1.75rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; color: var(--faint); margin-bottom: .25rem; }
figcaption h3 { color: var(--ink); }
svg.chart { display: block; width: 100%; max-width: 640px; height: auto; }
article img {
  display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; margin-bottom: .5rem;
}
@media (max-width: 600px) {
  th, td { padding: .35rem .5rem; }
  tbody th { padding-left: 1.4rem; white-space: normal; min-width: 6.5rem; max-width: 9rem; }
  tbody th .swatch { left: .4rem; }
  .groups { columns: auto; }
  dl { grid-template-columns: 6.5rem 1fr; }
}
"""

# Rows without a value stay below, whichever way the others are sorted; equal ones keep their order.
SCRIPT = """\
"use strict";
const table = document.getElementById("table");
if (table) {
  const body = table.tBodies[0];
  const heads = Array.from(table.tHead.rows[0].cells);
  const valueOf = (row, column) => {
    const text = row.cells[column].dataset.sort;
    return text === undefined ? null : Number(text);
  };
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const first = button.dataset.better === "higher" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      heads.forEach((one) => one.setAttribute("aria-sort", one === head ? order : "none"));
      const rows = Array.from(body.rows);
      rows.sort((a, b) => {
        const [x, y] = [valueOf(a, column), valueOf(b, column)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (x - y);
      });
      body.append(...rows);
    });
  });
}
"""
