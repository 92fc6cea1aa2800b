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

    def collect(path: str, module: nn.Module) -> None:
        inside = f"{path}." if path else ""
        if path in blocks or not any(True for _ in module.parameters()):
            return
        if path and not any(block.startswith(inside) for block in blocks):
            outside.append(path)
            return
        for name, child in module.named_children():
            collect(inside + name, child)

    collect("", model)
    units: list[list[str]] = [[block] for block in dict.fromkeys(blocks)]
    holder: dict[int, list[str]] = {id(p): unit for unit in units for p in model.get_submodule(unit[0]).parameters()}
    for path in outside:
        parameters = list(model.get_submodule(path).parameters())
        shared = next((holder[id(p)] for p in parameters if id(p) in holder), None)
        unit = shared if shared is not None else []
        if shared is None:
            units.append(unit)
        unit.append(path)
        holder.update({id(p): unit for p in parameters})
    return units
