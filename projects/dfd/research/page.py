"""The one page of reports, ablations and analyses: sections, as HTML or as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """An image within the page.

    Attributes:
        data: a PNG or JPEG.
        alt: what it shows, for those who cannot see it.
        name: in bold before the caption.
        file: its name in the folder of the page, for Markdown.
    """

    data: bytes
    alt: str
    caption: str = ""
    name: str = ""
    file: str = ""

    @property
    def source(self) -> str:
        kind = "png" if self.data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class Section:
    """A heading and what is below it, in this order.

    Attributes:
        leads: sentences in large type.
        caveat: a warning.
        text: paragraphs.
        tables: by caption, which may be empty; the first row is the header.
        note: how to read the tables.
        colours: what ends a bar from dark to light.
        pictures: one below the other.
        tiles: pictures side by side, by the caption of the row.
        items: of a list, name and text.
    """

    title: str
    leads: Sequence[str] = ()
    caveat: str = ""
    text: Sequence[str] = ()
    tables: Mapping[str, Rows] = field(default_factory=dict)
    note: str = ""
    colours: str = ""
    pictures: Sequence[Picture] = ()
    tiles: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    items: Mapping[str, str] = field(default_factory=dict)


def to_html(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """One page that needs no other file and no network."""
    return _PAGE.render(title=title, intro=intro, sections=sections)


def to_markdown(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """The text, tables and pictures of the same."""
    blocks = [f"# {title}", *intro]
    for section in sections:
        blocks += [f"## {section.title}", *section.text]
        for caption, rows in section.tables.items():
            blocks += [f"**{caption}**", markdown_table(rows)]
        blocks += [section.note] if section.note else []
        blocks += [f"![{picture.caption}]({picture.file})" for picture in section.pictures]
    return "\n\n".join(blocks) + "\n"


def markdown_table(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro show(picture) %}
<figure><img alt="{{ picture.alt }}" src="{{ picture.source }}">
{% if picture.caption or picture.name %}
<figcaption>{% if picture.name %}<b>{{ picture.name }}</b> {% endif %}{{ picture.caption -}}
</figcaption>
{% endif %}
</figure>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { margin: 2.5rem auto; padding: 0 1.5rem; max-width: 1240px; background: #fff; color: #1f2328;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-bottom: .3rem;
  border-bottom: 1px solid #d8dee4; }
h3 { font-size: .9rem; font-weight: 600; color: #59636e; margin: 1.2rem 0 .3rem; }
p, ul { max-width: 76ch; }
.lead { font-size: 1.1rem; font-weight: 600; }
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
img { display: block; max-width: 100%; height: auto; }
.bar { display: flex; align-items: center; gap: .6rem; font-size: .9rem; }
.bar span { width: 16rem; height: .9rem; border: 1px solid #c5ccd3;
  background: linear-gradient(to right, #440154, #3b528b, #21918c, #5ec962, #fde725); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for paragraph in intro %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for sentence in section.leads %}
<p class="lead">{{ sentence }}</p>
{% endfor %}
{% if section.caveat %}
<p class="caveat">{{ section.caveat }}</p>
{% endif %}
{% for paragraph in section.text %}
<p>{{ paragraph }}</p>
{% endfor %}
{% for caption, rows in section.tables.items() %}
{% if caption %}
<h3>{{ caption }}</h3>
{% endif %}
<div class="scroll"><table>
<thead><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endfor %}
{% if section.note %}
<p class="note">{{ section.note }}</p>
{% endif %}
{% if section.colours %}
<p class="bar">0 <span></span> {{ section.colours }}</p>
{% endif %}
{% for picture in section.pictures %}
{{ show(picture) }}
{% endfor %}
{% for caption, pictures in section.tiles.items() %}
<h3>{{ caption }}</h3>
<div class="tiles">
{% for picture in pictures %}
{{ show(picture) }}
{% endfor %}
</div>
{% endfor %}
{% if section.items %}
<ul>
{% for name, text in section.items.items() %}
<li><b>{{ name }}</b>: {{ text }}</li>
{% endfor %}
</ul>
{% endif %}
{% endfor %}
</body>
</html>
""")
