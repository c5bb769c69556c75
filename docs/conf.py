"""How Sphinx builds the pages in docs/ and the reference of the API: `make docs`."""

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path

from docutils import nodes, utils
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

import adamjax
from adamjax.extend import Range

DOCS = Path(__file__).parent
BASE = "https://github.com/adamjax/adamjax/blob/main/"

project = "adamjax"
release = adamjax.__version__
copyright = "the authors of adamjax"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"adamjax {release}"
html_static_path = ["_static"]
html_css_files = ["adamjax.css"]
html_show_sourcelink = False
html_copy_source = False
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
default_role = "name"
# Docstrings describe types in words, and a signature shows names and defaults.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autosummary_generate = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

MODULES = ["adamjax", *(f"adamjax.{x}" for x in ("convert", "extend", "layout", "testing"))]


def public_names():
    """What a name in backticks may refer to, as it is written and in full."""
    found = {}
    for module in (*MODULES, "adamjax.states"):
        for name in importlib.import_module(module).__all__:
            full = f"{module}.{name}"
            found[full] = full
            if module == "adamjax" or name not in adamjax.__all__:
                found[full.removeprefix("adamjax.")] = full
                if module not in ("adamjax.extend", "adamjax.testing"):
                    found.setdefault(name, full)
    del found["learning_rate"]  # in most places that is a hyperparameter
    return found


NAMES = public_names()


def reference_to(name, shown=None):
    """A link to a public name, in the type of code."""
    full = NAMES[name]
    is_module = inspect.ismodule(getattr(adamjax, full.removeprefix("adamjax."), None))
    kind = {"refdomain": "py", "reftype": "mod" if is_module else "obj", "reftarget": full}
    link = addnodes.pending_xref("", **kind, refexplicit=True, refwarn=True)
    link += nodes.literal("", shown or name, classes=["xref"])
    return link


def name_role(role, rawtext, text, lineno, inliner, options=None, content=None):
    """Backticks in docstrings: a link to a public name, or code."""
    text = utils.unescape(text, restore_backslashes=True)
    if inliner.document.settings.env.docname == "reference/extend" and f"extend.{text}" in NAMES:
        return [reference_to(f"extend.{text}", text)], []
    return [reference_to(text) if text in NAMES else nodes.literal("", text)], []


class NamesInPages(SphinxTransform):
    """Makes links of public names in the code of the pages."""

    default_priority = 210

    def apply(self, **kwargs):
        if self.env.docname.startswith("reference/"):
            return
        for code in list(self.document.findall(nodes.literal)):
            in_link = isinstance(code.parent, (nodes.reference, addnodes.pending_xref))
            in_title = isinstance(code.parent, nodes.title)
            if code.astext() in NAMES and not (in_link or in_title or self.is_theirs(code)):
                code.replace_self(reference_to(code.astext()))

    def is_theirs(self, code):
        """Whether it is a name of another library: those are in the first columns of a page."""
        cell = code.parent
        while cell is not None and not isinstance(cell, nodes.entry):
            cell = cell.parent
        return self.env.docname == "coming-from" and cell is not None and cell.parent[0] is cell


class Names(SphinxDirective):
    """Public names: a table of them, then each with its docstring.

    A line is `name`, or `name: method method` for a class whose methods are to be shown.
    """

    has_content = True
    required_arguments = 1  # the module

    def run(self):
        module = importlib.import_module(self.arguments[0])
        lines = [line.partition(":") for line in self.content if line.strip()]
        text = [f".. currentmodule:: {module.__name__}", "", ".. autosummary::", ""]
        text += [f"   {name.strip()}" for name, _, _ in lines] + [""]
        for name, _, methods in lines:
            name = name.strip()
            value = getattr(module, name)
            if inspect.isclass(value):
                text += [f".. autoclass:: {name}"]
                text += [f"   :members: {', '.join(methods.split())}"] if methods.strip() else []
            elif inspect.isfunction(value):
                text += [f".. autofunction:: {name}"]
            else:
                text += [f".. autodata:: {name}", "   :no-value:"]
            text += [""]
        node = nodes.section()
        node.document = self.state.document
        self.state.nested_parse(StringList(text, self.get_source_info()[0]), 0, node)
        return node.children


