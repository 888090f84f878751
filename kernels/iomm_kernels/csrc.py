"""The compiled operators of csrc/. None is built yet."""


def problem(name: str) -> str | None:
    """Why torch.ops.iomm_csrc.<name> is not there; None if it is."""
    return f"has no compiled operator {name}"
