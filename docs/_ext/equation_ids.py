"""Formulas are numbered by their ids: (ddpm-4) is equation 4 of DDPM, in every chapter."""

from sphinx.application import Sphinx
from sphinx.domains.math import MathDomain


class IdMath(MathDomain):
    """Sphinx's domain of formulas, with the label in the number's place."""

    def get_equation_number_for(self, labelid: str) -> str | None:
        return labelid if labelid in self.equations else None

    def note_equation(self, docname: str, labelid: str, location=None) -> None:
        super().note_equation(docname, labelid, location)
        self.equations[labelid] = (docname, labelid)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_domain(IdMath, override=True)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
