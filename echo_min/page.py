"""index.html of a run or an evaluation: one page that needs no other file, to look at rather than to read.

It shows points: {arm, step, task, own, reward, stop} and in training `expert`; own and expert are episodes,
[[text, role, nats], ...]. What a terminal wrote goes in as JSON and is only ever shown as text.
"""

import hashlib
import json
from base64 import b64encode
from math import isfinite, isnan
from pathlib import Path

from echo_min import report
from echo_min.masking import Role

STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #24292f; background: #fbfaf8 }
body { max-width: 85rem; margin: 0 auto; padding: 1.5rem } p { max-width: 85ch; margin: .5rem 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem } h3 { font-size: 1rem; margin: 0 }
div { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
article, svg { background: white; border: solid #e5e2dc; border-width: 3px 1px 1px; padding: .7rem .9rem }
pre { font: 13px/1.65 ui-monospace, monospace; white-space: pre-wrap; margin: .6rem 0 1rem }
pre span { border-radius: 2px; transition: background-color .4s, color .4s; overflow-wrap: anywhere }
.action { color: #0b5cad; font-weight: 600 } .warning { color: #7a5200; background: #fdf0cf }
.scaffold, small { color: #8a9098 } .step { stroke: #24292f; stroke-dasharray: 2 3 } line { stroke: #ece9e4 }
nav { position: sticky; top: 0; display: flex; gap: 1rem; padding: .8rem 0; background: #fbfaf8 }
input { flex: 1; max-width: 40rem; accent-color: #24292f } text { font-size: 13px; fill: #4b5563 }
"""
SCRIPT = r"""
const { title, colours, evaluations, points, roles } = JSON.parse(document.querySelector('script').text)
const [heading, intro, legend, charts, nav, main] = document.body.children
const steps = [...new Set(points.map(point => point.step))].sort((a, b) => a - b), last = steps.at(-1)
const written = token => roles[token[1]] === 'observation', training = 'expert' in points[0], redraw = []
function add(parent, name, attributes = {}, text = '') {
  const namespace = name === 'svg' ? 'http://www.w3.org/2000/svg' : parent.namespaceURI
  const element = parent.appendChild(document.createElementNS(namespace, name))
  for (const key in attributes) element.setAttribute(key, attributes[key])
  element.textContent = text
  return element
}
function write(pre, tokens) {  // into the spans that are there, so that a change of shade is seen
  tokens.forEach((token, i) => {
    const [text, role, nats] = token, span = pre.children[i] ?? add(pre, 'span'), shade = Math.min(5, nats)
    span.className = roles[role]
    span.textContent = written(token) ? text.replaceAll('\n', '⏎\n') : text
    span.title = written(token) ? `${nats.toFixed(2)} nats` : roles[role]
    span.style.backgroundColor = written(token) ? `rgba(200, 30, 45, ${0.06 + 0.16 * shade})` : ''
    span.style.color = written(token) && shade > 3 ? 'white' : ''
  })
  while (pre.children.length > tokens.length) pre.lastChild.remove()
}
function chart(name, kinds) {  // kinds: [key of an evaluation, its name, dashes]
  const svg = add(charts, 'svg', { viewBox: '0 0 560 270' }), lines = Object.keys(colours).flatMap(arm =>
    kinds.map(kind => [arm, ...kind, evaluations.filter(e => e.arm === arm && kind[0] in e)]))
  const top = Math.max(1, ...lines.flatMap(([, key, , , on]) => on.map(e => Math.ceil(2 * e[key]) / 2)))
  const x = step => 40 + 505 * step / Math.max(1, last), y = value => 225 - 160 * value / top
  const text = (x, y, anchor, text) => add(svg, 'text', { x, y, 'text-anchor': anchor }, text)
  text(0, 14, 'start', name), text(292, 267, 'middle', 'step')
  for (const value of [0, top / 2, top]) {
    add(svg, 'line', { x1: 40, x2: 545, y1: y(value), y2: y(value) }), text(32, y(value) + 4, 'end', value)
  }
  steps.forEach((step, i) => i % Math.ceil(steps.length / 8) || text(x(step), 245, 'middle', step))
  const now = add(svg, 'line', { class: 'step', y1: 65, y2: 225 })
  redraw.push(step => ['x1', 'x2'].forEach(end => now.setAttribute(end, x(step))))
  lines.forEach(([arm, key, label, dashes, found], i) => {
    const pen = { stroke: colours[arm], fill: 'none', 'stroke-width': 2, 'stroke-dasharray': dashes }
    add(svg, 'path', { d: `M${130 * i},40h22`, ...pen }), text(130 * i + 28, 44, 'start', arm + label)
    add(svg, 'polyline', { points: found.map(e => [x(e.step), y(e[key])]).join(' '), ...pen })
    for (const e of found) add(svg, 'circle', { cx: x(e.step), cy: y(e[key]), r: 3, fill: colours[arm] })
  })
}
function columns(kind, name, policies) {  // policies: [name, colour, step -> point]
  add(main, 'h2', {}, name)
  const row = add(main, 'div')
  for (const [policy, colour, find] of policies) {
    const column = add(row, 'article')
    const [head, facts, pre] = ['h3', 'small', 'pre'].map(name => add(column, name))
    column.style.borderTopColor = colour
    redraw.push(step => {
      const point = find(step), read = point[kind].filter(written)
      const mean = read.reduce((sum, token) => sum + token[2], 0) / Math.max(1, read.length)
      head.textContent = training && policy !== 'base' ? `${policy}, step ${point.step}` : policy
      const ended = kind === 'own' ? `reward ${point.reward ?? 'none'}, ${point.stop}, ` : ''
      facts.textContent = `${ended}surprise ${mean.toFixed(2)} nats a token`
      write(pre, point[kind])
    })
  }
}
heading.textContent = document.title = title
intro.textContent = 'Blue: what a policy typed. Red: what the terminal wrote, darker where the policy was '
  + 'surprised, that is, where it thought that text unlikely; point at a token for its surprise in nats. '
  + (training ? 'Move the slider through training: as a policy learns to foresee it, its red fades.' : '')
write(legend, [['task  ', 0], ['policy', 1], ['  ', 0], ['warning', 3], ['  frame', 4],
  ['  terminal, surprise in nats: ', 0], ...[0, 1, 2, 3, 4, 5].map(nats => [` ${nats} `, 2, nats])])
const control = add(nav, training ? 'input' : 'select'), output = add(nav, 'output')
const policies = Object.entries(colours).map(([arm, colour]) => {
  const mine = points.filter(point => point.arm === arm)
  return [arm, colour, step => mine.findLast(point => point.step <= step) ?? mine[0]]
})
if (training) {
  Object.assign(control, { type: 'range', max: steps.length - 1 })
  chart('pass rate, held-out', [['pass_rate', ', sampled', ''], ['pass_rate_greedy', ', greedy', '6 4']])
  chart("observation CE on the expert's episodes, nats a token", [['expert_ce', '', '']])
  if (points[0].step === 0) policies.unshift(['base', '#a8a88c', () => points[0]])
  columns('expert', "The expert's episode of a held-out task, as each policy reads it", policies)
} else points.forEach((p, i) => add(control, 'option', { value: i }, `${p.task}, trial ${p.member}`))
columns('own', training ? 'What each policy does in that task itself (greedy)' : 'What it did', policies)
control.oninput = () => {
  output.textContent = training ? `step ${steps[control.value]} of ${last}` : ''
  redraw.forEach(draw => draw(steps[control.value]))
}
const named = steps.indexOf(parseInt(location.hash.slice('#step='.length)))
control.value = named >= 0 ? named : training ? steps.length - 1 : 0
control.oninput()
"""


def point(episode, tokens: list[report.Token], **more) -> dict:
    """Of an episode that a policy played. more: what else the point holds."""
    task, reward = report.printable(episode.task.name), None if isnan(episode.reward) else episode.reward
    return {"task": task, "own": tokens, "reward": reward, "stop": str(episode.stop), **more}


@report.first_alone
def add(folder: Path, arm: str, step: int, point: dict) -> None:
    """One evaluation more: a line of page.jsonl, and index.html anew."""
    report.log(folder / "page.jsonl", {"arm": arm, "step": step, **point})
    points, records = report.read(folder / "page.jsonl"), report.read(folder / "metrics.jsonl")
    write(folder / "index.html", folder.name, points, records)


def write(path: Path, title: str, points: list[dict], records: list[dict] = ()) -> None:
    """The page, whole or not at all. records: of metrics.jsonl, for the curves. Raises OSError."""
    data = {"title": report.printable(title), "points": points, "roles": [r.name.lower() for r in Role]}
    data["colours"] = {p["arm"]: report.COLOURS.get(p["arm"], "#24292f") for p in points}
    examined = [r for r in records if "expert_ce" in r]  # which is nan where no expert plays
    data["evaluations"] = [{k: v for k, v in r.items() if k == "arm" or isfinite(v)} for r in examined]
    inside = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no tag begins or ends in it
    script, style = (b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in (SCRIPT, STYLE))
    allowed = f"default-src 'none'; base-uri 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    new = path.with_suffix(".tmp")
    new.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>echo_min</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}"><style>{STYLE}</style>'
        "<body><h1></h1><p></p><pre></pre><div></div><nav></nav><main></main>"
        f'<script type="application/json" id="data">{inside}</script><script>{SCRIPT}</script>',
        encoding="utf-8",
    )
    new.replace(path)
