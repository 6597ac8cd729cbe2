"""The card of a converted folder: what was done, how large it is, and how far its layers are from those before."""

import math
from collections.abc import Mapping

from ..checkpoint.component import Component
from ..checkpoint.layout import Layout
from ..quantization.formats import FP8Block, Int4, Int8
from .options import PARTS, Conversion
from .parts import NewFile, kind
from .record import RECORD, Record

_SAID = {
    Int4: "4 bits, a scale and a zero for each {group_size} inputs",
    Int8: "8 bits, a scale for each output",
    FP8Block: "FP8 with a scale for each block of 128 x 128, as the FP8 release",
}


def card(
    source: str,
    target: str,
    conversion: Conversion,
    layout: Layout,
    parts: Mapping[str, Component],
    files: list[NewFile],
    record: Record,
) -> str:
    """README.md of a converted folder.

    Args:
        source, target: names of the two folders.
        conversion, layout, parts, files: what was asked for, where it came from, and what it became.
        record: what was written.
    """
    errors = record.errors()
    lines = [
        "---",
        "license: apache-2.0",
        "base_model: inclusionAI/LLaDA2.0-Uni",
        "base_model_relation: quantized",
        "---",
        "",
        f"# {target}",
        "",
        f"LLaDA2.0-Uni of the folder {source}, in the released layout, its layers in fewer bits. It was written by",
        "",
        f"    python -m llada_core.quantization {source} {target}{_arguments(conversion)}",
        "",
        "and is opened like the release: as a folder below `models/llada_uni` by ComfyUI's *Load LLaDA-Uni*, or by",
        '`LLaDAUni("' + target + '")`. Router, norms, embeddings, head, and in the decoders the embedders, modulations',
        "and last layers have the type that they had. No calibration data was used.",
        "",
        "| part | its layers | GB | before |",
        "|---|---|---|---|",
    ]
    for part in PARTS:
        if not layout.has(part) and part != "backbone":
            continue
        if not conversion.wants(part):
            lines.append(f"| {part} | left out | | |")
            continue
        before = _bytes_before(part, layout)
        written = [noted["bytes"] for noted in record.files.values() if noted["part"] == part]
        form = conversion.form(part)
        said = "as they were" if form is None else _SAID[type(form)].format(**vars(form))
        lines.append(f"| {part} | {said} | {(sum(written) or before) / 1e9:.3g} | {before / 1e9:.3g} |")
    if errors:
        lines += [
            "",
            "Relative error of the layers, the root of squared differences over squared weights:",
            "",
            "| part | layers | mean | largest |",
            "|---|---|---|---|",
        ]
        lines += _error_rows(errors)
    linked = sorted(path for path, how in record.kept.items() if how == "linked")
    if linked:
        names = ", ".join(f"`{path}`" for path in linked)
        lines += ["", f"Hard links to the files of {source}, which take no space of their own: {names}."]
    lines += ["", _other_tools(conversion), "", f"`{RECORD}` has a checksum of every tensor."]
    return "\n".join(lines) + "\n"


def _arguments(conversion: Conversion) -> str:
    said = f" --backbone {conversion.backbone} --decoder {conversion.decoder} --vision {conversion.vision}"
    return said if conversion.parts is None else f"{said} --parts {' '.join(conversion.parts)}"


def _bytes_before(part: str, layout: Layout) -> int:
    if part == "backbone":
        return sum({e.file: e.file.stat().st_size for e in layout.backbone_files().entries.values()}.values())
    return sum((layout.root / path).stat().st_size for path in layout.part_files(part))


def _error_rows(errors: Mapping[tuple[str, str], tuple[float, float]]) -> list[str]:
    groups: dict[tuple[str, str], list[float]] = {}
    for (part, name), (lost, whole) in errors.items():
        groups.setdefault((part, kind(name)), []).append(math.sqrt(lost / whole))
    return [
        f"| {part} | {what} | {sum(found) / len(found):.4f} | {max(found):.4f} |"
        for (part, what), found in groups.items()
    ]


def _other_tools(conversion: Conversion) -> str:
    forms = {conversion.form(part) for part in ("backbone", "decoder", "image_tokenizer")}
    texts = []
    if any(isinstance(form, Int4 | Int8) for form in forms):
        texts.append(
            "Beside each quantized weight `X.weight` lie its scales and `X.comfy_quant`, JSON that says what they mean "
            "in ComfyUI's own terms: `int8_tensorwise` with a scale a row, and `awq_w4a16`. The experts of a layer are "
            "one tensor, with `num_experts` there."
        )
    if any(isinstance(form, FP8Block) for form in forms):
        texts.append(
            "FP8 weights have `X.weight_scale_inv` beside them, as in the FP8 release; ComfyUI has no form of its own "
            "for those blocks."
        )
    return " ".join(texts) or "No layer was quantized; banks of experts are one tensor each."
