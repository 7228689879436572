"""The style and the script of the report's page, and its frame. Nothing in it is loaded from anywhere."""

from html import escape

from diffjax.evaluation import plots

STYLE = (
    plots.STYLE
    + """
:root{color-scheme:light dark;--page:#f6f7fa;--card:#fff;--line:#e1e5ee;--accent:#3b6fd4;--well:#eef1f7}
@media(prefers-color-scheme:dark){:root{--page:#0f1218;--card:#171b24;--line:#282e3b;
--accent:#7aa5ff;--well:#10141c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:40px;padding-bottom:8px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 4px;letter-spacing:-.01em}
h3{font-size:14px;margin:18px 0 6px}
p{margin:0 0 12px}.soft{color:var(--soft)}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:22px 24px;
margin:18px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:12px;margin:18px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 18px}
.card b{display:block;font-size:23px;white-space:nowrap;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.card small{color:var(--soft)}.card span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:22px;
margin-top:18px}
.chart{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;width:100%}
.scroll+.scroll{margin-top:20px}
th,td{padding:7px 12px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--soft);font-weight:600}tr:last-child td{border-bottom:0}
tbody tr:hover td{background:var(--well)}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}td:nth-child(2){font-weight:600}
img{image-rendering:pixelated;max-width:100%}
.compare{display:grid;grid-template-columns:minmax(240px,420px) 1fr;gap:24px;align-items:start}
@media(max-width:760px){.compare{grid-template-columns:1fr}}
.stack{position:relative;aspect-ratio:1;border-radius:10px;overflow:hidden;background:var(--well);
border:1px solid var(--line)}
.stack img{position:absolute;inset:0;width:100%;height:100%;display:block}
.stack .over{clip-path:inset(0 calc(100% - var(--cut,50%)) 0 0)}
.stack i{position:absolute;top:0;bottom:0;left:var(--cut,50%);width:2px;margin-left:-1px;
background:var(--accent)}
.stack span{position:absolute;top:8px;padding:1px 8px;border-radius:99px;background:#000a;
color:#fff;font-size:12px}
.stack .l{left:8px}.stack .r{right:8px}
input[type=range]{width:100%;accent-color:var(--accent);margin:10px 0 4px}
.pick{display:flex;gap:14px;flex-wrap:wrap;margin:4px 0 12px}
select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);
border-radius:8px;padding:3px 8px}
.thumbs{display:grid;grid-template-columns:repeat(auto-fill,minmax(84px,1fr));gap:8px}
.thumbs button{padding:0;border:2px solid transparent;border-radius:8px;overflow:hidden;
background:none;cursor:pointer;line-height:0}
.thumbs button[aria-pressed=true]{border-color:var(--accent)}.thumbs img{width:100%}
.caption{font-size:16px;font-weight:600;overflow-wrap:anywhere;min-height:1.5em}
.over-time img{border-radius:8px;background:#fff;max-height:420px}
details summary{cursor:pointer;font-weight:600}
pre{overflow:auto;background:var(--well);border-radius:10px;padding:14px;font-size:12.5px;
line-height:1.45;max-height:520px}
footer{color:var(--soft);text-align:center;padding:8px 0 36px;font-size:13px}
"""
)

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
for (const box of document.querySelectorAll(".compare")) {
  const sets = data.comparisons[box.dataset.set];
  const get = name => box.querySelector("." + name);
  const stack = get("stack"), sides = [get("left"), get("right")];
  let now = 0;
  const show = () => {
    const item = sets.items[now];
    sides.forEach((side, i) => {
      stack.querySelectorAll("img")[1 - i].src = item.images[side.value];  // [1] lies on top
      stack.querySelectorAll("span")[1 - i].textContent = sets.names[side.value];
    });
    get("caption").textContent = item.caption;
    box.querySelectorAll(".thumbs button").forEach((b, i) => b.setAttribute("aria-pressed", i === now));
  };
  sides.forEach((side, i) => {
    sets.names.forEach((name, j) => side.add(new Option(name, j)));
    side.value = i ? sets.right : sets.left;
    side.onchange = show;
  });
  sets.items.forEach((item, i) => {
    const button = document.createElement("button"), picture = document.createElement("img");
    picture.src = item.images[sets.right];
    picture.alt = button.title = item.caption;
    button.append(picture);
    button.onclick = () => { now = i; show(); };
    get("thumbs").append(button);
  });
  const range = get("cut");
  range.oninput = () => stack.style.setProperty("--cut", range.value + "%");
  show();
}
for (const box of document.querySelectorAll(".over-time")) {
  const frames = data.previews[box.dataset.set], range = box.querySelector("input");
  const show = () => {
    box.querySelector("img").src = frames[range.value].image;
    box.querySelector("output").textContent = "step " + frames[range.value].step.toLocaleString("en");
  };
  range.max = range.value = frames.length - 1;
  range.oninput = show;
  show();
}
document.documentElement.dataset.ready = "yes";
"""


def page(title: str, body: str, data: str) -> str:
    """A whole page.

    Args:
      title: plain text.
      body: HTML.
      data: JSON for the script.
    """
    # No text in the data can end its element; and whatever it says, nothing can be fetched.
    data = data.replace("<", "\\u003c")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}"
        f'<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script></body></html>\n'
    )
