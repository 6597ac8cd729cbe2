"""Writes what is derived from the nodes' schemas and texts: the English locale, and the lists in the help pages.

Hand-written are the schemas' own texts, `locales/zh/nodeDefs.json`, and in each page under `web/docs/` everything but
the sections Inputs and Outputs. Usage, after any change to a schema or to the Chinese texts:

    python -m dev.build.build_texts
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .schemas import LOCAL_CHOICES, ROOT, Input, Schema, ours

LOCALES = ROOT / "locales"
PAGES = ROOT / "web" / "docs"
WORDS = Path(__file__).with_name("page_words.json")


@dataclass(frozen=True)
class Words:
    """The words of a language that the lists need."""

    language: str
    inputs: str
    outputs: str
    mistakes: str
    optional: str
    default: str
    between: str
    on: str
    off: str
    listed: str
    socket: str
    step: str
    texts: str
    many: str
    join: str
    brackets: str
    colon: str

    def page(self, node: str) -> Path:
        """Where the help page of a node is."""
        return PAGES / f"{node}.md" if self.language == "en" else PAGES / node / f"{self.language}.md"


LANGUAGES = tuple(Words(**words) for words in json.loads(WORDS.read_text(encoding="utf-8")))


def english(schemas: dict[str, Schema]) -> dict:
    """The English node texts, as the schemas have them."""
    return {
        node: {
            "display_name": schema.name,
            "description": schema.description,
            "inputs": {i.name: {"name": i.name, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {str(n): {"name": o.name, "tooltip": o.tooltip} for n, o in enumerate(schema.outputs)},
        }
        for node, schema in schemas.items()
    }


def node_texts(language: str) -> dict:
    """The node texts of a language, as checked in."""
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def number(value: float) -> str:
    """A number as people write it."""
    return "2^64 - 1" if value == 2**64 - 1 else f"{value:g}" if isinstance(value, float) else str(value)


def facts(node: str, spec: Input, words: Words) -> str:
    """Type, range and default of an input."""
    said = []
    if not spec.is_widget:
        said.append(words.socket.format(spec.type))
    elif (node, spec.name) in LOCAL_CHOICES:
        said.append(words.listed)
    elif spec.type == "COMBO":
        said.append(" / ".join(spec.options["options"]))
    elif spec.type == "BOOLEAN":
        said.append(f"{words.on} / {words.off}")
    elif spec.type == "STRING":
        said.append(words.texts)
    else:
        said.append(f"{spec.type}{words.join}{words.between}".format(*map(number, limits(spec))))
        if spec.type == "INT" and spec.options.get("step", 1) != 1:
            said.append(words.step.format(spec.options["step"]))
    if spec.is_widget and spec.options.get("default") is not None:
        value = spec.options["default"]
        shown = {True: words.on, False: words.off}[value] if isinstance(value, bool) else value
        said.append(words.default.format(number(shown) if isinstance(shown, (int, float)) else shown))
    if spec.optional:
        said.append(words.optional)
    return words.join.join(said)


def limits(spec: Input) -> tuple[float, float]:
    """The least and the greatest value of a number."""
    return spec.options["min"], spec.options["max"]


def lists(schema: Schema, texts: dict, words: Words) -> dict[str, str]:
    """The bodies of the sections Inputs and Outputs, by heading.

    Args:
        schema: the node.
        texts: its entry in nodeDefs.json of that language.
        words: of that language.
    """
    inputs, outputs = [], []
    for spec in schema.inputs:
        text, told = texts["inputs"][spec.name], facts(schema.id, spec, words)
        label = f"**{spec.name}**" if text["name"] == spec.name else f"**{text['name']}** `{spec.name}`"
        inputs.append(f"- {label}{words.brackets.format(told)}{words.colon}{text['tooltip']}")
    for index, output in enumerate(schema.outputs):
        text = texts["outputs"][str(index)]
        label = f"**{text['name']}**" if text["name"] == output.name else f"**{text['name']}** `{output.name}`"
        told = output.type + (f"{words.join}{words.many}" if output.is_list else "")
        outputs.append(f"- {label}{words.brackets.format(told)}{words.colon}{text['tooltip']}")
    return {words.inputs: "\n".join(inputs), words.outputs: "\n".join(outputs)}


def with_lists(page: str, bodies: dict[str, str]) -> str:
    """A page whose sections of these headings have these bodies. Raises ValueError where a page lacks one."""
    for heading, body in bodies.items():
        page, count = re.subn(
            rf"(^## {heading}\n).*?(?=^## |\Z)", rf"\1\n{_literal(body)}\n\n", page, flags=re.M | re.S
        )
        if count != 1:
            raise ValueError(f"a page needs the heading '## {heading}' once")
    return page.rstrip() + "\n"


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


def pages(schemas: dict[str, Schema]) -> dict[Path, str]:
    """Every help page with its lists as they should be, by path."""
    found = {}
    for words in LANGUAGES:
        texts = english(schemas) if words.language == "en" else node_texts(words.language)
        for node, schema in schemas.items():
            path = words.page(node)
            found[path] = with_lists(path.read_text(encoding="utf-8"), lists(schema, texts[node], words))
    return found


def locale_file(schemas: dict[str, Schema]) -> tuple[Path, str]:
    """Path and text of the English locale."""
    text = json.dumps(english(schemas), indent=2, ensure_ascii=False) + "\n"
    return LOCALES / "en" / "nodeDefs.json", text


def main() -> None:
    """Write everything."""
    schemas = ours()
    for path, text in [locale_file(schemas), *pages(schemas).items()]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"the English locale and {len(LANGUAGES) * len(schemas)} help pages written")


if __name__ == "__main__":
    main()
