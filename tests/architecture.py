"""The README's diagram of `lsgs_core`, made from its imports: `python tests/architecture.py`."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "lsgs_core", ROOT / "notebooks" / "study")
START, END = "```mermaid\n", "```\n"

# The boxes of the diagram in the order of the method. "foundations" are used by all and not drawn.
BOXES = {
    "foundations": "errors batch randomness",
    "scenarios": "scenarios",
    "models": "models",
    "distortion": "distortion regression",
    "probabilities": "probabilities uncertainty",
    "sampling": "sampling distributions adaptive dropout",
    "methods": "methods scoring_file",
    "study": "study",
}
BOX_OF = {module: box for box, modules in BOXES.items() for module in modules.split()}


def imports() -> dict[str, set[str]]:
    """The modules of the core and of the study that each of them imports, by dotted name."""
    paths = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for package in PACKAGES
        for path in package.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    graph: dict[str, set[str]] = {name: set() for name in names if name != "lsgs_core"}
    for name in graph:
        for node in ast.walk(ast.parse(names[name].read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = {f"{node.module}.{alias.name}" for alias in node.names} & graph.keys()
                graph[name] |= (parts or {node.module} & graph.keys()) - {name}
    return graph


def boxes() -> dict[str, set[str]]:
    """The boxes that each box imports from."""
    graph: dict[str, set[str]] = {box: set() for box in BOXES}
    for name, used in imports().items():
        box, *others = (
            BOX_OF[part[0] if part[0] == "study" else part[1]]
            for part in (module.split(".") for module in (name, *used))
        )
        graph[box] |= set(others) - {box}
    return graph


def diagram() -> str:
    """The Mermaid text; raises `graphlib.CycleError` where modules or boxes form a circle."""
    graph = boxes()
    for imported in (imports(), graph):
        TopologicalSorter(imported).prepare()

    def reached(box: str) -> set[str]:
        return set().union(*({used} | reached(used) for used in graph[box]))

    lines = ["flowchart LR"]
    for box, modules in [*BOXES.items()][1:]:
        files = [m for m in modules.split() if m != box and (PACKAGES[0] / f"{m}.py").exists()]
        folder = "notebooks/study" if box == "study" else f"{box}/" if box == "models" else box
        lines.append(f'    {box}["<b>{folder}</b>{"".join(f"<br/>{file}" for file in files)}"]')
    for box, used in graph.items():
        direct = {one for one in used if not any(one in reached(other) for other in used - {one})}
        lines += [f"    {one} --> {box}" for one in BOXES if one in direct - {"foundations"}]
    return START + "\n".join(lines) + "\n" + END


def in_readme() -> str:
    """The diagram that the README shows."""
    text = (ROOT / "README.md").read_text("utf-8")
    start = text.index(START)
    return text[start : text.index(END, start + len(START)) + len(END)]


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(readme.read_text("utf-8").replace(in_readme(), diagram()), "utf-8")
    print(diagram())
