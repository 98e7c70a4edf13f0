"""The HTML that the page is made of: tables, pictures within the file, the frame and its style."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape


def document(title: str, body: str) -> str:
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself if it is too wide; the first row is the header."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def img(data: bytes, kind: str, alt: str, css: str = "") -> str:
    encoded = base64.b64encode(data).decode("ascii")
    return f"<img class='{css}' alt='{escape(alt)}' src='data:image/{kind};base64,{encoded}'>"


def figure(image: str, caption: str) -> str:
    """An image, as ``img`` gives it, with a caption in HTML."""
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


_STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 1240px; background: #fff; color: #1f2328;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-bottom: .3rem;
  border-bottom: 1px solid #d8dee4; }
h3 { font-size: .9rem; font-weight: 600; color: #59636e; margin: 1.2rem 0 .3rem; }
p, ul { max-width: 76ch; }
.gain { font-size: 1.1rem; font-weight: 600; }
.caveat { background: #fff8e1; border-left: 4px solid #e0a800; padding: .5rem .9rem; }
.note, figcaption { font-size: .85rem; color: #59636e; }
.scroll, .tiles { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; text-align: right; border-bottom: 1px solid #e5e9ed;
  white-space: nowrap; }
th { font-weight: 600; color: #59636e; border-bottom: 2px solid #c5ccd3; }
th:first-child, td:first-child { text-align: left; }
td:first-child { font-weight: 600; }
.tiles { display: grid; grid: auto / auto-flow minmax(240px, 1fr); gap: .8rem; }
figure { margin: 0 0 .6rem; }
img { display: block; width: 100%; max-width: 800px; height: auto; }
img.wide { max-width: 1180px; }
.bar { display: flex; align-items: center; gap: .6rem; font-size: .9rem; }
.bar span { width: 16rem; height: .9rem; border: 1px solid #c5ccd3;
  background: linear-gradient(to right, #440154, #3b528b, #21918c, #5ec962, #fde725); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
