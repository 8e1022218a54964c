"""How Sphinx builds these pages."""

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from dsv3.recipe.load import fields_of, section_in
from dsv3.recipe.schema import Recipe
from dsv3.recipe.section import Section
from dsv3.recipe.segment import Segment

project = "dsv3"
author = "the dsv3 contributors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "results"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "dsv3"
html_show_copyright = False


def key_list(section: type[Section], prefix: str) -> list[nodes.Node]:
    """Every key of a section with its default and its documentation, sections in sections included."""
    listed: list[nodes.Node] = []
    for name, field in fields_of(section).items():
        inner = section_in(field.annotation)
        if inner is not None and inner is not Segment and prefix != "model.":
            listed += key_list(inner, f"{prefix}{name}.")
        elif field.description:
            term = nodes.term("", "", nodes.literal(text=prefix + name))
            if not field.is_required():
                term += [nodes.Text(" = "), nodes.literal(text=repr(field.default))]
            listed.append(nodes.definition_list_item("", term, nodes.definition("", paragraph(field.description))))
    return listed


def paragraph(text: str) -> nodes.paragraph:
    """A docstring, with what is between backticks as code."""
    parts = " ".join(text.split()).split("`")
    return nodes.paragraph("", "", *(nodes.literal(text=p) if i % 2 else nodes.Text(p) for i, p in enumerate(parts)))


class RecipeKeys(Directive):
    """`{recipe-keys}`: the keys of a recipe, or of a segment with `{recipe-keys} segment`, from the classes themselves."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """One definition list."""
        return [nodes.definition_list("", *key_list(Segment if self.arguments else Recipe, ""))]


def setup(app: Sphinx) -> None:
    """Makes the directive known."""
    app.add_directive("recipe-keys", RecipeKeys)
