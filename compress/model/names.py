"""What the names of tensors tell. No model code here: recipes import this."""


def layer_of(name: str) -> int | None:
    """The number of the layer a tensor belongs to, from its name; None for the embedding and the head."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)
