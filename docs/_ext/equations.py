"""The equation index: each formula of the chapters with its paper, its line of code and its tests.

An equation's id is `paper-number`, such as ddpm-4. It stands once in a chapter, as the label of
the formula; in the source in a comment `# eq: ddpm-4`, on the line that computes it; and in the
tests as `@pytest.mark.equation("ddpm-4")`. The page docs/equations.md is made of these three.
"""

import ast
import re
from typing import TYPE_CHECKING, NamedTuple

from quoted import ROOT, lines_of, names_of

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAPERS = {  # an id's first part: how we call the paper, and where it is
    "ddpm": ("DDPM", "2006.11239"),
    "iddpm": ("Improved DDPM", "2102.09672"),
    "score-sde": ("Score-based SDEs", "2011.13456"),
    "efron": ("Tweedie's formula (Efron 2011)", ""),
    "flow": ("Flow matching", "2210.02747"),
    "frame": ("The frame of this book", ""),
    "vpred": ("Progressive distillation: v", "2202.00512"),
    "edm": ("EDM", "2206.00364"),
    "minsnr": ("Min-SNR weighting", "2303.09556"),
    "lin": ("Zero terminal SNR", "2305.08891"),
    "ddim": ("DDIM", "2010.02502"),
    "dpm-solver": ("DPM-Solver++", "2211.01095"),
    "cfg": ("Classifier-free guidance", "2207.12598"),
    "timestep": ("Attention is all you need: positions", "1706.03762"),
    "attention": ("Attention is all you need", "1706.03762"),
    "groupnorm": ("Group normalization", "1803.08494"),
    "resnet": ("Residual networks", "1512.03385"),
    "adagn": ("Adaptive group normalization", "2105.05233"),
    "vae": ("VAE", "1312.6114"),
    "ldm": ("Latent diffusion", "2112.10752"),
    "dit": ("DiT", "2212.09748"),
    "rope": ("RoFormer", "2104.09864"),
    "sd3": ("Stable Diffusion 3", "2403.03206"),
    "lora": ("LoRA", "2106.09685"),
    "dreambooth": ("DreamBooth", "2208.12242"),
    "textual": ("Textual inversion", "2208.01618"),
    "pd": ("Progressive distillation", "2202.00512"),
    "consistency": ("Consistency models", "2303.01469"),
    "lcm": ("Latent consistency models", "2310.04378"),
    "meanflow": ("MeanFlow", "2505.13447"),
    "imf": ("Improved MeanFlow", "2512.02012"),
    "fid": ("Fréchet inception distance", "1706.08500"),
    "kid": ("Kernel inception distance", "1801.01401"),
    "precision": ("Precision and recall", "1904.06991"),
}
FORMULA = re.compile(  # $$ formula $$ (id), on any number of lines
    r"^\$\$\s*((?:(?!\$\$).)+?)\s*\$\$ \(([\w.-]+)\)$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"#.*\beq: ([\w., -]+)$")


class Place(NamedTuple):
    """file: from the top of the repository. name: the function or class around the line."""

    file: str
    line: int
    name: str


class Equation(NamedTuple):
    """One id, and everywhere it stands."""

    id: str
    formula: str
    chapter: str
    code: list[Place]
    tests: list[Place]

    @property
    def paper(self) -> str:
        return next((p for p in PAPERS if self.id.startswith(f"{p}-")), "")

    @property
    def number(self) -> str:
        return self.id.removeprefix(f"{self.paper}-")


def formulas() -> dict[str, tuple[str, str]]:
    """id: the formula and the chapter, in the order of the book."""
    labelled: dict[str, tuple[str, str]] = {}
    for page in sorted((ROOT / "docs" / "chapters").glob("*.md")):
        for formula, label in FORMULA.findall(page.read_text(encoding="utf-8")):
            if label in labelled:
                raise ValueError(f"{page.name}: {label} is also in {labelled[label][1]}")
            labelled[label] = formula, page.stem
    return labelled


def comments() -> dict[str, list[Place]]:
    """id: the lines of the package that compute it."""
    places: dict[str, list[Place]] = {}
    for path in sorted((ROOT / "minidiff").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "eq: " not in text:
            continue
        file, tree = str(path.relative_to(ROOT)), ast.parse(text)
        for number, line in enumerate(text.splitlines(), 1):
            for label in _ids(COMMENT.search(line)):
                places.setdefault(label, []).append(Place(file, number, _around(tree, number)))
    return places


def _ids(comment: re.Match | None) -> list[str]:
    return re.split(r",\s*", comment[1].strip()) if comment else []


def _around(tree: ast.Module, line: int) -> str:
    """The dotted name of the innermost function, class or constant around a line."""
    names, scope = [], tree.body
    while inner := next(
        (n for n in scope if n.lineno <= line <= n.end_lineno and names_of(n)), None
    ):
        names += names_of(inner)[:1]
        scope = getattr(inner, "body", [])
        if not isinstance(inner, ast.ClassDef):
            break
    return ".".join(names)


def marks() -> dict[str, list[Place]]:
    """id: the tests that evaluate it."""
    places: dict[str, list[Place]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.equation" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            name, calls = _marked(node)
            for call in calls:
                place = Place(str(path.relative_to(ROOT)), node.lineno, name)
                for label in call.args:
                    places.setdefault(ast.literal_eval(label), []).extend([place, *_shared(node)])
    return places


def _marked(node: ast.AST) -> tuple[str, list[ast.Call]]:
    """A test's name and its marks: a decorated function, or test_x = pytest.mark.equation(...)(x)."""
    name, calls = getattr(node, "name", ""), getattr(node, "decorator_list", [])
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
        name, calls = ast.unparse(node.targets[0]), [node.value.func]
    calls = [call for call in calls if isinstance(call, ast.Call)]
    return name, [call for call in calls if ast.unparse(call.func) == "pytest.mark.equation"]


def _shared(test: ast.AST) -> list[Place]:
    """Where the check stands, if a test calls one that the exercises use too."""
    file = "minidiff/exercises/checks.py"
    names = re.findall(r"\bchecks\.(\w+)", ast.unparse(test))
    return [Place(file, lines_of(file, name)[0], name) for name in dict.fromkeys(names)]


def equations() -> list[Equation]:
    code, tests = comments(), marks()
    return [
        Equation(label, formula, chapter, code.get(label, []), tests.get(label, []))
        for label, (formula, chapter) in formulas().items()
    ]


def text() -> str:
    """The index, in MyST: a heading for each paper, a formula with three lines of links."""
    lines = []
    every = equations()
    for paper, (name, arxiv) in PAPERS.items():
        own = [each for each in every if each.paper == paper]
        if own:
            lines += [f"## {name}", ""]
        if own and arxiv:
            lines += [f"[arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})", ""]
        for each in sorted(own, key=lambda each: _order(each.number)):
            lines += _entry(each, name)
    return "\n".join(lines)


def _order(number: str) -> tuple[int, str]:
    digits = re.match(r"\d+", number)
    return (int(digits[0]) if digits else 10**6, number)


def _entry(each: Equation, name: str) -> list[str]:
    number = f"equation {each.number}" if each.number[0].isdigit() else each.number
    number = "" if name.endswith(f": {number}") else f", {number}"
    code = ", ".join(_link(place) for place in each.code) or "a step of the derivation"
    tests = ", ".join(_link(place) for place in each.tests)
    return [
        f"**{name}{number}** {{eq}}`{each.id}` in [](chapters/{each.chapter}.md)", "",
        "$$", each.formula, "$$", "",
        f"code: {code}; tests: {tests}", "",
    ]  # fmt: skip


def _link(place: Place) -> str:
    return f"{{src}}`{place.file} {place.line} {place.name}`"


def fill(app: "Sphinx", docname: str, source: list[str]) -> None:
    if docname == "equations":
        source[0] += "\n" + text()


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: ["equations"])
    return {"parallel_read_safe": True, "parallel_write_safe": True}
