"""Units: the parts of a model that are gathered together."""

from torch import nn


def units_of(model: nn.Module) -> list[list[str]]:
    """Module paths of every unit: each repeated block, then what stands outside of blocks.

    Embedding, final norm and head must be units of their own: the root's post-backward runs last,
    so whatever the root owned would keep its whole gradient alive through the backward. Modules
    that share a weight form one unit.
    """
    blocks: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{block}.") for block in blocks):
            blocks += [
                f"{path}.{name}" for name, child in module.named_children() if any(True for _ in child.parameters())
            ]

    outside: list[str] = []
    placed = {model.get_submodule(path) for path in blocks}

    def collect(path: str, module: nn.Module) -> None:
        inside = f"{path}." if path else ""
        # A module may stand in more than one place, as the embedding does that peft keeps at hand.
        if module in placed or not any(True for _ in module.parameters()):
            return
        # FSDP2 wraps nothing that has no forward of its own.
        container = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if path and not container and not any(block.startswith(inside) for block in blocks):
            outside.append(path)
            placed.add(module)
            return
        for name, child in module.named_children():
            collect(inside + name, child)

    collect("", model)
    units: list[list[str]] = []
    unit_of: dict[int, list[str]] = {}  # by identity of the parameter
    for path in [*dict.fromkeys(blocks), *outside]:
        unit = [path]
        for parameter in model.get_submodule(path).parameters():
            sharing = unit_of.setdefault(id(parameter), unit)
            if sharing is not unit:
                units.remove(sharing)
                unit[:0] = sharing
                unit_of.update({known: unit for known, holder in unit_of.items() if holder is sharing})
        units.append(unit)
    return units
