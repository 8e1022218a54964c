"""How Sphinx builds these pages."""

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from dsv3.recipe.load import fields_of, section_in
from dsv3.recipe.schema import Recipe
from dsv3.recipe.section import Section

project = "dsv3"
author = "the dsv3 contributors"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "results"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "dsv3"


def key_list(section: type[Section], prefix: str) -> list[nodes.Node]:
    """Every key of a section with its default and its documentation, sections in sections included."""
    listed: list[nodes.Node] = []
    for name, field in fields_of(section).items():
        inner = section_in(field.annotation)
        if inner is not None and not isinstance(field.default, float | int):
            listed += key_list(inner, f"{prefix}{name}.") if prefix != "model." else []
            continue
        if not field.description:
            continue
        item = nodes.definition_list_item()
        term = nodes.term("", "", nodes.literal(text=prefix + name))
        if not field.is_required():
            term += [nodes.Text(" = "), nodes.literal(text=repr(field.default))]
        item += [term, nodes.definition("", nodes.paragraph(text=" ".join(field.description.split())))]
        listed.append(item)
    return listed


class RecipeKeys(Directive):
    """`recipe-keys`: the keys of a recipe, from the sections themselves."""

    def run(self) -> list[nodes.Node]:
        """One definition list."""
        return [nodes.definition_list("", *key_list(Recipe, ""))]


def setup(app: Sphinx) -> None:
    """Makes the directive known."""
    app.add_directive("recipe-keys", RecipeKeys)
