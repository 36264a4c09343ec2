"""The project's real source in the book: the directive `source`, and a page for every file.

    ```{source} minidiff/ddpm.py DDPM.q_sample
    ```

shows that function as it stands in the file today, with a link to its line. Ordinary links to
Python files, such as [ddpm.py](../minidiff/ddpm.py), lead to the same pages.
"""

import html
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from quoted import ROOT, source
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx

FOLDERS = ("minidiff", "tests", "experiments")


def address(file: str, line: int | None = None) -> str:
    """The page of a file, from the top of the site."""
    return f"source/{file.removesuffix('.py')}.html" + (f"#L{line}" if line else "")


class SourceDirective(Directive):
    """`source FILE [NAME]`: real lines, and above them where they stand."""

    required_arguments, optional_arguments = 1, 1

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        file, name = self.arguments[0], (self.arguments[1:] or [None])[0]
        env.note_dependency(str(ROOT / file))
        text, line = source(file, name)
        up = "../" * env.docname.count("/")
        label = f"{file}, line {line}" + (f": {name}" if name else "")
        link = nodes.reference("", label, refuri=up + address(file, line if name else None))
        caption = nodes.paragraph("", "", link, classes=["source-caption"])
        block = nodes.literal_block(text, text, language="python", classes=["source"])
        return [caption, block]


def source_link(name, rawtext, text, lineno, inliner, options=None, content=None):
    """`{src}`FILE LINE LABEL``: a link to a line of a file."""
    file, line, label = text.split(maxsplit=2)
    up = "../" * inliner.document.settings.env.docname.count("/")
    shown = f"{file.rpartition('/')[2]}: {label}"
    return [nodes.reference(rawtext, shown, refuri=up + address(file, int(line)))], []


def link_to_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Links to Python files lead to their pages, not to a download."""
    for node in list(doctree.findall(download_reference)):
        target = (Path(app.srcdir) / Path(app.env.docname).parent / node["reftarget"]).resolve()
        if target.suffix != ".py" or not target.is_relative_to(ROOT):
            continue
        uri = "../" * app.env.docname.count("/") + address(str(target.relative_to(ROOT)))
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri))


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """A page for every source file, each line with an anchor #L<number>."""
    if app.builder.format != "html":
        return
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        form = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
        body = highlight(path.read_text(encoding="utf-8"), PythonLexer(), form)
        body = body.replace('id="L-', 'id="L').replace('name="L-', 'name="L')
        body = body.replace('href="#L-', 'href="#L')
        title = html.escape(file)
        context = {"title": title, "body": f"<h1><code>{title}</code></h1>{body}"}
        yield address(file).removesuffix(".html"), context, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("source", SourceDirective)
    app.add_role("src", source_link)
    app.connect("doctree-read", link_to_pages)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
