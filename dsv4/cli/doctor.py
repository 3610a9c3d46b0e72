"""``dsv4 doctor``: what this machine can run, and why not the rest."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dsv4.cli._output import console, count_of, human_bytes, print_json
from dsv4.cli._shapes import SHAPES

_TOKENS = 8192
_LAYERS = ("v4-flash", "v4-pro")


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Show devices, versions, which backends are usable and why not, and what memory a layer needs."""
    document = examine()
    if json:
        print_json(document)
    else:
        _print(document)


def examine() -> dict[str, Any]:
    """Everything that ``doctor`` shows."""
    import os
    import platform

    from dsv4.cli._machine import devices, versions

    found = devices()
    names = [device["device"] for device in found]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "environment": {"DSV4_BACKEND": os.environ.get("DSV4_BACKEND")},
        "devices": found,
        "max_num_tokens": _TOKENS,
        "layers": [_layer(layer, device) for device in names for layer in _LAYERS],
    }


def _layer(name: str, device_name: str) -> dict[str, Any]:
    """The backends' word on one layer shape on one device, and what the chosen one needs."""
    import torch

    from dsv4.backends import choose, explain_all
    from dsv4.errors import BackendError

    shape, device = SHAPES[name], torch.device(device_name)
    config = shape.config(max_num_tokens=_TOKENS)
    verdicts = {
        backend: {"usable": verdict.usable, "reason": verdict.reason}
        for backend, verdict in explain_all(config, device).items()
    }
    entry: dict[str, Any] = {"layer": name, "device": device_name, "backends": verdicts}
    try:
        chosen = choose("auto", config, device)
    except BackendError as error:  # DSV4_BACKEND names one that cannot be used
        return entry | {"chosen": None, "problem": str(error)}
    if device.type == "cuda":
        from dsv4.backends import BACKENDS
        from dsv4.backends.proof import known

        proofs = {b.name: proof for b in BACKENDS if (proof := known(b, device)) is not None}
        entry["proofs"] = {name: proof.reason for name, proof in proofs.items()}
        failed = [name for name, proof in proofs.items() if not proof.usable]
        chosen = next((b for b in BACKENDS if b.name not in failed and verdicts[b.name]["usable"]), chosen)
    return entry | {
        "chosen": chosen.name,
        "workspace_bytes": chosen.workspace_bytes(config, device),
        "weight_bytes_bf16": shape.bf16_bytes,
    }


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console()
    versions = document["versions"]
    screen.print("  ".join(f"{name} {version or '-'}" for name, version in versions.items()), style="bold")
    screen.print(f"{document['system']}, DSV4_BACKEND={document['environment']['DSV4_BACKEND'] or '(not set)'}")

    table = Table(title="Devices", title_justify="left")
    for column in ("device", "name", "", "memory"):
        table.add_column(column)
    for device in document["devices"]:
        if device["device"] == "cpu":
            detail = f"{count_of(device['cores'], 'core')}, torch uses {count_of(device['threads'], 'thread')}"
        else:
            detail = f"capability {device['capability']}, {device['multiprocessors']} multiprocessors"
        memory = device["memory_bytes"]
        table.add_row(device["device"], device["name"], detail, human_bytes(memory) if memory else "?")
    screen.print(table)

    table = Table(title="Backends (W4A4, in the order in which they are tried)", title_justify="left")
    for column in ("layer", "device", "backend", "usable", "why"):
        table.add_column(column, overflow="fold")
    for layer in document["layers"]:
        for backend, verdict in layer["backends"].items():
            usable = Text("yes", "green") if verdict["usable"] else Text("no", "red")
            proof = layer.get("proofs", {}).get(backend)
            reason = verdict["reason"] + (f"; {proof}" if proof else "")
            table.add_row(layer["layer"], layer["device"], backend, usable, reason)
    screen.print(table)

    table = Table(title=f"One layer, calls of up to {document['max_num_tokens']} tokens", title_justify="left")
    for column in ("layer", "shape", "device", "backend chosen", "workspace"):
        table.add_column(column, overflow="fold")
    for layer in document["layers"]:
        chosen = layer["chosen"] or f"none: {layer['problem']}"
        workspace = human_bytes(layer["workspace_bytes"]) if layer["chosen"] else "-"
        table.add_row(layer["layer"], str(SHAPES[layer["layer"]]), layer["device"], chosen, workspace)
    screen.print(table)
