"""The diagram of the README, made from the imports: `python tests/architecture.py --write`."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lsgs_core"
START, END = "```mermaid\n", "```\n"

# What belongs together, in the order of the method; a folder of the package is one module here.
GROUPS = {
    "foundations": "errors files sources randomness devices artifacts",
    "scenarios": "scenarios",
    "data": "data",
    "models": "models",
    "distortion": "distortion",
    "smoothing": "smoothing sensitivity",
    "sampling": "sampling samplers adaptive methods published",
    "training": "losses settings training pretraining",
    "evaluation": "evaluation statistics",
    "study": "study",
    "benchmark": "speed",
    "figures": "figures",
}
GROUP_OF = {module: group for group, modules in GROUPS.items() for module in modules.split()}


def modules() -> set[str]:
    """Modules of the package, a folder counting as one."""
    found = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".py") for name in found} - {"__init__"}


def members(group: str) -> list[str]:
    """Names of a group's files, without the file that the group is named after."""
    names = [path.stem for path in (PACKAGE / group).glob("*.py") if path.stem[0] != "_"]
    return sorted(names) + [name for name in GROUPS[group].split() if name != group]


def uses() -> dict[str, set[str]]:
    """Groups that every group imports from."""
    found: dict[str, set[str]] = {group: set() for group in GROUPS}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module == "__init__":  # names what it imports when that is used
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            package, *rest = (node.module or "").split(".")
            if package == "lsgs_core":
                for name in rest[:1] or [alias.name for alias in node.names]:
                    found[GROUP_OF[module]].add(GROUP_OF[name])
    return {group: used - {group} for group, used in found.items()}


def direct(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without what follows from the rest (its transitive reduction)."""

    def reached(group: str) -> set[str]:
        return set().union(*({used} | reached(used) for used in graph[group]))

    return {
        group: {one for one in used if not any(one in reached(other) for other in used - {one})}
        for group, used in graph.items()
    }


def diagram() -> str:
    """The Mermaid text; raises `graphlib.CycleError` where data would not flow one way."""
    graph = uses()
    list(TopologicalSorter(graph).static_order())
    lines = [START.strip(), "flowchart LR"]
    for group in GROUPS:
        folder = "/" if (PACKAGE / group).is_dir() else ""
        inside = f"<b>{group}{folder}</b>" + "".join(f"<br/>{name}" for name in members(group))
        lines.append(f'    {group}["{inside}"]')
    shown = direct({group: used - {"foundations"} for group, used in graph.items()})
    for group in GROUPS:
        lines += [f"    {used} --> {group}" for used in GROUPS if used in shown[group]]
    return "\n".join([*lines, END.strip()]) + "\n"


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
