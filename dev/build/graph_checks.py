"""What is wrong with a workflow file, against the nodes' current schemas."""

from typing import Any

from .schemas import LOCAL_CHOICES, Input, Schema

NOTES = ("MarkdownNote", "Note")  # drawn by the front end, unknown to the host
KINDS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}


def api_complaints(graph: dict, schemas: dict[str, Schema]) -> list[str]:
    """All that a host would refuse in an API graph, and inputs it would drop without a word.

    Args:
        graph: node id -> {"class_type", "inputs"}.
        schemas: every node that may occur.

    Returns:
        One line each; none when the graph is right.
    """
    found = []
    for node, data in graph.items():
        kind = data["class_type"]
        if kind not in schemas:
            found.append(f"{node}: no node {kind}")
            continue
        specs = {spec.name: spec for spec in schemas[kind].inputs}
        for name in data["inputs"].keys() - specs.keys():
            found.append(f"{node}: {kind} has no input {name}")
        for name, spec in specs.items():
            if name in data["inputs"]:
                value = data["inputs"][name]
                found += [f"{node}: {kind}.{name}: {text}" for text in _value(value, spec, kind, graph, schemas)]
            elif not spec.optional:
                found.append(f"{node}: {kind}.{name} is required")
    return found


def _value(value: Any, spec: Input, kind: str, graph: dict, schemas: dict[str, Schema]) -> list[str]:
    if isinstance(value, list):
        return _link(value, spec, graph, schemas)
    if not spec.is_widget:
        return [f"{value!r} where a link is due"]
    if not isinstance(value, KINDS[spec.type]) or (isinstance(value, bool) and spec.type != "BOOLEAN"):
        return [f"{value!r} is no {spec.type}"]
    if spec.type == "COMBO":
        choices = spec.options["options"]
        return [] if (kind, spec.name) in LOCAL_CHOICES or value in choices else [f"{value!r} is none of {choices}"]
    if spec.type in ("INT", "FLOAT"):
        low, high = spec.options.get("min", value), spec.options.get("max", value)
        if not low <= value <= high:
            return [f"{value!r} is not in {low} to {high}"]
        step = spec.options.get("step", 1)
        if spec.type == "INT" and (value - low) % step:
            return [f"{value!r} is not on a step of {step}"]
    return []


def _link(value: list, spec: Input, graph: dict, schemas: dict[str, Schema]) -> list[str]:
    source, index = value
    if source not in graph or graph[source]["class_type"] not in schemas:
        return [f"linked to {source}, which is not there"]
    outputs = schemas[graph[source]["class_type"]].outputs
    if not 0 <= index < len(outputs):
        return [f"linked to output {index} of {source}, which has {len(outputs)}"]
    if spec.type not in ("*", outputs[index].type):
        return [f"takes {spec.type}, linked to {outputs[index].type}"]
    return []


def graph_complaints(graph: dict, schemas: dict[str, Schema]) -> list[str]:
    """What does not fit together in a canvas graph: sockets, links, and the number of widget values."""
    found = []
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    for node in graph["nodes"]:
        where, kind = f"{node['id']} {node['type']}", node["type"]
        if kind in NOTES:
            continue
        if kind not in schemas:
            found.append(f"{where}: no such node")
            continue
        specs = {spec.name: spec for spec in schemas[kind].inputs}
        if [
            (i["name"], i["type"])
            for i in node["inputs"]
            if i["name"] not in specs or i["type"] != specs[i["name"]].type
        ]:
            found.append(f"{where}: inputs that the node does not have")
        if {i["name"] for i in node["inputs"]} != specs.keys():
            found.append(f"{where}: inputs are missing")
        if [(o["name"], o["type"]) for o in node["outputs"]] != [(o.name, o.type) for o in schemas[kind].outputs]:
            found.append(f"{where}: outputs are not the node's")
        if len(node["widgets_values"]) != len(_widget_names(schemas[kind])):
            found.append(f"{where}: wrong number of widget values")
    for number, start, out, end, slot, kind in graph["links"]:
        output, inp = nodes[start]["outputs"][out], nodes[end]["inputs"][slot]
        if number not in (output["links"] or []) or inp["link"] != number or output["type"] != kind:
            found.append(f"link {number}: its two ends do not agree")
    referred = {i["link"] for node in graph["nodes"] for i in node["inputs"]} - {None}
    if referred != links.keys():
        found.append(f"links {sorted(referred ^ links.keys())} have one end")
    if len({node["id"] for node in graph["nodes"]}) != len(graph["nodes"]) or graph["last_node_id"] != max(nodes):
        found.append("ids are not in order")
    return found


def api_of(graph: dict, schemas: dict[str, Schema]) -> dict:
    """The API form of a canvas graph, as the front end makes it when it queues."""
    links = {link[0]: link for link in graph["links"]}
    made = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = schemas[node["type"]]
        inputs = dict(zip(_widget_names(schema), node["widgets_values"], strict=True))
        inputs = {name: value for name, value in inputs.items() if name in {spec.name for spec in schema.inputs}}
        inputs |= {i["name"]: [str(links[i["link"]][1]), links[i["link"]][2]] for i in node["inputs"] if i["link"]}
        title = node.get("title", schema.name)
        made[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return made


def _widget_names(schema: Schema) -> list[str]:
    """Whose values a graph lists, in order: widgets, and what the front end adds to some of them."""
    names = []
    for spec in schema.inputs:
        if spec.is_widget:
            names.append(spec.name)
            names += [f"{spec.name}: after"] if spec.options.get("control_after_generate") else []
            names += [f"{spec.name}: upload"] if spec.options.get("image_upload") else []
    return names
