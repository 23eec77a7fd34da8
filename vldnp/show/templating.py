"""HTML and SVG from the files in `templates/`; whatever is filled in is escaped."""

from functools import cache

import jinja2
from markupsafe import Markup


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vldnp.show"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def filled(template: str, /, **values) -> Markup:
    """A template of `templates/` with its values; a `Markup` among them stays as it is."""
    return Markup(_environment().get_template(template).render(**values))


def text_of(asset: str) -> str:
    """A stylesheet or script as it lies in `templates/`."""
    return _environment().loader.get_source(_environment(), asset)[0]