def what_values_say(app, what, name, obj, options, lines):
    """A range has its numbers in place of its class' docstring; a mapping, a list of its items."""
    if isinstance(obj, Range):
        lines[:] = [f"{obj.text[0].upper()}{obj.text[1:]}."]
    elif isinstance(obj, Mapping):
        lines += ["", *(f"- `{key}`: {text}" for key, text in obj.items())]


def as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are written for a terminal: indented code and examples get their marks."""
    new = []
    in_section = False
    for line in lines:
        stripped = line.strip()
        before = new[-1] if new else ""
        indent = len(line) - len(line.lstrip())
        if stripped and not indent:
            in_section = bool(re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", stripped))
        is_code = indent >= 4 and not in_section and not before.strip()
        if is_code and not any(x.startswith("    ") for x in new[-2:-1]):
            new += ["::", ""]
        starts_example = stripped.startswith(">>>") and before.strip()
        if starts_example and not before.strip().startswith((">>>", "...")) and not example(new):
            new.append("")
        new.append(with_asterisks(line) if not is_code else line)
    lines[:] = new


def with_asterisks(line):
    """A line in which asterisks in shapes, as in `float[n, *trailing]`, are no emphasis."""
    parts = line.split("`")
    parts[::2] = (re.sub(r"(?:(?<=, )|(?<=\[))\*(?=\w)", r"\*", part) for part in parts[::2])
    return "`".join(parts)


def example(lines):
    """Whether the last lines are those of an example."""
    for line in reversed(lines):
        if not line.strip():
            return False
        if line.strip().startswith((">>>", "...")):
            return True
    return False


def toctree(caption, pages):
    """A table of contents that shows in the sidebar only."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```", ""])


def pages_of_index(text):
    """Tables of contents for the sidebar, from the headings of index.md and their links."""
    for title, links in re.findall(r"^## (.*)\n((?:(?!^## ).*\n?)*)", text, re.M):
        yield toctree(title, re.findall(r"\]\(([\w-]+)\.md\)", links))


def section(text, title):
    """A section of a page, with its heading."""
    heading = f"## {title}\n"
    return heading + text.partition(heading)[2].partition("\n## ")[0]


def with_local_links(app, docname, source):
    """Links to pages on GitHub are links to these pages, and the front page begins as README.md."""
    text = source[0]
    if docname == "index":
        readme = DOCS.parent / "README.md"
        app.env.note_dependency(str(readme))
        introduction = readme.read_text().partition("## All names by task")[0]
        limits = section(readme.read_text(), "Where it loses")
        sidebar = [*pages_of_index(text), toctree("API reference", ["reference/index"])]
        listed = text[text.index("## Start") :].replace("## ", "### ")
        listed = listed.replace("- API reference:", "- [API reference](reference/index.rst):")
        text = "\n".join([introduction, limits, "", "## All pages", "", listed, *sidebar])
    here = "" if "/" not in docname else "../"
    text = re.sub(rf"\]\({re.escape(BASE)}README\.md#", rf"]({here}index.md#", text)
    text = re.sub(rf"\]\({re.escape(BASE)}README\.md", rf"]({here}index.md", text)
    source[0] = re.sub(rf"\]\({re.escape(BASE)}docs/([\w-]+\.md)", rf"]({here}\1", text)


def everything_is_documented(app, env):
    """Refuses a public name that is on no page of the reference."""
    modules = {f"adamjax.{x}" for x in adamjax.__all__ if inspect.ismodule(getattr(adamjax, x))}
    missing = set(NAMES.values()) - set(env.domains["py"].objects) - modules
    missing = {name for name in missing if name.rpartition(".")[2] not in adamjax.__all__}
    if missing:
        raise ValueError(f"docs/reference has no place for {sorted(missing)}")


def setup(app):
    app.add_role("name", name_role)
    app.add_directive("names", Names)
    app.add_transform(NamesInPages)
    app.connect("autodoc-process-docstring", what_values_say, priority=300)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("source-read", with_local_links)
    app.connect("env-check-consistency", everything_is_documented)
